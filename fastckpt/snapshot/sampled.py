"""A sample of a state in host memory: one cache line of each 4 KiB, chosen anew by every save; stretches smaller than 64 KiB as a whole.

It shows when whole tensors are replaced, for a fortieth of the time that reading everything takes. A change of a few elements in a large
tensor may be missed (docs/guarantees.md, section 5).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastckpt._types import U8, U64
from fastckpt.format.digest import digest
from fastckpt.format.directory import TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.host.pages import fresh_pages
from fastckpt.kernels import WHOLE_BELOW, kernels, lines_bytes
from fastckpt.state import Captured
from fastckpt.state.chunking import Chunk, Cuts

_random = random.Random()  # of our own: drawing from the global one would change the numbers that training draws
_OWN_PAGES_BYTES = 64 << 10  # larger buffers of a thread stay in the C library's arenas after the thread has ended


class _Stretches(NamedTuple):
    """The sampled stretches of a chunk: lists of the same length."""

    storages: npt.NDArray[np.intp]
    in_storage: U64
    in_chunk: U64
    lengths: U64
    n_bytes: int
    """Bytes of the sample."""


class SamplePlan:
    """The stretches of memory by which each chunk of a state is sampled; the same for all states of one form. Pure."""

    def __init__(self, captured: Captured, cuts: Cuts, leave_out: Collection[str] = ()) -> None:
        """leave_out: names of the state's parts that are not sampled."""
        self._chunks = cuts.chunks
        self._on_host = [storage.device is None for storage in captured.storages]
        self._left_out = {entry.storage for entry in captured.tensors if entry.name and entry.name[0] in leave_out}
        self._small = _small_tensors(captured)
        self._known: dict[int, _Stretches | None] = {}

    def of(self, number: int) -> _Stretches | None:
        """The stretches of one chunk. None if it is not sampled: it lies on a device, or is left out."""
        if number not in self._known:
            self._known[number] = self._stretches(self._chunks[number])
        return self._known[number]

    def __iter__(self) -> Iterator[int]:
        """The chunks that are sampled."""
        return (number for number in range(len(self._chunks)) if self.of(number) is not None)

    def _stretches(self, chunk: Chunk) -> _Stretches | None:
        # Lists of numbers instead of tuples: Python's cycle collector walks all tuples, and a state may have 100,000 storages.
        storages: list[int] = []
        in_storage: list[int] = []
        in_chunk: list[int] = []
        lengths: list[int] = []
        at = 0
        for number, offset, n_bytes in chunk.pieces:
            if self._on_host[number] and number not in self._left_out:
                for first, end in ((offset, offset + n_bytes), *self._small.get(number, ())):
                    start, stop = max(first, offset), min(end, offset + n_bytes)
                    if start < stop:
                        storages.append(number)
                        in_storage.append(start)
                        in_chunk.append(at + start - offset)
                        lengths.append(stop - start)
            at += n_bytes
        if not storages:
            return None
        n = np.array(lengths, np.uint64)
        return _Stretches(
            np.array(storages, np.intp),
            np.array(in_storage, np.uint64),
            np.array(in_chunk, np.uint64),
            n,
            lines_bytes(n),
        )


def _small_tensors(captured: Captured) -> dict[int, list[tuple[int, int]]]:
    """Tensors under 64 KiB inside larger storages: first bytes and ends, by storage, with overlaps joined."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for entry in captured.tensors:
        if captured.storages[entry.storage].n_bytes >= WHOLE_BELOW and (span := _span(entry)) is not None:
            found[entry.storage].append(span)
    return {number: list(_parts(_joined(spans))) for number, spans in found.items()}


def _span(entry: TensorEntry) -> tuple[int, int] | None:
    """First byte and end of a tensor in its storage; None if it is empty, or has 64 KiB or more."""
    element = element_type(entry.dtype)
    if element is None or 0 in entry.shape:
        return None
    n_elements = 1 + sum((size - 1) * stride for size, stride in zip(entry.shape, entry.stride, strict=True))
    n_bytes = n_elements * element.n_bytes
    start = entry.offset * element.n_bytes
    return (start, start + n_bytes) if 0 < n_bytes < WHOLE_BELOW else None


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Sort spans and join those that overlap or touch: a million views of one buffer are sampled once."""
    start = stop = -1
    for first, end in sorted(spans):
        if first > stop:
            if stop > start:
                yield start, stop
            start, stop = first, end
        stop = max(stop, end)
    if stop > start:
        yield start, stop


def _parts(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cut spans so short that each is sampled as a whole."""
    step = WHOLE_BELOW // 2
    for start, stop in spans:
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


class Sampler:
    """Samples the states of a run; keeps the plan for the current form. Used by the training thread."""

    def __init__(self, leave_out: Collection[str] = ()) -> None:
        """leave_out: see `SamplePlan`."""
        self._leave_out = leave_out
        self._form: object = None
        self._cuts = Cuts([], {})
        self._plan = SamplePlan(Captured(b""), self._cuts)

    def take(self, captured: Captured, cuts: Cuts, seed: int | None = None) -> Sampled:
        """Sample all of a state that lies in host memory, as it is now. seed: see `Sampled`."""
        if (
            captured.form is not self._form or cuts is not self._cuts
        ):  # of one form, ranks may come to share it otherwise
            self._plan = SamplePlan(captured, cuts, self._leave_out)
            self._form, self._cuts = captured.form, cuts
        sampled = Sampled(captured, self._plan, seed)
        for number in self._plan:
            sampled.take(number)
        return sampled


class Sampled:
    """HostPrints of samples: the chunks of one state at one moment. One thread calls `take`, any thread `is_copy`."""

    def __init__(self, captured: Captured, plan: SamplePlan, seed: int | None = None) -> None:
        """seed: decides which lines are sampled; None: a random one."""
        self.seed = _random.getrandbits(64) if seed is None else seed
        self._plan = plan
        self._addresses = np.array(captured.addresses, np.uint64)
        self.digests: dict[int, bytes] = {}
        """Number of a chunk → digest of its sample."""

    def take(self, number: int) -> None:
        """Sample one chunk in the live state, unless that was done before."""
        stretches = self._plan.of(number)
        if stretches is not None and number not in self.digests:
            at = self._addresses[stretches.storages] + stretches.in_storage
            self.digests[number] = self._digest(number, stretches, at)

    def is_unchanged(self, number: int) -> bool:
        """Whether a chunk's sample is unchanged in the live state, whose memory must still exist. Also True if none was taken."""
        stretches = self._plan.of(number)
        if stretches is None or number not in self.digests:
            return True
        at = self._addresses[stretches.storages] + stretches.in_storage
        return self._digest(number, stretches, at) == self.digests[number]

    def is_copy(self, number: int, content: U8) -> bool:
        """Whether a chunk's copy has the same sample. Also True if none was taken."""
        stretches = self._plan.of(number)
        if stretches is None or number not in self.digests:
            return True
        at = stretches.in_chunk + np.uint64(content.ctypes.data)
        return self._digest(number, stretches, at) == self.digests[number]

    def _digest(self, number: int, stretches: _Stretches, at: U64) -> bytes:
        n_bytes = stretches.n_bytes
        out = fresh_pages(n_bytes) if n_bytes > _OWN_PAGES_BYTES else np.empty(n_bytes, np.uint8)
        kernels().lines(at, stretches.lengths, (self.seed + (number << 20)) & (1 << 64) - 1, out)
        return digest(out)
