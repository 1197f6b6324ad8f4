"""Runs of hundreds of saves for `delta_policy` alone: chunks are made-up sizes, and packs are filled as two encoders do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fastckpt.writing.delta_policy import MAX_DEPTH, Balance, Known, Packs, plan, scouts

MIB = 1 << 20
RAW_BYTES = 4 * MIB


@dataclass(frozen=True)
class Kind:
    """Chunks that change alike. Of the raw bytes: what one takes in full, and as a difference; the part that rests; the work of one."""

    n: int
    full: float
    delta: float | Callable[[int], float]
    rests: float | Callable[[int], float] = 0.0
    work: float = 0.7


@dataclass
class Chunk:
    """A chunk in the newest checkpoint: its rows, the oldest first."""

    kind: Kind
    role: int
    stored: list[float] = field(default_factory=list)
    packs: list[int] = field(default_factory=list)
    work: float = 0.0
    excess: float = 0.0
    is_again: bool = False


class Checkpoint(NamedTuple):
    """What a save made, in full checkpoints; `full`: which part of the chunks was written in full."""

    stored: float
    read: float
    work: float
    store: float
    full: float


class Run:
    """Saves of one state. pack_bytes: a pack's. keep: how many checkpoints the store has."""

    def __init__(
        self, kinds: Sequence[Kind], read_amplification: float = 1.5, pack_bytes: float = 16 * MIB, keep: int = 3
    ) -> None:
        self.chunks = [Chunk(kind, role) for role, kind in enumerate(kinds) for _ in range(kind.n)]
        self._amplification, self._keep = read_amplification, keep
        self._random = np.random.default_rng(0)
        self._most = pack_bytes
        self._pack_bytes: list[float] = []
        self._open: dict[int, int] = {}
        self._named: list[set[int]] = []
        self._step = 0

    def saves(self, n: int) -> list[Checkpoint]:
        """So many saves more."""
        return [self._save() for _ in range(n)]

    def _save(self) -> Checkpoint:
        known = self._known() if self._step else None
        balance = Balance(plan(known, self._packs(), self._amplification)) if known is not None else None
        self._open = {}
        full_bytes = stored = n_full = 0.0
        for number in dict.fromkeys([*(scouts(known) if known is not None else []), *range(len(self.chunks))]):
            chunk = self.chunks[number]
            full, delta, rests = self._sizes(chunk.kind)
            full_bytes += full
            if balance is None or not self._is_kept(balance, number, chunk, full, delta, rests):
                stored, n_full = stored + full, n_full + 1
                chunk.stored, chunk.packs, chunk.work = [full], [self._put(full, number)], RAW_BYTES
                chunk.excess, chunk.is_again = 0, False
            elif not chunk.is_again:
                stored += delta
        self._step += 1
        named = [pack for chunk in self.chunks for pack in chunk.packs]
        self._named = [*self._named[1 - self._keep :], set(named)]
        return Checkpoint(
            stored / full_bytes,
            sum(sum(chunk.stored) for chunk in self.chunks) / full_bytes,
            sum(chunk.work for chunk in self.chunks) / RAW_BYTES / len(self.chunks),
            sum(self._pack_bytes[pack] for pack in set().union(*self._named)) / full_bytes,
            n_full / len(self.chunks),
        )

    def _sizes(self, kind: Kind) -> tuple[float, float, bool]:
        delta = kind.delta if isinstance(kind.delta, float) else kind.delta(self._step)
        rests = kind.rests if isinstance(kind.rests, float) else kind.rests(self._step)
        a, b = 1 + 0.02 * self._random.standard_normal(2)
        return kind.full * RAW_BYTES * a, delta * RAW_BYTES * b, bool(self._random.random() < rests)

    def _is_kept(self, balance: Balance, number: int, chunk: Chunk, full: float, delta: float, rests: bool) -> bool:
        """As `Deltas` does it."""
        if rests and balance.fits(number, 0, 0):
            balance.is_kept(number, 0, 0)
            chunk.is_again = True
            return True
        if not rests and balance.may_differ(number):
            pays, work = delta < 0.98 * full, chunk.kind.work * RAW_BYTES
            balance.tried(number, delta if pays else None)
            if pays and balance.fits(number, delta, work):
                balance.is_kept(number, delta, work)
                chunk.stored.append(delta)
                chunk.packs.append(self._put(delta, number))
                chunk.work += work
                chunk.excess += sum(chunk.stored[1:])
                chunk.is_again = False
                return True
        balance.is_full(number, full)
        return False

    def _put(self, n_bytes: float, number: int) -> int:
        encoder = number % 2
        pack = self._open.get(encoder)
        if pack is None or self._pack_bytes[pack] + n_bytes > self._most:
            pack = self._open[encoder] = len(self._pack_bytes)
            self._pack_bytes.append(0.0)
        self._pack_bytes[pack] += n_bytes
        return pack

    def _known(self) -> Known:
        chunks = self.chunks
        role = np.array([chunk.role for chunk in chunks])
        full = np.array([chunk.stored[0] for chunk in chunks])
        is_delta = np.array([len(chunk.stored) > 1 for chunk in chunks])
        last = np.array([chunk.stored[-1] for chunk in chunks])
        of_full = np.bincount(role, np.where(is_delta, full, 0))
        ratio = np.bincount(role, np.where(is_delta, last, 0)) / np.maximum(of_full, 1)
        again = np.array([chunk.is_again for chunk in chunks])
        guess = (of_full == 0)[role]
        delta = np.where(again, 0, np.where(is_delta, last, np.where(guess, 1, ratio[role]) * full))
        raw = np.full(len(chunks), float(RAW_BYTES))
        work = np.array([chunk.kind.work for chunk in chunks]) * raw
        return Known(
            raw_bytes=raw,
            has_base=np.ones(len(chunks), bool),
            full_bytes=full,
            read_bytes=np.array([sum(chunk.stored) for chunk in chunks]),
            work=np.array([chunk.work for chunk in chunks]),
            full_work=raw,
            excess=np.array([chunk.excess for chunk in chunks]),
            delta_bytes=delta,
            delta_work=np.where(again, 0, work),
            may_differ=np.array([len(chunk.stored) <= MAX_DEPTH for chunk in chunks]),
            is_guess=guess & ~again,
            role=role,
            pack=np.array([chunk.packs[0] for chunk in chunks]),
        )

    def _packs(self) -> Packs:
        pairs = sorted({(number, pack) for number, chunk in enumerate(self.chunks) for pack in chunk.packs})
        chunk, pack = np.array(pairs).T
        return Packs(np.array(self._pack_bytes), chunk, pack)
