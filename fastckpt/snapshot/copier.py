"""Starts the copies of a snapshot in their order, as far as there is memory for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastckpt.host.threads import start_thread
from fastckpt.snapshot import cuda
from fastckpt.snapshot.device_copies import DeviceCopies
from fastckpt.snapshot.fingerprints import SaveFingerprints
from fastckpt.snapshot.host_copies import HostCopies
from fastckpt.snapshot.progress import Copy, Progress
from fastckpt.snapshot.ring import Ring
from fastckpt.snapshot.side_stream import SideStream
from fastckpt.snapshot.tearing import TearWatch
from fastckpt.snapshot.unchanged import Unchanged
from fastckpt.state import Captured


class Copier:
    """See the module. `start` is for the training thread, all other methods for any thread. devices, host: these make the copies."""

    def __init__(
        self,
        captured: Captured,
        order: Sequence[Copy],
        ring: Ring,
        watch: TearWatch,
        progress: Progress,
        side_of: Callable[[torch.device], SideStream],
        threads: int,
        unchanged: Unchanged | None,
        *,
        in_order: bool,
    ) -> None:
        """order: all copies. side_of: see `DeviceCopies`. threads: number of threads that copy host memory. unchanged: finds chunks that
        need no copy. in_order: slabs are used again, so that no copy may overtake one that it is not known yet whether it is needed.
        """
        self._order, self._ring, self._progress = order, ring, progress
        self._unchanged, self._in_order = unchanged, in_order
        self._next = self._n_first = 0
        """Number of copies of `order` that have been given out or put aside."""
        self._aside: list[Copy] = []
        """Copies that wait for their fingerprint, while later ones are given out."""
        self.devices = DeviceCopies(captured, sorted(order, key=lambda copy: copy.number), side_of)
        self.host = HostCopies(captured, ring, watch, progress, threads)

    def start(self, n_first: int, fingerprints: SaveFingerprints) -> bool:
        """Give out the copies for which there is memory. On return the first copies do not depend on the state any more: copies of host
        memory are made; for a device, either its compute stream waits for the copies, or they read clones.

        Before that it takes the fingerprints of chunks that are copied later. False: that was not possible, so nothing may be left for
        later. Raises the error that prevented the first copies.
        """
        first, later = self._order[:n_first], self._order[n_first:]
        looked, self._n_first = True, n_first
        with self._progress.changed:
            self.devices.find_sources()
            cloned = self.devices.clone([copy for copy in first if not self.is_open(copy)])
            if fingerprints.looks:
                for copy in later:
                    if copy.device is None:
                        fingerprints.take_host(copy.number)
                looked = self.devices.take_fingerprints(later, fingerprints, may_clone=cloned)
            self.devices.begin()
            fingerprints.fetch()
            holds_back = self._unchanged is not None and self._unchanged.take(self.devices.side, self.devices.sources)
            self._give_out(n_first)
            if (n_first and not cloned) or holds_back:
                self.devices.hold_back()
            self.host.await_those_under_way()
            self.give_out()
            self.host.wait_for_awaited()
            if self._progress.error is not None:
                raise self._progress.error
            self.devices.may_be_resized = True
        if (
            self._unchanged is not None
            and self._unchanged.waiting
            and start_thread(self._compare, "fastckpt-compare") is None
        ):
            self._decide(set())  # the interpreter is ending
        return looked

    def _compare(self) -> None:
        """Wait for the fingerprints, in a thread, and give out the copies that are needed."""
        assert self._unchanged is not None
        try:
            unchanged = self._unchanged.wait(lambda: self._progress.is_over)
            if unchanged is not None:
                self._decide(unchanged)
        except BaseException as error:
            self._progress.fail(error)

    def _decide(self, unchanged: set[int]) -> None:
        """It is known which of the waiting chunks have the base's bytes."""
        assert self._unchanged is not None
        with self._progress.changed, cuda.while_others_capture(self.devices.one):
            aside, self._aside = self._aside, []
            self._unchanged.settle(unchanged)
            for copy in aside:
                if not self._progress.is_over:
                    self._give_one(copy)
            self.give_out()

    def give_out(self) -> None:
        """Give copies to streams and threads, in order, as far as there are slabs. Raises the error of a refused copy. The caller holds the
        lock.
        """
        self._give_out(len(self._order))

    def _give_out(self, end: int) -> None:
        while self._next < end and not self._progress.is_over:
            copy = self._order[self._next]
            if self.is_open(copy):
                if self._in_order and self._next >= self._n_first:
                    break
                self._aside.append(copy)
            elif not self._give_one(copy):
                break
            self._next += 1
        self.devices.mark()
        self._progress.changed.notify_all()

    def _give_one(self, copy: Copy) -> bool:
        """Give one copy out, or spare it. False: there is no slab for it now."""
        if self._unchanged is not None and copy.number in self._unchanged.spared:
            copy.spared = True
            self.devices.spare(copy)
            self._ring.skip(copy)
            self._progress.there(copy)
            return True
        if not self._ring.take_slab(copy):
            return False
        if copy.device is None:
            self.host.copy(copy)
        else:
            target, pinned = self._ring.target(copy)
            self.devices.copy(copy, target, pinned=pinned)
        return True

    def is_open(self, copy: Copy) -> bool:
        """Whether it is not known yet if a copy is needed. The caller holds the lock."""
        return self._unchanged is not None and copy.number in self._unchanged.waiting

    @property
    def upcoming(self) -> Copy | None:
        """The next copy to give out; None: all were given out. The caller holds the lock."""
        return self._order[self._next] if self._next < len(self._order) else None

    @property
    def n_waiting(self) -> int:
        """Number of copies that were not given out yet."""
        return len(self._order) - self._next + len(self._aside)

    @property
    def is_settled(self) -> bool:
        """Whether all copies have been given out, or no more will be."""
        return not self.n_waiting or self._progress.is_over

    @property
    def n_copies(self) -> int:
        """Number of all copies."""
        return len(self._order)
