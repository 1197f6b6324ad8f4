"""The bytes of a snapshot after its save: its slabs stay as they are, until a newer save has them or somebody needs their memory.

    Ring ─ keep(slab) ─→ BaseSlabs ─ lend(chunk) ─→ encoder of the next save
                            └─ its slabs on the pool's Shelf ─→ free memory: dropped by its owner, or evicted by who needs memory

A slab comes here when the encoder has finished with all of its chunks. From then on it is memory that the pool may give away at any time,
except while a chunk of it is lent. Whether the bytes are those of a committed checkpoint is for the owner to know: see `BaseSlabs.drop`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

from fastckpt._types import U8
from fastckpt.snapshot.slab import Slab
from fastckpt.snapshot.slots import Slot
from fastckpt.state.chunking import Chunk


class BaseSlabs:
    """See the module; a `writing.bases.BaseBytes`. Any thread. All but the places belongs to the shelf, and is used under its lock."""

    def __init__(self, shelf: Shelf, places: dict[int, Slot], chunks: Sequence[Chunk]) -> None:
        """places: of chunks in slabs, by number. chunks: all of them."""
        self._shelf, self._places = shelf, places
        self._chunk_bytes = [chunk.n_bytes for chunk in chunks]
        self.roles = [chunk.role for chunk in chunks]
        self.slabs: dict[int, Slab] = {}
        """Those that are still kept, by their numbers in the snapshot's layout, in the order in which they give way."""
        self.leases: Counter[int] = Counter()
        """How many chunks of each slab are lent now."""
        self.is_dropped = False
        """Slabs that come now, or whose last lease ends, are free memory."""
        self.spent: set[int] = set()
        """Those of `slabs` that are not needed any more, unless the save under way fails: it has encoded what lies there."""
        self.evicted_bytes = 0
        """Of slabs that the pool has given away, though a save might have needed them."""

    def keep(self, number: int, slab: Slab) -> None:
        """Take over a slab of the snapshot. Ignored if it is not in use."""
        self._shelf.keep(self, number, slab)

    def disown(self, chunk: int) -> None:
        """Never lend this chunk: its place has not what the base has. Before anybody lends from this object."""
        self._places.pop(chunk, None)

    def drop(self) -> None:
        """Nobody needs the bytes any more: the memory waits for the next snapshot. May be called twice."""
        self._shelf.drop(self)

    def sort(self, worth: Callable[[str], float]) -> None:
        """From now on, slabs whose bytes are worth least give way first. worth: of a byte of a chunk with this role."""
        of_role = {role: worth(role) for role in set(self.roles)}
        sums, n_bytes = defaultdict[int, float](float), Counter[int]()
        for chunk, place in self._places.items():
            sums[place.slab] += of_role[self.roles[chunk]] * self._chunk_bytes[chunk]
            n_bytes[place.slab] += self._chunk_bytes[chunk]
        self._shelf.sort(self, lambda slab: sums[slab] / max(n_bytes[slab], 1))

    @contextlib.contextmanager
    def lend(self, chunk: int) -> Iterator[U8 | None]:
        """Context with a chunk's bytes, which stay as they are until it ends. None: they are not kept, or not any more.

        A snapshot that needs the memory waits for the end of this context: it must be short, and must not wait for a copy or a store.
        """
        place = self._places.get(chunk)
        slab = None if place is None else self._shelf.lease(self, place.slab)
        if place is None or slab is None:
            yield None
            return
        try:
            yield slab.array[place.offset : place.offset + self._chunk_bytes[chunk]]
        finally:
            self._shelf.end_lease(self, place.slab)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the slabs that are kept now."""
        return sum(slab.n_bytes for slab in list(self.slabs.values()))


class Shelf:
    """The bases that have slabs in one pool, oldest first, under the pool's lock. What begins with `evict` is for the pool, which holds
    it; all else for any thread.
    """

    def __init__(
        self, lock: threading.Condition, leave: Callable[[Slab], bool], set_free: Callable[[Slab], None]
    ) -> None:
        """lock: notified when a lease ends. leave: takes a slab away from its snapshot; False: it has none. set_free: what becomes of slabs
        that no base needs. Both are called under the lock.
        """
        self._lock, self._leave, self._set_free = lock, leave, set_free
        self._bases: list[BaseSlabs] = []
        self.n_bytes = 0
        """Of all slabs."""

    def keep(self, base: BaseSlabs, number: int, slab: Slab) -> None:
        """A snapshot has finished with a slab: from now on it is a base's, or free if that was dropped."""
        with self._lock:
            if not self._leave(slab):
                return
            if base.is_dropped:
                self._set_free(slab)
                return
            base.slabs[number] = slab
            self.n_bytes += slab.n_bytes
            if base not in self._bases:
                self._bases.append(base)
            for older in self._bases[: self._bases.index(base)]:
                if number in older.slabs:
                    older.spent.add(number)

    def drop(self, base: BaseSlabs) -> None:
        """A base's slabs are free memory, those that are lent as soon as they are not."""
        with self._lock:
            base.is_dropped = True
            for number in list(base.slabs):
                if not base.leases[number]:
                    self._set_free(self._remove(base, number))
            for older in self._bases:  # the save that had encoded what lies there will not be a base
                older.spent.clear()

    def sort(self, base: BaseSlabs, worth: Callable[[int], float]) -> None:
        """A base's slabs give way in the order of their worth; those of equal worth as before."""
        with self._lock:
            base.slabs = dict(sorted(base.slabs.items(), key=lambda item: worth(item[0])))

    def lease(self, base: BaseSlabs, number: int) -> Slab | None:
        """A slab of a base, which keeps its bytes until `end_lease`. None: the base has it no more."""
        with self._lock:
            slab = None if base.is_dropped else base.slabs.get(number)
            if slab is not None:
                base.leases[number] += 1
            return slab

    def end_lease(self, base: BaseSlabs, number: int) -> None:
        """The bytes of a slab may change again."""
        with self._lock:
            base.leases[number] -= 1
            if base.is_dropped and not base.leases[number]:
                self._set_free(self._remove(base, number))
            self._lock.notify_all()

    def evict(self, n_bytes: int, for_device: bool, *, only_spent: bool = False) -> Slab | None:
        """Take a slab of this size from a base, the oldest one first. None: there is none that nobody reads."""
        for base in self._bases:
            for number in base.spent if only_spent else base.slabs:
                slab = base.slabs[number]
                if (slab.n_bytes, slab.for_device) == (n_bytes, for_device) and not base.leases[number]:
                    return self._evicted(base, number)
        return None

    def evict_any(self) -> Slab | None:
        """Take any slab from a base. None: there is none that nobody reads."""
        for base in self._bases:
            for number in base.slabs:
                if not base.leases[number]:
                    return self._evicted(base, number)
        return None

    def _evicted(self, base: BaseSlabs, number: int) -> Slab:
        if number not in base.spent:
            base.evicted_bytes += base.slabs[number].n_bytes
        return self._remove(base, number)

    def _remove(self, base: BaseSlabs, number: int) -> Slab:
        slab = base.slabs.pop(number)
        base.spent.discard(number)
        self.n_bytes -= slab.n_bytes
        if not base.slabs:
            self._bases.remove(base)
        return slab


__all__ = ["BaseSlabs", "Shelf"]
