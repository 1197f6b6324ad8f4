"""Copies of chunks in host memory: makes them at once or by threads, compares them, and repeats torn ones."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator

from fastckpt.host.threads import WorkerPool
from fastckpt.snapshot.progress import Copy, Progress, Stage
from fastckpt.snapshot.ring import Ring
from fastckpt.snapshot.tearing import TearWatch
from fastckpt.state import Captured

_INLINE_BYTES = 256 << 10  # for less, handing the copy to another thread takes longer than the copy itself


class HostCopies:
    """See the module. Any thread."""

    def __init__(self, captured: Captured, ring: Ring, watch: TearWatch, progress: Progress, threads: int) -> None:
        """threads: number of threads that copy, started when there is work for them."""
        self._captured, self._ring, self._watch, self._progress = captured, ring, watch, progress
        self._n_threads = threads
        self._threads: WorkerPool | None = None
        self._under_way: set[int] = set()
        """Numbers of the chunks that threads are copying."""
        self._awaited: set[int] = set()
        """Those among them that `wait_for_awaited` waits for."""
        self._torn: list[Copy] = []
        """Torn copies, to be made once more."""
        self._attended = 0
        """If more than 0, the training thread does not change the state until torn copies are handled."""

    def copy(self, copy: Copy) -> None:
        """Make one copy, or give it to a thread. The caller holds the lock."""
        copy.stage = Stage.GIVEN_OUT
        if copy.n_bytes < _INLINE_BYTES:
            self.make(copy)
            return
        if self._threads is None:
            self._threads = WorkerPool(self._n_threads, "fastckpt-stage")
        self._under_way.add(copy.number)
        try:
            self._threads.submit(functools.partial(self._copy_in_thread, copy))
        except BaseException:  # nobody will make this copy
            self._under_way.discard(copy.number)
            raise

    def _copy_in_thread(self, copy: Copy) -> None:
        try:
            if self._progress.error is None:
                self.make(copy)
        except BaseException as error:
            self._progress.fail(error)
        with self._progress.changed:
            self._under_way.discard(copy.number)
            self._awaited.discard(copy.number)
            self._progress.changed.notify_all()

    def make(self, copy: Copy) -> None:
        """Make one copy on this thread, and compare it with the state at the call of save."""
        started_s = time.perf_counter()
        torn = self._watch.is_changed(copy)
        if not torn:
            self._read(copy)
            torn = self._watch.is_torn(copy, self._ring.content(copy)) or self._watch.is_changed(copy)
        with self._progress.changed:
            # While a torn copy waits, something may be writing: what was copied meanwhile is copied once more, too.
            torn = torn or bool(self._torn)
            copy.stage = Stage.TORN if torn else Stage.MARKED
            if torn:
                self._torn.append(copy)
                if self._attended:
                    self._mend()
            self._progress.changed.notify_all()
        self._progress.staged(copy, started_s)

    def _read(self, copy: Copy) -> None:
        self._captured.read(copy.chunk.pieces, self._ring.content(copy))

    def _mend(self) -> None:
        """Repeat torn copies: the state may now be that of the call again. The caller holds the lock; nobody changes the state."""
        torn, self._torn = self._torn, []
        for copy in torn:
            if self._progress.error is not None:
                break
            try:
                self._read(copy)
            except Exception as error:
                self._progress.fail(error)
                break
            if self._watch.is_torn(copy, self._ring.content(copy)):
                self._progress.fail(self._watch.torn_copy(copy))
            else:
                copy.stage = Stage.MARKED
        self._progress.changed.notify_all()

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """While this context is open, torn copies are repeated at once, or the snapshot fails: the training thread does not change the
        state.
        """
        with self._progress.changed:
            self._attended += 1
            if not self._progress.fenced and not self._progress.closed:
                self._mend()
        try:
            yield
        finally:
            with self._progress.changed:
                self._attended -= 1

    @property
    def are_idle(self) -> bool:
        """Whether no thread reads the state now."""
        return not self._under_way

    def await_those_under_way(self) -> None:
        """Let `wait_for_awaited` wait for the copies that threads are making now. The caller holds the lock."""
        self._awaited = self._under_way.copy()

    def wait_for_awaited(self) -> None:
        """Block until these copies are made, or were given up after an error. The caller holds the lock, not recursively."""
        self._progress.changed.wait_for(lambda: not self._awaited)

    def end_threads(self) -> None:
        """Wait until the threads have ended. No copies are given out after this. May be called twice; not under the lock."""
        with self._progress.changed:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.close()
