"""Measures, on a state's own bytes, what a save of it would store: in full, and against an older state.

    state ─→ upload, as a save does it ─→ a store that keeps nothing ─→ rows of the index ─→ sums for each group of tensors
    older state ─→ its rows and bytes as the base ──┘

Nothing is written, and nothing is estimated: these are the very decisions and the very bytes of a save. A group is a pair of element type
and role (`exp_avg`, `step`, …; parameters have none).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np

from fastckpt._types import U8, Progress
from fastckpt.format.keys import parse_pack
from fastckpt.format.records import Records
from fastckpt.format.sealed_state import ChunkSource, SealedState
from fastckpt.kernels.transform import Transform
from fastckpt.options import Options
from fastckpt.state import Captured
from fastckpt.state.chunks import storage_shapes
from fastckpt.state.sealing import seal
from fastckpt.upkeep.dry_saves import dry_base, dry_upload, for_dry_saves, rows_of
from fastckpt.writing.bases import Base, Uploaded
from fastckpt.writing.matching import match


@dataclass
class CodingResult:
    """The cost of storing a group in one way: in full, or against the older state."""

    stored_bytes: int = 0
    seconds: float = 0.0
    transforms: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Raw bytes by transform. REF: named again."""


@dataclass
class TensorGroup:
    """All tensors of one element type and role, with their measurements."""

    dtype: str
    role: str
    tensors: int = 0
    raw_bytes: int = 0
    entropy_bytes: float = 0.0
    """Order-0 entropy of the byte planes, summed over chunks: the size with an ideal coder of single bytes."""
    alone: CodingResult = field(default_factory=CodingResult)
    """The cost in a full save: copies of masters in the same state take nothing there either."""
    delta: CodingResult | None = None
    """The cost in a save that has the older state as its base. None: there is no older state."""
    based_bytes: int = 0
    """Raw bytes whose older version is known: the same name, type and size."""
    same_bytes: int = 0
    """The part of `based_bytes` in chunks that have not changed at all."""


def analyze(
    captured: Captured,
    older: Captured | Base | None = None,
    progress: Progress = lambda done, total: None,
    options: Options | None = None,
) -> list[TensorGroup]:
    """Encode everything as a full save would, and once more against an older state if there is one. Returns the groups, the largest first.

    Encodes on one thread, because speeds are given for one thread. Takes, besides the states, what an upload takes: `encoder_bytes` and
    `pack_bytes` of the options.

    Args:
        older: None measures no save against it. A Base is that of a checkpoint: what it refers to itself counts, too.
        progress: called with raw bytes done and raw bytes in all, on any thread, by one at a time.
        options: of the saves; None for the defaults. An effort that would follow the link is `normal` here.
    """
    options = for_dry_saves(options)
    sealed = seal(captured)
    passes = 1 if older is None else 2 if isinstance(older, Base) else 3
    done = _counted(progress, max(sealed.own_bytes * passes, 1))
    groups = _Groups(captured)
    alone = _Measured(sealed, done, entropies=True)
    groups.enter_alone(dry_upload(alone.state, None, options), alone)
    if older is not None:
        base = older if isinstance(older, Base) else dry_base(_Measured(seal(older), done).state, options)
        measured = _Measured(sealed, done)
        groups.enter_delta(dry_upload(measured.state, base, options), measured, base)
    progress(1, 1)
    return sorted(groups.found.values(), key=lambda group: group.raw_bytes, reverse=True)


def _counted(progress: Progress, total: int) -> Callable[[int], None]:
    """For bytes that are done with, by one thread at a time. The end is for the caller to tell."""
    done = 0

    def add(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(min(done, total - 1), total)

    return add


class _Measured:
    """A `ChunkSource` around that of a state: how long each chunk was encoded, and its entropy. For one encoding thread."""

    def __init__(self, sealed: SealedState, done: Callable[[int], None], *, entropies: bool = False) -> None:
        self._inner: ChunkSource = sealed.source
        self._chunks, self._done, self._entropies = sealed.chunks, done, entropies
        self.seconds = np.zeros(len(sealed.chunks))
        self.entropy_bytes = np.zeros(len(sealed.chunks))
        self.state = replace(sealed, source=self)

    @property
    def any_order(self) -> bool:
        return self._inner.any_order

    def known(self, number: int) -> bytes | None:
        return None

    def peek(self, number: int, scratch: U8) -> AbstractContextManager[U8 | None]:
        return nullcontext(self._inner.raw(number, scratch))

    def raw(self, number: int, scratch: U8) -> U8:
        raw = self._inner.raw(number, scratch)
        if self._entropies:
            self.entropy_bytes[number] = _entropy_bytes(raw, self._chunks[number].element.float_lane_bytes)
        self.seconds[number] = -time.perf_counter()
        return raw

    def release(self, number: int) -> None:
        self.seconds[number] += time.perf_counter()
        self._inner.release(number)
        self._done(self._chunks[number].n_bytes)

    def confirm(self) -> None:
        self._inner.confirm()

    def close(self) -> None:
        """Does nothing: the state is its owner's."""


class _Groups:
    """Sorts what two uploads have placed by groups."""

    def __init__(self, captured: Captured) -> None:
        shapes = storage_shapes(captured)
        self._of_storage = [(shape.element.name, shape.role) for shape in shapes]
        self.found: dict[tuple[str, str], TensorGroup] = {}
        for (dtype, role), storage in zip(self._of_storage, captured.storages, strict=True):
            if storage.has_data and storage.n_bytes:
                self.found.setdefault((dtype, role), TensorGroup(dtype, role))
        for tensor in captured.tensors:
            group = self.found.get(self._of_storage[tensor.storage])
            if group is not None:
                group.tensors += 1

    def enter_alone(self, uploaded: Uploaded, measured: _Measured) -> None:
        state = measured.state
        groups = self._of_chunks(state)
        for number, group in enumerate(groups):
            group.raw_bytes += state.chunks[number].n_bytes
            group.entropy_bytes += float(measured.entropy_bytes[number])
        self._enter(uploaded, measured, lambda group: group.alone)

    def enter_delta(self, uploaded: Uploaded, measured: _Measured, base: Base) -> None:
        for group in self.found.values():
            group.delta = CodingResult()
        self._enter(uploaded, measured, _delta_of)
        state, theirs = measured.state, match(base, measured.state).tolist()
        for number, group in enumerate(self._of_chunks(state)):
            if theirs[number] >= 0:
                group.based_bytes += state.chunks[number].n_bytes
                if _is_same(uploaded, number, base, theirs[number], state.chunks[number].n_bytes):
                    group.same_bytes += state.chunks[number].n_bytes

    def _of_chunks(self, state: SealedState) -> list[TensorGroup]:
        """The group of each chunk; pieces of a bundle are of one."""
        found: dict[int, TensorGroup] = {}
        ends = np.cumsum([chunk.n_bytes for chunk in state.chunks])
        for number, storage in enumerate(state.storages):
            for row in rows_of(storage.extents or (), ends):
                found[row] = self.found[self._of_storage[number]]
        return [found[number] for number in range(len(state.chunks))]

    def _enter(self, uploaded: Uploaded, measured: _Measured, result: Callable[[TensorGroup], CodingResult]) -> None:
        for seconds, group in zip(measured.seconds.tolist(), self._of_chunks(measured.state), strict=True):
            result(group).seconds += seconds
        vote, rows = uploaded.vote, uploaded.records
        own = [False, *(parse_pack(file.key) == vote.name.save for file in vote.files)]
        ends = np.cumsum(rows["raw_bytes"], dtype=np.int64)
        counted: set[tuple[int, int]] = set()
        seen: set[int] = set()
        for number, storage in enumerate(vote.directory.storages):
            into = result(self.found[self._of_storage[number]]) if storage.extents else None
            for row in rows_of(storage.extents or (), ends):
                if into is None or row in seen:
                    continue
                seen.add(row)
                place = int(rows["file"][row]), int(rows["offset"][row])
                into.transforms[_words(rows, row, own[place[0]])] += int(rows["raw_bytes"][row])
                if own[place[0]] and place not in counted:
                    counted.add(place)
                    into.stored_bytes += int(rows["stored_bytes"][row])


def _delta_of(group: TensorGroup) -> CodingResult:
    assert group.delta is not None
    return group.delta


def _is_same(uploaded: Uploaded, number: int, base: Base, theirs: int, n_bytes: int) -> bool:
    """Whether a chunk has the digest that the base's has; only where both are whole rows."""
    places = (uploaded.rows[number], uploaded.records), (base.places[theirs], base.records)
    digests = set()
    for place, rows in places:
        if place is None or place.start or int(rows["raw_bytes"][place.row]) != n_bytes:
            return False
        digests.add(rows["digest"][place.row].tobytes())
    return len(digests) == 1


def _words(rows: Records, row: int, is_own: bool) -> str:
    if rows["file"][row] and not is_own:
        return "REF"
    transform = Transform(int(rows["transform"][row]))
    return f"SUBPACK {int(rows['pack_bits'][row])}" if transform is Transform.SUBPACK else transform.name


def _entropy_bytes(raw: U8, lane_bytes: int) -> float:
    planes = raw.reshape(-1, lane_bytes or 1)
    if lane_bytes:
        x = raw.view(f"<u{lane_bytes}")
        rotated = (x << x.dtype.type(1)) | (x >> x.dtype.type(8 * lane_bytes - 1))
        planes = rotated.view(np.uint8).reshape(-1, lane_bytes)
    total = 0.0
    for k in range(planes.shape[1]):
        counts = np.bincount(planes[:, k], minlength=256)
        counts = counts[counts > 0]
        total += len(planes) * np.log2(len(planes)) - float((counts * np.log2(counts)).sum())
    return total / 8


__all__ = ["Base", "CodingResult", "TensorGroup", "analyze"]
