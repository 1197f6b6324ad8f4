"""Whether anything but an optimizer's step changes the state between a save and that step: seen once, before any copy is left to it."""

from __future__ import annotations

from torch.storage import UntypedStorage

from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.snapshot.sampled import Sampled
from fastckpt.state import Captured
from fastckpt.state.chunking import Cuts


class Probation:
    """Watches what could have been left to a fence, from a save to the fence. That save is copied before it returns: a training that swaps
    its weights after every save, behind torch's back, is found out without a torn copy.

    Of host memory only: what a device holds could be compared only by waiting for it. Used by the thread that trains.
    """

    def __init__(self, captured: Captured, cuts: Cuts, fenced: FencedTensors, samples: Sampled) -> None:
        self._samples, self._fenced = samples, fenced
        fenced.keep_only(captured.addresses)
        self._chunks: list[int] = []
        self._storages: dict[int, UntypedStorage] = {}
        """By their addresses; held, so that their memory is there to be looked at."""
        for number, chunk in enumerate(cuts.chunks):
            found = {captured.addresses[piece.storage]: captured.owners[piece.storage] for piece in chunk.pieces}
            if fenced.addresses.issuperset(found) and all(isinstance(one, UntypedStorage) for one in found.values()):
                self._chunks.append(number)
                self._storages.update(found)

    def passed(self) -> bool:
        """Whether all is as it was."""
        if self._fenced.changed() is not None:
            return False
        if any(storage.data_ptr() != address for address, storage in self._storages.items()):
            return False
        return all(self._samples.is_unchanged(number) for number in self._chunks)
