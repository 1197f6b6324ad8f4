"""Chunks of device memory that still have the bytes of the base: found by fingerprints, and never copied to the host.

    save() ─ enqueue fingerprints on the side stream, then the copies of all other chunks ─→ returns
    a thread ─ wait for the fingerprints' event ─→ equal to the base's: spared; others: their copies are given out

The fingerprints (csrc/cuda/fingerprint.cuh) are computed in stream order at the call of save. Chunks that the fence protects are copied
later as they are. For the others, which may change at once, the compute stream waits for the fingerprints, and a copy that is made later
has to have the fingerprint of the call; otherwise it is torn. Any failure here means that all chunks are copied.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastckpt._types import U8, U64
from fastckpt.events import logger
from fastckpt.host.torch_names import version_of
from fastckpt.kernels.fingerprint import fingerprint
from fastckpt.snapshot.candidates import Flags, History, get_fingerprint, wait_for_theirs
from fastckpt.snapshot.copy_plan import is_fenced
from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.snapshot.fingerprint_op import fingerprints
from fastckpt.snapshot.side_stream import SideStream, bytes_of, joined, wait_for
from fastckpt.state import Captured
from fastckpt.state.chunking import Chunk

_KEYS = (secrets.randbits(63), secrets.randbits(63))
"""Of this process: no content can have been made for them."""
_JOINED_BYTES = 32 << 20
"""Limit of a device's memory for bundles of small storages, which are joined for their fingerprint."""


@dataclass(frozen=True)
class ChunkPrints:
    """The fingerprints of one snapshot's chunks, and what the next save needs besides. The owner of the base keeps them with it."""

    form: object
    """`Captured.form`: a state of another form has other chunks."""
    fingerprints: Mapping[int, tuple[int, int]]
    """By the number of a chunk."""
    versions: Mapping[int, tuple[int, int]]
    """By the number of a storage: its address, and how often torch had counted a write."""
    history: History

    def only(self, chunks: Collection[int]) -> ChunkPrints:
        """The same without the fingerprints of other chunks."""
        kept = {number: found for number, found in self.fingerprints.items() if number in chunks}
        return replace(self, fingerprints=kept)


@dataclass(frozen=True)
class KnownPrints:
    """The base of a snapshot."""

    prints: ChunkPrints
    digests: Sequence[bytes | None]
    """For each chunk, the digest of the base's row that has exactly its bytes; None: there is no such row, so it must be copied."""


class Unchanged:
    """See the module. Of one snapshot. Used under its lock, except `wait` and `is_copy`."""

    def __init__(
        self,
        captured: Captured,
        chunks: Sequence[Chunk],
        fenced: FencedTensors | None,
        known: KnownPrints | None,
        pending: Sequence[Unchanged] = (),
    ) -> None:
        """chunks: all of the state. fenced: None: everything is. known: of the base, if there is one. pending: of saves that may become the
        base before this one is written: only what is equal in all of them is spared.
        """
        if known is not None and (known.prints.form is not captured.form or len(known.digests) != len(chunks)):
            known = None
        self._known, self.form = known, captured.form
        history = History.none(len(chunks)) if known is None else known.prints.history
        n_pending = [one.n_saves + 1 for one in pending if one.form is captured.form]
        self._history = history._replace(n_saves=max(history.n_saves, *n_pending, 0))
        self._versions = _versions(captured)
        on_device = np.array([captured.storages[chunk.pieces[0].storage].device is not None for chunk in chunks], bool)
        self._unwritten = _unwritten(chunks, self._versions, {} if known is None else known.prints.versions)
        has_known = np.zeros(len(chunks), bool)
        if known is not None:
            with_digest = [n for n in known.prints.fingerprints if known.digests[n] is not None]
            has_known[with_digest] = True
        behind = np.array([fenced is None or is_fenced(captured, chunk, fenced) for chunk in chunks], bool)
        self._wanted = on_device & get_fingerprint(self._history, self._unwritten)
        waiting = self._wanted & wait_for_theirs(self._history, self._unwritten, behind, has_known)
        self.waiting = {int(n) for n in np.flatnonzero(waiting)}
        """Numbers of the chunks that are not copied before their fingerprint is known."""
        self._may_change = {int(n) for n in np.flatnonzero(waiting & ~behind)}
        self._pending = pending if self.waiting else ()
        self._parts: list[_Part] = []
        self._found: dict[int, tuple[int, int]] = {}
        self.spared: set[int] = set()
        """Numbers of the chunks that have the base's bytes, and are not copied."""

    @property
    def n_saves(self) -> int:
        """Saves of this form before this one, as far as they have not failed."""
        return self._history.n_saves

    def take(
        self, side_of: Callable[[torch.device], SideStream], sources: Mapping[int, Sequence[torch.Tensor]]
    ) -> bool:
        """Enqueue the fingerprints on side streams that have begun, and their way to the host. Never raises for want of them.

        sources: the pieces of each chunk on its device. True: the compute stream has to wait for the fingerprints, because what they read
        may change at once.
        """
        by_device: dict[torch.device, dict[int, Sequence[torch.Tensor]]] = {}
        for number in map(int, np.flatnonzero(self._wanted)):
            pieces = sources[number]
            by_device.setdefault(pieces[0].device, {})[number] = pieces
        try:
            self._parts = [_Part(side_of(device), some) for device, some in by_device.items()]
        except Exception as error:
            logger.warning(
                "no fingerprints of this snapshot's chunks, all of which are copied (%s: %s)",
                type(error).__name__,
                str(error).partition("\n")[0],
            )
            self._parts, self.waiting, self._may_change = [], set(), set()
            return bool(by_device)  # some may have been enqueued
        return bool(self._may_change)

    def wait(self, is_over: Callable[[], bool]) -> set[int] | None:
        """Wait for the fingerprints on their way. Numbers of the waiting chunks that have the base's bytes; None: `is_over` was true.
        The device's error.
        """
        equal = self.waiting
        for one in (self, *self._pending):
            found = one.fetch(is_over)
            if found is None:
                return None
            equal = self._equal(equal, found if one.form is self.form else {})
        self._pending = ()  # they may have others before them
        return equal

    def fetch(self, is_over: Callable[[], bool] = lambda: False) -> dict[int, tuple[int, int]] | None:
        """The fingerprints of this snapshot's chunks, once they are there. None: `is_over` was true before that. The device's error."""
        for part in self._parts:
            if not wait_for(part.event, is_over):
                return None
            self._found.update(part.read())
        return self._found

    def settle(self, unchanged: set[int]) -> None:
        """It is known which of the waiting chunks have the base's bytes."""
        self.spared, self.waiting = unchanged, set()

    def _equal(self, numbers: Iterable[int], found: Mapping[int, tuple[int, int]]) -> set[int]:
        known = {} if self._known is None else self._known.prints.fingerprints
        return {number for number in numbers if number in found and found[number] == known.get(number)}

    def digest(self, number: int) -> bytes | None:
        """The digest of a chunk's bytes, if it was spared."""
        assert self._known is not None or number not in self.spared
        return self._known.digests[number] if self._known is not None and number in self.spared else None

    def is_copy(self, number: int, content: U8) -> bool:
        """Whether a copy that was made late has the bytes of the call of save. Also True for chunks that cannot change before the fence."""
        if number not in self._may_change:
            return True
        out: U64 = np.empty(2, np.uint64)
        fingerprint(content, np.array(_KEYS, np.uint64), out)
        return tuple(out.view(np.int64).tolist()) == self._found[number]

    def prints(self) -> ChunkPrints:
        """What the next save is to know once this one is durable. All copies have ended. The device's error."""
        self.fetch()
        known = {} if self._known is None else self._known.prints.fingerprints
        compared, unchanged = np.zeros((2, self._wanted.size), bool)
        compared[sorted(self._found.keys() & known.keys())] = True
        unchanged[sorted(self._equal(self._found, self._found))] = True
        return ChunkPrints(
            self.form, self._found, self._versions, self._history.after(self._unwritten, compared, unchanged)
        )


class _Part:
    """The fingerprints of chunks on one device."""

    def __init__(self, side: SideStream, sources: Mapping[int, Sequence[torch.Tensor]]) -> None:
        """Enqueues all on the side stream. torch.OutOfMemoryError; RuntimeError."""
        self._numbers = list(sources)
        with side.stream:
            for pieces in sources.values():
                for piece in pieces:
                    piece.record_stream(side.stream)
            self._rows = torch.cat([fingerprints(some, _KEYS) for some in _batches(sources.values())])
        try:
            self._fetched = torch.empty(self._rows.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        except RuntimeError:  # pinning failed; SlabPool reports it
            self._fetched = torch.empty(self._rows.shape, dtype=torch.int64, device="cpu")
        side.copy(bytes_of(self._fetched), [self._rows], pinned=self._fetched.is_pinned())
        self.event = side.mark()

    def read(self) -> dict[int, tuple[int, int]]:
        """By the number of a chunk. The event has happened."""
        return {number: (a, b) for number, (a, b) in zip(self._numbers, self._fetched.tolist(), strict=True)}


def _batches(sources: Iterable[Sequence[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """The bytes of each chunk, in batches whose bundles take little memory."""
    batch: list[torch.Tensor] = []
    joined_bytes = 0
    for pieces in sources:
        if len(pieces) == 1:
            batch.append(bytes_of(pieces[0]))
            continue
        batch.append(joined(pieces))
        joined_bytes += batch[-1].numel()
        if joined_bytes >= _JOINED_BYTES:
            yield batch
            batch, joined_bytes = [], 0
    if batch:
        yield batch


def _versions(captured: Captured) -> dict[int, tuple[int, int]]:
    """Of the storages on devices of which a tensor is known."""
    found: dict[int, tuple[int, int]] = {}
    for number, storage in enumerate(captured.storages):
        tensor = None if storage.device is None else captured.whole(number)
        if tensor is not None and not tensor.is_inference():
            found[number] = captured.addresses[number], version_of(tensor)
    return found


def _unwritten(
    chunks: Sequence[Chunk], now: Mapping[int, tuple[int, int]], then: Mapping[int, tuple[int, int]]
) -> Flags:
    """For each chunk, whether torch has counted no write to any of its storages."""
    same = {number for number, version in now.items() if then.get(number) == version}
    return np.array([all(piece.storage in same for piece in chunk.pieces) for chunk in chunks], bool)
