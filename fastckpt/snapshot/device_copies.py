"""The copies of chunks that lie on devices: where their bytes come from, and the side streams that copy them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fastckpt.snapshot.fingerprints import SaveFingerprints
from fastckpt.snapshot.progress import Copy, Stage
from fastckpt.snapshot.side_stream import SideStream, joined, wait_for
from fastckpt.state import Captured

MAX_CLONED_BYTES = 64 << 20
"""Of a device's memory, for what may change at any time: statistics, averages, generators, learning rates."""
_BATCH_BYTES = 16 << 20  # one event for so many bytes: the encoder begins early, and 80 GB need some 5,000 events


class DeviceCopies:
    """See the module. Under the snapshot's lock, but for the waits."""

    def __init__(
        self, captured: Captured, copies: Iterable[Copy], side_of: Callable[[torch.device], SideStream]
    ) -> None:
        """copies: of all chunks; those of host memory are passed over. side_of: gives the same side stream for one device every time."""
        self._captured = captured
        self._copies = [copy for copy in copies if copy.device is not None]
        self._sides = {copy.device: side_of(copy.device) for copy in self._copies if copy.device is not None}
        self._sources: dict[int, list[torch.Tensor]] = {}
        """By the number of a chunk, until its copy is given out: tensors of its bytes on their device."""
        self._cloned: set[int] = set()
        """Numbers of chunks whose source is memory of our own, which nobody else changes."""
        self._cloned_bytes = 0
        self._unmarked: list[Copy] = []
        self._unmarked_bytes = 0
        self._held_back: set[tuple[torch.device, int]] = set()
        """Streams that wait for all copies, by device and number."""
        self.may_be_resized = False
        """The state is the caller's again: its storages may get other memory before the last copies are given out."""

    @property
    def one(self) -> torch.device | None:
        """One of the devices; None: there are none."""
        return next(iter(self._sides), None)

    # -- where the bytes come from -------------------------------------------------------------------------------------

    def find_sources(self) -> None:
        """Make the tensors that are to be copied, before any stream reads the state: making one may count as a write to its storage."""
        for copy in self._copies:
            self._sources[copy.number] = self._source(copy)

    def _source(self, copy: Copy) -> list[torch.Tensor]:
        """The pieces of a chunk on their device: contiguous tensors of one element type."""
        pieces = copy.chunk.pieces
        if len(pieces) > 1:  # whole storages
            found = [self._captured.whole(piece.storage) for piece in pieces]
            tensors = [tensor for tensor in found if tensor is not None]
            if len(tensors) == len(pieces) and len({tensor.dtype for tensor in tensors}) == 1:
                return tensors
        return [self._captured.device_bytes(piece.storage, piece.offset, piece.n_bytes) for piece in pieces]

    def clone(self, chunks: Iterable[Copy]) -> bool:
        """Copy chunks on their device, if they are little. False: they are not, or the device has no room."""
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
        """Take down what chunks that are copied later hold now. False: a device has no room for that.

        may_clone: join bundles of small storages on their device instead, as their copy would do it. That takes no longer than looking at
        them, and nothing reaches them any more.
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

    def begin(self) -> None:
        """What the caller's current streams were given so far comes before all copies."""
        for side in self._sides.values():
            side.begin()

    def copy(self, copy: Copy, target: torch.Tensor, *, pinned: bool) -> None:
        """Give one copy to its side stream. target: host memory; pinned: whether it is, so that this does not block."""
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
        """Put an event behind the copies that were given out since the last mark: they may be waited for."""
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
        """Make the caller's current streams wait for all copies, once for each stream. The last copy has been given out.

        Needed even where a thread has seen the end of all copies: the host knows of it then, the device does not.
        """
        for side in self._sides.values():
            stream = torch.accelerator.current_stream(side.device)
            if (side.device, stream.stream_id) not in self._held_back:
                side.hold_back(side.mark())
                self._held_back.add((side.device, stream.stream_id))

    # -- the end -------------------------------------------------------------------------------------------------------

    @staticmethod
    def wait(copy: Copy) -> None:
        """Block this thread until a copy has ended, if it is a device's. Raises what the device reports."""
        if copy.event is not None:
            wait_for(copy.event)

    def wait_for_all(self) -> None:
        """Block this thread until all that was given out has ended. Raises what a device reports."""
        for side in self._sides.values():
            wait_for(side.mark())

    def forget_sources(self) -> None:
        """Keep no tensor of the state alive any more."""
        self._sources.clear()
