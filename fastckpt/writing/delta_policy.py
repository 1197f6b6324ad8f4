"""Which chunks of a save may be stored as differences from the base, and which are written anew. Pure.

A difference makes this save smaller and every restore longer: it is read and decoded besides all that its base needs. So the sum over a
rank's checkpoint is capped three times:

    bytes    stored bytes that a restore reads    ≤ `read_amplification` × those of a full checkpoint
    work     decoding                             ≤ _MOST_WORK × that of a full checkpoint
    packs    all packs that the checkpoint names  ≤ _MOST_PACKS × the bytes of a full checkpoint

`plan` decides before a save, by what is known of the base's rows and of differences so far. As long as a cap would be exceeded, chunks are
written in full: those first whose chains have cost most, over all saves since they were last written in full, for each byte that it
takes to end this. So chains end at different saves, and no save is full again. `Balance` keeps the caps while the save goes on, whatever
the differences turn out to be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastckpt.writing.chains import Amounts, Mask, Numbers

_MOST_WORK = 1.45
_MOST_PACKS = 2.3
_SMALL_BYTES = 1 << 20
MOST_SMALL = 1000
"""Most packs below `_SMALL_BYTES` that a checkpoint names; larger ones are few by the third cap. Each costs a restore a request, and
retention a line of its listings."""
MAX_DEPTH = 32
"""Longest chain that is made; the format allows 64."""
_STEP = 1.4
"""Chains whose costs differ by less than this factor are taken for equal: then those in the oldest packs end first, so that packs die
whole."""
LEAST_GAIN = 0.02
"""Of a full chunk's bytes: what gains less is not worth a difference."""
_POOR = 0.92
"""Of a full chunk's bytes: a difference that takes more uses up a restore's bytes for little. It comes after all better ones, and there is
none among chunks of which some rest: these would not be kept, once they rest, for what they take to read."""
_RESTS = 0.05
"""Of the chunks of a role, so many are expected to be equal, if some rest."""
_EXPECTED = 0.75
"""Of a full chunk's bytes, what a difference is taken to need, where a poor one asks what it has to leave to others."""


class Known(NamedTuple):
    """What is known of each chunk before a save: an array for each."""

    raw_bytes: Amounts
    has_base: Mask
    """The base has this chunk. Otherwise only raw_bytes and full_bytes count."""
    full_bytes: Amounts
    """Stored bytes if it is written in full."""
    read_bytes: Amounts
    """Stored bytes that the base's chunk takes to read, all that it needs included."""
    work: Amounts
    full_work: Amounts
    excess: Amounts
    """Bytes times saves that its chain has cost (`chains.Costs`)."""
    delta_bytes: Amounts
    """Stored bytes of a difference, as far as can be foreseen. Where the chunk is expected to be equal: 0; where nothing is known: those
    of a full chunk."""
    delta_work: Amounts
    """Decoding of that difference alone."""
    may_differ: Mask
    """A difference is possible: numbers, the base's bytes in memory, a chain that is short enough."""
    is_guess: Mask
    """Nothing is known of a difference: it is tried."""
    role: Numbers
    """Chunks of one role change alike."""
    pack: Numbers
    """The oldest pack that it needs; for the order only."""


class Packs(NamedTuple):
    """The packs that the base names."""

    n_bytes: Amounts
    chunk: Numbers
    """Pairs, sorted by chunk: this chunk needs …"""
    pack: Numbers
    """… this pack."""


@dataclass(frozen=True)
class Plan:
    """What is allowed. extra_bytes and extra_work: what each chunk adds to a restore beyond a full chunk, if it goes as planned."""

    known: Known
    extra_bytes: Amounts
    extra_work: Amounts
    renew: Mask
    """To be written in full even if it is equal, so that a pack is not needed any more."""
    left_bytes: float
    left_work: float
    """What may be added beyond that."""
    read_amplification: float
    rests: Mask
    """Chunks of a role of which some rest."""
    packs: Packs
    named: Mask
    """Of each pack whether it will be needed, if all goes as planned."""
    own_bytes: Amounts
    """What each chunk will store."""
    left_packs: float
    """Bytes of packs that may be needed beyond that."""


def plan(known: Known, packs: Packs, read_amplification: float) -> Plan:
    """Decide what is allowed. read_amplification: most stored bytes that a restore reads, in full checkpoints; ≥ 1."""
    gain = np.where(known.is_guess, 0, known.full_bytes - known.delta_bytes)
    is_same = known.has_base & (known.delta_bytes == 0)
    rests = (np.bincount(known.role, is_same) > _RESTS * np.bincount(known.role))[known.role]
    least = np.where(rests, 1 - _POOR, LEAST_GAIN)
    keeps = known.has_base & (known.may_differ | is_same) & (gain > least * known.full_bytes)
    bytes_kept = known.read_bytes + known.delta_bytes - known.full_bytes
    work_kept = known.work + known.delta_work - known.full_work
    room_bytes = (read_amplification - 1) * known.full_bytes.sum()
    room_work = (_MOST_WORK - 1) * known.full_work.sum()
    keeps = _within(known, keeps, gain, (bytes_kept, room_bytes), (work_kept, room_work))
    renew = _freed(known, packs, keeps)
    keeps &= ~renew
    few = _fewer(known, packs, keeps)
    renew |= few
    keeps &= ~few
    extra_bytes, extra_work = np.where(keeps, bytes_kept, 0), np.where(keeps, work_kept, 0)
    own_bytes = np.where(keeps, known.delta_bytes, known.full_bytes)
    named = np.bincount(packs.pack[keeps[packs.chunk]], minlength=packs.n_bytes.size) > 0
    return Plan(
        known,
        extra_bytes,
        extra_work,
        renew,
        left_bytes=room_bytes - extra_bytes.sum(),
        left_work=room_work - extra_work.sum(),
        read_amplification=read_amplification,
        rests=rests,
        packs=packs,
        named=named,
        own_bytes=own_bytes,
        left_packs=_MOST_PACKS * known.full_bytes.sum() - own_bytes.sum() - packs.n_bytes[named].sum(),
    )


def scouts(known: Known) -> list[int]:
    """One chunk of each role of which nothing is known. What comes of it tells how much the others will need, so that poor differences of
    one role need not leave room for others that turn out to be none.
    """
    tried = np.flatnonzero(known.is_guess & known.may_differ)
    _, first = np.unique(known.role[tried], return_index=True)
    return sorted(tried[first].tolist())


def _within(known: Known, keeps: Mask, gain: Amounts, read: tuple[Amounts, float], work: tuple[Amounts, float]) -> Mask:
    """Those of the chunks `keeps` whose extra costs stay within both rooms."""
    weights = []
    for costs, room in (read, work):
        wanted = costs[keeps].sum()
        weights.append(0.0 if wanted <= room else 1 / max(room, 1e-9))
    if not any(weights):
        return keeps
    rows = np.flatnonzero(keeps)
    burden = sum(weight * costs[rows] for weight, (costs, _) in zip(weights, (read, work), strict=True))
    scale = np.maximum(known.read_bytes + known.delta_bytes - known.full_bytes, 1)[rows]
    age = 1 + known.excess[rows] / scale  # for how many saves this chain has been as long as it is now
    index = np.maximum(burden * age, 0) / np.maximum(gain[rows], 1e-9)
    level = np.floor(np.log(np.maximum(index, 1e-300)) / np.log(_STEP))
    order = np.lexsort((known.pack[rows], -level))
    kept = keeps.copy()
    ends = np.ones(rows.size, bool)
    for costs, room in (read, work):
        rest = costs[rows].sum() - np.cumsum(costs[rows][order])
        ends &= rest <= room
    n_full = int(np.argmax(ends)) + 1 if ends.any() else rows.size
    kept[rows[order[:n_full]]] = False
    return kept


def _freed(known: Known, packs: Packs, keeps: Mask) -> Mask:
    """Chunks to be written anew so that all packs together stay within their cap: of packs of which least is needed first."""
    n_packs = packs.n_bytes.size
    own = np.where(keeps, known.delta_bytes, known.full_bytes)
    alive = keeps[packs.chunk]
    chunk, pack = packs.chunk[alive], packs.pack[alive]
    cost = np.bincount(pack, (known.full_bytes - own)[chunk], n_packs)
    named = np.bincount(pack, minlength=n_packs) > 0
    total = packs.n_bytes[named].sum() + own.sum()
    room = _MOST_PACKS * known.full_bytes.sum()
    renew = np.zeros(keeps.size, bool)
    for number in np.argsort(np.where(named, cost / np.maximum(packs.n_bytes, 1), np.inf), kind="stable").tolist():
        if total <= room or not named[number]:
            break
        rows = np.unique(chunk[pack == number])
        rows = rows[~renew[rows]]
        costs = float((known.full_bytes - own)[rows].sum())
        if costs >= packs.n_bytes[number]:
            continue
        renew[rows] = True
        total += costs - packs.n_bytes[number]
    return renew


def _fewer(known: Known, packs: Packs, keeps: Mask) -> Mask:
    """Chunks to be written anew so that no more than `MOST_SMALL` small packs are named: of packs for which that takes least."""
    alive = keeps[packs.chunk]
    chunk, pack = packs.chunk[alive], packs.pack[alive]
    users = np.bincount(pack, minlength=packs.n_bytes.size)
    is_small = packs.n_bytes < _SMALL_BYTES
    renew = np.zeros(keeps.size, bool)
    if np.count_nonzero(is_small & (users > 0)) < MOST_SMALL:  # with that of this save
        return renew
    takes = np.where(keeps, known.full_bytes - known.delta_bytes, 0)
    cost = np.where(is_small & (users > 0), np.bincount(pack, takes[chunk], packs.n_bytes.size), np.inf)
    for number in np.argsort(cost, kind="stable").tolist():
        if np.count_nonzero(is_small & (users > 0)) < MOST_SMALL:
            break
        rows = np.unique(chunk[pack == number])
        renew[rows] = True
        users = np.bincount(pack[~renew[chunk]], minlength=users.size)
    return renew


class Balance:
    """What restores of a save may still cost beyond what was planned. Under the lock of its owner.

    For each chunk: `may_differ`, and if a difference was made `tried`; then `fits`; then `is_kept` or `is_full`.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._left_bytes, self._left_work, self._left_packs = plan.left_bytes, plan.left_work, plan.left_packs
        known = plan.known
        self._named = plan.named.copy()
        self._first_pair = np.searchsorted(plan.packs.chunk, np.arange(known.raw_bytes.size + 1))
        self._waiting = np.bincount(known.role, np.where(known.is_guess & known.may_differ, known.full_bytes, 0))
        """Of each role the full bytes of chunks of which nothing is known, and that have not come yet."""
        self._tried, self._gained, self._stored = np.zeros((3, self._waiting.size))
        """Of each role the full bytes of what was tried in this save, and of those that gained, and what these took."""

    def may_differ(self, number: int) -> bool:
        """Whether a difference is worth a try: one of the size that is to be expected is allowed."""
        known = self.plan.known
        if not known.may_differ[number]:
            return False
        role, full = int(known.role[number]), float(known.full_bytes[number])
        n_bytes = 0.0 if known.is_guess[number] else float(known.delta_bytes[number])
        if self._gained[role]:
            n_bytes = max(n_bytes, float(self._stored[role] / self._gained[role]) * full)
        return self.fits(number, n_bytes, float(known.delta_work[number]))

    def tried(self, number: int, stored_bytes: float | None) -> None:
        """What a difference took; None: it does not pay. That costs a sample only, so others of its role are tried all the same."""
        role, full = int(self.plan.known.role[number]), float(self.plan.known.full_bytes[number])
        self._tried[role] += full
        if stored_bytes is not None:
            self._gained[role] += full
            self._stored[role] += stored_bytes

    def fits(self, number: int, stored_bytes: float, work: float) -> bool:
        """Whether a chunk may be stored as so many bytes, and so much decoding, besides all that its base needs. 0: as the base's row."""
        plan = self.plan
        if plan.renew[number]:
            return False
        left_bytes = self._left_bytes + plan.extra_bytes[number]
        if stored_bytes > _POOR * plan.known.full_bytes[number]:
            if plan.rests[number]:
                return False
            if plan.known.is_guess[number]:
                left_bytes -= self._for_others(int(plan.known.role[number]))
        more_bytes, more_work = self._extra(number, stored_bytes, work)
        left_work = self._left_work + plan.extra_work[number]
        left_packs = self._left_packs + plan.own_bytes[number] - stored_bytes
        return bool(
            more_bytes <= max(0.0, left_bytes)
            and more_work <= max(0.0, left_work)
            and plan.packs.n_bytes[self._more_packs(number)].sum() <= max(0.0, left_packs)
        )

    def _more_packs(self, number: int) -> Numbers:
        """The packs that a chunk needs and no other so far."""
        packs = self.plan.packs.pack[self._first_pair[number] : self._first_pair[number + 1]]
        return packs[~self._named[packs]]

    def _for_others(self, role: int) -> float:
        """What differences of other roles are likely to add, unless they are poor, too."""
        took = self._stored + self._tried - self._gained
        ratio = np.where(self._tried > 0, took / np.maximum(self._tried, 1), _EXPECTED)
        wanted = np.where(ratio <= _POOR, ratio * self._waiting, 0)
        return float(wanted.sum() - wanted[role])

    def _extra(self, number: int, stored_bytes: float, work: float) -> tuple[float, float]:
        known = self.plan.known
        return (
            float(known.read_bytes[number] + stored_bytes - known.full_bytes[number]),
            float(known.work[number] + work - known.full_work[number]),
        )

    def is_kept(self, number: int, stored_bytes: float, work: float) -> None:
        """The chunk was stored as so many bytes besides all that its base needs."""
        more_bytes, more_work = self._extra(number, stored_bytes, work)
        self._left_bytes += float(self.plan.extra_bytes[number]) - more_bytes
        self._left_work += float(self.plan.extra_work[number]) - more_work
        packs = self._more_packs(number)
        self._named[packs] = True
        self._left_packs -= float(self.plan.packs.n_bytes[packs].sum())
        self._has_come(number, stored_bytes)

    def is_full(self, number: int, stored_bytes: float) -> None:
        """The chunk was stored in full."""
        more = stored_bytes - float(self.plan.known.full_bytes[number])
        self._left_bytes += float(self.plan.extra_bytes[number]) + (self.plan.read_amplification - 1) * more
        self._left_work += float(self.plan.extra_work[number])
        self._has_come(number, stored_bytes)

    def _has_come(self, number: int, stored_bytes: float) -> None:
        known = self.plan.known
        self._left_packs += float(self.plan.own_bytes[number]) - stored_bytes
        if known.is_guess[number] and known.may_differ[number]:
            self._waiting[known.role[number]] -= known.full_bytes[number]
