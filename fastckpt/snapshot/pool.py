"""Slabs of host memory for snapshots, within one budget, used again from save to save.

Allocating fresh pages costs as much as the copy into them, and pinning them costs more; so a slab is made once and kept. Each slab counts
with all bytes that it really occupies: torch's pinned allocator rounds up to powers of two, and so do we.

    in use (a snapshot) ──→ of a base (base_slabs.py) ──→ free ──→ in use
                     └──────────────────────────────────────┘

A base's slabs count in the budget, and give way first: whoever takes memory gets it as if there were no base. The pool's lock comes last:
nobody who holds it takes another one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from fastckpt.events import logger
from fastckpt.host.deadline import Deadline
from fastckpt.host.pages import fresh_pages
from fastckpt.snapshot.base_slabs import Shelf
from fastckpt.snapshot.slab import Slab

LEASE_LIMIT_S = 5.0
"""An encoder has a chunk of a base for some milliseconds. If it has it for so long, the save that waits for the memory is deferred."""


def _nothing() -> None:
    """torch before 2.10 has no generic call for this."""


empty_host_cache: Callable[[], None] = getattr(torch.accelerator, "empty_host_cache", _nothing)


def pageable(n_bytes: int) -> torch.Tensor:
    """Host memory that is not pinned. MemoryError."""
    return torch.from_numpy(fresh_pages(n_bytes))


def _pinned(n_bytes: int) -> torch.Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class SlabPool:
    """See the module. Any thread."""

    def __init__(self, budget_bytes: int, allocate_pinned: Callable[[int], torch.Tensor] = _pinned) -> None:
        self.budget_bytes = budget_bytes
        self._allocate_pinned = allocate_pinned
        self._lock = threading.Condition()  # reentrant
        """Notified when a lease ends."""
        self._in_use: set[Slab] = set()
        self._in_use_bytes = 0
        """Kept as a counter instead of a sum: a snapshot of 80 GB takes 1,300 slabs, and each request asks for it."""
        self._reserved_bytes = 0
        """Bytes of slabs that are being made."""
        self._free: dict[tuple[int, bool], list[Slab]] = {}
        self._free_bytes = 0
        self.bases = Shelf(self._lock, self._leave, self._set_free)
        self.unpinned_bytes = 0
        """Bytes that should have been pinned and could not be: copies into them block the device's stream. A warning tells this once."""

    @property
    def used_bytes(self) -> int:
        """Bytes that snapshots hold now."""
        with self._lock:
            return self._reserved_bytes + self._in_use_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that snapshots hold, those of bases, and those that wait for the next snapshot."""
        with self._lock:
            return self.used_bytes + self._free_bytes + self.bases.n_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that wait for the next snapshot."""
        with self._lock:
            return self._free_bytes

    def set_budget(self, budget_bytes: int) -> None:
        """Set the budget from now on. Free memory beyond it is released; memory in use stays until its snapshots end."""
        with self._lock:
            self.budget_bytes = budget_bytes
            if self.held_bytes > budget_bytes:
                self._drop_free()
            while self.held_bytes > budget_bytes and self._release_one():
                pass

    def take(self, n_bytes: int, for_device: bool, *, from_bases: bool = True) -> Slab | None:
        """A slab of exactly this size, or None if it does not fit into the budget now.

        from_bases: whether a base's slab may be taken. Waits for the end of a lease, if nothing else is left.
        """
        with self._lock:
            slab = self._again(n_bytes, for_device, from_bases=from_bases)
            if slab is not None:
                self._use(slab)
                return slab
            if not self._has_room(n_bytes):
                return None
            self._reserved_bytes += n_bytes
        try:
            slab = self._new(n_bytes, for_device)
        except BaseException:
            with self._lock:
                self._reserved_bytes -= n_bytes
            raise
        with self._lock:
            self._reserved_bytes -= n_bytes
            self._use(slab)
        return slab

    def _again(self, n_bytes: int, for_device: bool, *, from_bases: bool) -> Slab | None:
        """A slab that exists already: a free one, or one of a base if nobody needs its bytes, or if there is no other memory. Otherwise
        makes room for a new one, as far as it may.
        """
        kept = self._free.get((n_bytes, for_device))
        if kept:
            self._free_bytes -= n_bytes
            return kept.pop()
        if not from_bases:
            return None
        spent = self.bases.evict(n_bytes, for_device, only_spent=True)
        if spent is not None:
            return spent
        if self.held_bytes + n_bytes > self.budget_bytes:
            self._drop_free()
        limit = Deadline.after(LEASE_LIMIT_S, "a lease")
        while self.used_bytes + n_bytes <= self.budget_bytes < self.held_bytes + n_bytes:
            found = self.bases.evict(n_bytes, for_device)
            if found is not None:
                return found
            if not self._release_one() and not self._lock.wait(limit.left_s()):
                break
        return None

    def _has_room(self, n_bytes: int) -> bool:
        """Whether a new slab fits, once free ones have made room for it."""
        if self.held_bytes - self._free_bytes + n_bytes > self.budget_bytes:
            return False
        if self.held_bytes + n_bytes > self.budget_bytes:
            self._drop_free()
        return True

    def _use(self, slab: Slab) -> None:
        self._in_use.add(slab)
        self._in_use_bytes += slab.n_bytes

    def _leave(self, slab: Slab) -> bool:
        """False: nobody uses it."""
        if slab not in self._in_use:
            return False
        self._in_use.remove(slab)
        self._in_use_bytes -= slab.n_bytes
        return True

    def take_all(self, sizes: Sequence[int], for_device: bool) -> list[Slab] | None:
        """A slab of each size, or None if they do not all fit into the budget now."""
        if self.used_bytes + sum(sizes) > self.budget_bytes:  # a base need not give way for nothing
            return None
        taken: list[Slab] = []
        try:
            for n_bytes in sizes:
                slab = self.take(n_bytes, for_device)
                if slab is None:
                    self.give_back(taken)
                    return None
                taken.append(slab)
        except BaseException:
            self.give_back(taken)
            raise
        return taken

    def forget(self, slabs: Iterable[Slab]) -> None:
        """Count slabs as lost: a failed device may still write to them. Whoever holds them keeps them alive."""
        with self._lock:
            self._in_use.difference_update(slabs)
            # A new sum: this may be called by an interrupt that came between taking a slab and counting its bytes.
            self._in_use_bytes = sum(slab.n_bytes for slab in self._in_use)

    @contextlib.contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """If the block fails, slabs that were taken in it and not given back are forgotten. Nobody else takes slabs meanwhile."""
        before = self._in_use.copy()
        try:
            yield
        except BaseException:
            self.forget(self._in_use - before)
            raise

    # -- memory that waits ---------------------------------------------------------------------------------------------

    def evict_bases(self) -> None:
        """Release the memory of all bases, but for what is lent."""
        with self._lock:
            while self._release_one():
                pass

    def _release_one(self) -> bool:
        """Release the memory of one slab of a base. False: there is none that nobody reads."""
        slab = self.bases.evict_any()
        if slab is None:
            return False
        pinned, slab = slab.pinned, None
        if pinned:
            empty_host_cache()
        return True

    def drop_free(self) -> None:
        """Give back the memory that waits for the next snapshot."""
        with self._lock:
            self._drop_free()

    def _drop_free(self) -> None:
        """Release the free slabs: they have the sizes of another state, or of an earlier shape of this one."""
        pinned = any(slab.pinned for slabs in self._free.values() for slab in slabs)
        self._free, self._free_bytes = {}, 0
        if pinned:  # torch keeps memory that it has pinned: without this call the budget would be exceeded
            empty_host_cache()

    def _new(self, n_bytes: int, for_device: bool) -> Slab:
        if for_device:
            try:
                tensor = self._allocate_pinned(n_bytes)
                return Slab(n_bytes, tensor, tensor.numpy(), True, True)
            except (
                RuntimeError
            ) as error:  # the memlock limit, a cgroup, the driver; or torch was built without any device
                first = not self.unpinned_bytes
                with self._lock:
                    self.unpinned_bytes += n_bytes
                if first:
                    logger.warning(
                        "host memory cannot be pinned (%d bytes asked for: %s). Snapshots use pageable memory: copies from the device "
                        "are slower, and `save` waits for them. Raise `ulimit -l`, or the container's memory limit",
                        n_bytes,
                        str(error).partition("\n")[0],
                    )
        tensor = pageable(n_bytes)
        return Slab(n_bytes, tensor, tensor.numpy(), for_device, False)

    def give_back(self, slabs: Iterable[Slab]) -> None:
        """Take slabs back: nothing reads or writes them any more. Slabs that are not in use are ignored."""
        with self._lock:
            for slab in slabs:
                if self._leave(slab):
                    self._set_free(slab)

    def _set_free(self, slab: Slab) -> None:
        self._free.setdefault((slab.n_bytes, slab.for_device), []).append(slab)
        self._free_bytes += slab.n_bytes
        if self.held_bytes > self.budget_bytes:
            self._drop_free()


__all__ = ["LEASE_LIMIT_S", "Slab", "SlabPool", "empty_host_cache", "pageable"]
