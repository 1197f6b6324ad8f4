"""The slabs of one snapshot: which chunk lies where, and which slab may be used again.

If the state fits the budget, all slabs exist from the beginning and are used once. Otherwise the slabs form a *ring*: a released slab goes
back to the pool, and the next chunks take one of its size from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastckpt._types import U8
from fastckpt.snapshot.base_slabs import BaseSlabs
from fastckpt.snapshot.copy_plan import CopyPlan
from fastckpt.snapshot.pool import Slab, SlabPool
from fastckpt.snapshot.progress import Copy


class Ring:
    """See the module. All methods except `content` and `target` are called under the snapshot's lock."""

    def __init__(self, pool: SlabPool, plan: CopyPlan, slabs: Sequence[Slab], base: BaseSlabs | None = None) -> None:
        """slabs: the first ones of the plan, taken from the pool. base: gets each slab that the encoder has finished with; None: they are
        used again.
        """
        self._pool = pool
        self._slab_bytes, self._for_device = plan.layout.slab_bytes, plan.for_device
        self._slot_of = dict(zip(plan.order, plan.layout.slots, strict=True))
        self._slabs: dict[int, Slab] = dict(enumerate(slabs))
        """The slabs that exist now, by their numbers in the layout."""
        self._chunks: list[list[int]] = [[] for _ in self._slab_bytes]
        for number in plan.order:
            self._chunks[self._slot_of[number].slab].append(number)
        self._unread = [len(chunks) for chunks in self._chunks]
        """For each slab, the number of its chunks that have not been released."""
        self.is_whole = len(slabs) == len(self._slab_bytes)
        """All slabs exist from the beginning."""
        self._read_from: set[int] = set()
        """Slabs that the encoder has begun to read: they stay until it has finished with them."""
        self._base = base
        self.leaving: int | None = None
        """The slab that is being written to the disk; None if there is none."""

    def slab_of(self, copy: Copy) -> int:
        """The number of the slab that a chunk lies in."""
        return self._slot_of[copy.number].slab

    def take_slab(self, copy: Copy) -> bool:
        """Make sure that there is a slab for a chunk. False: the budget has no memory for it now."""
        slab = self.slab_of(copy)
        if slab not in self._slabs:
            taken = self._pool.take(self._slab_bytes[slab], self._for_device)
            if taken is None:
                return False
            self._slabs[slab] = taken
        return True

    def content(self, copy: Copy) -> U8:
        """A chunk's bytes. Its slab must exist, and stay."""
        slab, offset = self._slot_of[copy.number]
        return self._slabs[slab].array[offset : offset + copy.n_bytes]

    def target(self, copy: Copy) -> tuple[torch.Tensor, bool]:
        """The same bytes as a tensor, and whether they are pinned."""
        number, offset = self._slot_of[copy.number]
        slab = self._slabs[number]
        return slab.tensor[offset : offset + copy.n_bytes], slab.pinned

    def begin_reading(self, copy: Copy) -> None:
        """The encoder needs a chunk now: from now on its slab must not go to the disk."""
        self._read_from.add(self.slab_of(copy))

    def hold(self, copy: Copy) -> bool:
        """Keep the slab of a chunk until one more `release`. False: it is in no slab any more, or the slabs are used again meanwhile."""
        slab = self.slab_of(copy)
        if not self.is_whole or slab not in self._slabs:
            return False
        self._unread[slab] += 1
        return True

    def release(self, copy: Copy) -> bool:
        """The encoder has finished with a chunk. True if it has finished with the whole slab, which may be used again now."""
        slab = self.slab_of(copy)
        self._unread[slab] -= 1
        if self._unread[slab] or slab not in self._slabs:
            return False
        if self._base is None:
            self.give_back(slab)
        else:
            self._base.keep(slab, self._slabs.pop(slab))
        return True

    def skip(self, copy: Copy) -> None:
        """A chunk will not be copied. A slab that gets no chunk at all waits for another snapshot."""
        slab = self.slab_of(copy)
        self._chunks[slab].remove(copy.number)
        if self._base is not None:
            self._base.disown(copy.number)
        if self._chunks[slab] or slab not in self._slabs:
            self.release(copy)
        else:
            self.give_back(slab)

    def give_back(self, slab: int) -> None:
        """Give one slab back to the pool, by its number."""
        self._pool.give_back([self._slabs.pop(slab)])

    def farthest(self, upcoming: Copy | None) -> tuple[int, Sequence[int]] | None:
        """Of the slabs that are full and that the encoder has not begun: the one that it will need last, with the numbers of its chunks.

        upcoming: the chunk that is to be copied next; None: there is none.
        """
        filling = 0 if upcoming is None else self.slab_of(upcoming)
        full = (slab for slab in self._slabs if slab < filling and slab not in self._read_from)
        slab = max(full, default=None)
        return None if slab is None else (slab, self._chunks[slab])

    def take_out(self) -> list[Slab]:
        """Remove and return all existing slabs; the caller gives them back."""
        slabs, self._slabs = list(self._slabs.values()), {}
        return slabs
