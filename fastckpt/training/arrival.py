"""What a restore with `overlap` has left: states of optimizers that come while the first forward and backward pass run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from fastckpt.errors import PartialRestoreError, StoreError
from fastckpt.host.threads import is_ending, start_thread


class Arrival:
    """One such reading, on a thread of its own. Any thread may wait for it; the first one to find it done finishes the restore."""

    def __init__(
        self,
        read: Callable[[Callable[[], bool]], None],
        finish: Callable[[], None],
        broken_by: Callable[[BaseException], PartialRestoreError],
    ) -> None:
        """read: is given a function that says whether to stop. finish: called once, on a thread that waits, when all has come. broken_by:
        makes the error that all who wait get, of the one that the reading has raised.
        """
        self._read, self._finish, self._broken_by = read, finish, broken_by
        self._pid = os.getpid()
        self._lock = threading.RLock()  # whoever finishes may come to a fence again
        self._is_over = threading.Event()
        self._given_up = self._finished = False
        self._error: PartialRestoreError | None = None
        self._thread = start_thread(self._run, "fastckpt-arrival")
        if self._thread is None:  # the interpreter is ending
            self._run()

    @property
    def error(self) -> PartialRestoreError | None:
        """Why the objects will not be whole; None: they are, or may still become so."""
        return self._error

    def wait(self) -> None:
        """Block until all has come. PartialRestoreError, each time, if it cannot come; also in a fork of the process: what had not come at
        the fork never comes there.
        """
        if self._finished:
            return
        if os.getpid() != self._pid:
            raise PartialRestoreError(
                f"this is a fork of process {self._pid}, made before the states of its optimizers had come (restore(overlap=True)): here "
                "they never come. Call ckpt.fence() before a fork that trains"
            )
        self._is_over.wait()
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._finished:
                self._finish()
                self._finished = True

    def give_up(self, limit_s: float | None = None) -> None:
        """End the reading soon, and wait for its end. What has not come by then never comes.

        limit_s: wait no longer; a store that does not answer keeps the thread then, which may still write what it has asked for.
        """
        self._given_up = True
        if os.getpid() != self._pid or self._thread is None:
            return
        self._thread.join(limit_s)
        if not self._is_over.is_set():
            self._error = self._broken_by(
                StoreError(f"a read had no answer {limit_s:.3g} s after the restore was given up")
            )

    def _run(self) -> None:
        try:
            self._read(lambda: self._given_up or is_ending())
        except BaseException as error:  # raised to all who wait
            self._error = self._broken_by(error)
            self._error.__cause__ = None if error is self._error else error
        finally:
            self._is_over.set()
