"""The copies of chunks that lie on devices: the sources of their bytes, and the side streams that copy them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from fastckpt.snapshot.fingerprints import SaveFingerprints
from fastckpt.snapshot.progress import Copy, Stage
from fastckpt.snapshot.side_stream import SideStream, joined, wait_for
from fastckpt.state import Captured

MAX_CLONED_BYTES = 64 << 20
"""Limit of a device's memory for clones of tensors that may change at any time: statistics, averages, generators, learning rates."""
_BATCH_BYTES = (
    16 << 20
)  # one event for this many bytes: the encoder can begin early, and 80 GB need only some 5,000 events


class DeviceCopies:
    """See the module. Used under the snapshot's lock, except for the waits."""

    def __init__(
        self, captured: Captured, copies: Iterable[Copy], side_of: Callable[[torch.device], SideStream]
    ) -> None:
        """copies: of all chunks; copies of host memory are ignored. side_of: gives the side stream of a device, the same one each time."""
        self._captured = captured
        self._copies = [copy for copy in copies if copy.device is not None]
        self._sides = {copy.device: side_of(copy.device) for copy in self._copies if copy.device is not None}
        self._sources: dict[int, list[torch.Tensor]] = {}
        """Number of a chunk → tensors of its bytes on their device, until its copy is given out."""
        self._cloned: set[int] = set()
        """Numbers of chunks whose source is a clone, which nobody else changes."""
        self._cloned_bytes = 0
        self._unmarked: list[Copy] = []
        self._unmarked_bytes = 0
        self._held_back: set[tuple[torch.device, int]] = set()
        """Streams that wait for all copies, by device and number."""
        self.may_be_resized = False
        """True: the state belongs to the caller again, so its storages may get other memory before the last copies are given out."""

    @property
    def one(self) -> torch.device | None:
        """One of the devices; None if there are none."""
        return next(iter(self._sides), None)

    # -- where the bytes come from -------------------------------------------------------------------------------------

    def find_sources(self) -> None:
        """Make the tensors to copy from, before any stream reads the state: making one may count as a write to its storage."""
        for copy in self._copies:
            self._sources[copy.number] = self._source(copy)

    def _source(self, copy: Copy) -> list[torch.Tensor]:
        """The pieces of a chunk on their device: contiguous tensors of one element type."""
        pieces = copy.chunk.pieces
        if len(pieces) > 1:  # whole storages need no slicing
            found = [self._captured.whole(piece.storage) for piece in pieces]
            tensors = [tensor for tensor in found if tensor is not None]
            if len(tensors) == len(pieces) and len({tensor.dtype for tensor in tensors}) == 1:
                return tensors
        return [self._captured.device_bytes(piece.storage, piece.offset, piece.n_bytes) for piece in pieces]

    def clone(self, chunks: Iterable[Copy]) -> bool:
        """Clone chunks on their device, if they are small. False: they are too large, or the device has no memory for it."""
        copies = [copy for copy in chunks if copy.device is not None]
        n_bytes = sum(copy.n_bytes for copy in copies)
        if self._cloned_bytes + n_bytes > MAX_CLONED_BYTES:
            return False
        try:
            clones = [joined(self._sources[copy.number]) for copy in copies]
        except torch.OutOfMemoryError:
            return False
        for copy, clone in zip(copies, clones, strict=True):
            self._sources[copy.number] = [clone]
            self._cloned.add(copy.number)
        self._cloned_bytes += n_bytes
        return True

    def take_fingerprints(self, later: Iterable[Copy], fingerprints: SaveFingerprints, *, may_clone: bool) -> bool:
        """Take fingerprints of chunks that are copied later. False: a device has no memory for that.

        may_clone: clone bundles of small storages on their device instead, as their copy would do. That takes no longer than fingerprints,
        and nobody can change the clones.
        """
        to_look_at: dict[torch.device, dict[int, list[torch.Tensor]]] = {device: {} for device in self._sides}
        for copy in later:
            if copy.device is None:
                continue
            source = self._sources[copy.number]
            if not (may_clone and len(source) > 1 and self.clone([copy])):
                to_look_at[copy.device][copy.number] = source
        looked = [fingerprints.take_device(self._sides[device], chunks) for device, chunks in to_look_at.items()]
        return all(looked)

    # -- streams -------------------------------------------------------------------------------------------------------

    @property
    def sources(self) -> Mapping[int, Sequence[torch.Tensor]]:
        """Number of a chunk → tensors of its bytes on their device, of copies that were not given out."""
        return self._sources

    def side(self, device: torch.device) -> SideStream:
        """The side stream of one of the devices."""
        return self._sides[device]

    def spare(self, copy: Copy) -> None:
        """This copy will not be made."""
        self._sources.pop(copy.number, None)

    def begin(self) -> None:
        """Make all copies wait for the work that the caller's current streams have been given so far."""
        for side in self._sides.values():
            side.begin()

    def copy(self, copy: Copy, target: torch.Tensor, *, pinned: bool) -> None:
        """Give one copy to its side stream. target: host memory; pinned: whether the target is pinned, so that this does not block."""
        assert copy.device is not None
        source = self._sources.pop(copy.number)
        if self.may_be_resized and copy.number not in self._cloned:
            source = self._source(copy)
        self._sides[copy.device].copy(target, source, pinned=pinned)
        copy.stage = Stage.GIVEN_OUT
        self._unmarked.append(copy)
        self._unmarked_bytes += copy.n_bytes
        if self._unmarked_bytes >= _BATCH_BYTES:
            self.mark()

    def mark(self) -> None:
        """Record an event after the copies given out since the last mark, so that they can be waited for."""
        batch, self._unmarked, self._unmarked_bytes = self._unmarked, [], 0
        for device, side in self._sides.items():
            copies = [copy for copy in batch if copy.device == device]
            if copies:
                event = side.mark()
                for copy in copies:
                    copy.event = event
        for copy in batch:
            copy.stage = Stage.MARKED

    def hold_back(self) -> None:
        """Make the caller's current streams wait for the copies that were given out so far."""
        for side in self._sides.values():
            side.hold_back(side.mark())

    def hold_back_once(self) -> None:
        """Make the caller's current streams wait for all copies, once for each stream. The last copy must have been given out.

        Needed even if a thread has observed the end of all copies: then the host knows of it, but the device does not.
        """
        for side in self._sides.values():
            stream = torch.accelerator.current_stream(side.device)
            if (side.device, stream.stream_id) not in self._held_back:
                side.hold_back(side.mark())
                self._held_back.add((side.device, stream.stream_id))

    # -- the end -------------------------------------------------------------------------------------------------------

    @staticmethod
    def wait(copy: Copy) -> None:
        """Block this thread until a copy has ended, if it comes from a device. Raises the device's error."""
        if copy.event is not None:
            wait_for(copy.event)

    def wait_for_all(self) -> None:
        """Block this thread until all copies given out have ended. Raises a device's error."""
        for side in self._sides.values():
            wait_for(side.mark())

    def forget_sources(self) -> None:
        """Drop all references to tensors of the state."""
        self._sources.clear()
