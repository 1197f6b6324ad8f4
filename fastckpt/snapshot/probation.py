"""Finds out whether anything besides an optimizer's step changes the state between a save and that step. Tested once, before any copy
relies on it.
"""

from __future__ import annotations

from torch.storage import UntypedStorage

from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.snapshot.sampled import Sampled
from fastckpt.state import Captured
from fastckpt.state.chunking import Cuts


class Probation:
    """Watches the tensors that a fence could protect, from one save to the next fence. That save is copied completely before it returns. So
    a training that swaps its weights after every save, unseen by torch, is detected without a torn copy.

    Host memory only: comparing device memory would mean waiting for the device. Used by the thread that trains.
    """

    def __init__(self, captured: Captured, cuts: Cuts, fenced: FencedTensors, samples: Sampled) -> None:
        self._samples, self._fenced = samples, fenced
        fenced.keep_only(captured.addresses)
        self._chunks: list[int] = []
        self._storages: dict[int, UntypedStorage] = {}
        """Storages by address; held, so that their memory can still be read."""
        for number, chunk in enumerate(cuts.chunks):
            found = {captured.addresses[piece.storage]: captured.owners[piece.storage] for piece in chunk.pieces}
            if fenced.addresses.issuperset(found) and all(isinstance(one, UntypedStorage) for one in found.values()):
                self._chunks.append(number)
                self._storages.update(found)

    def passed(self) -> bool:
        """Whether everything is unchanged."""
        if self._fenced.changed() is not None:
            return False
        if any(storage.data_ptr() != address for address, storage in self._storages.items()):
            return False
        return all(self._samples.is_unchanged(number) for number in self._chunks)
