"""Handles: give the caller of a background save its outcome."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from fastckpt.host.deadline import bounded

T = TypeVar("T")

Waiting = Callable[[], contextlib.AbstractContextManager[Any]]


class _Durable(Future[T]):
    """A future that opens a context while somebody waits for it. It cannot be cancelled: a save that has begun ends by itself."""

    def __init__(self, waiting: Waiting = contextlib.nullcontext) -> None:
        super().__init__()
        self._waiting = waiting
        self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> T:
        with contextlib.nullcontext() if self.done() else self._waiting():
            return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        with contextlib.nullcontext() if self.done() else self._waiting():
            return super().exception(timeout)


class Handle(Generic[T]):
    """A save under way. Any thread.

    You need not wait for it: the interpreter waits at exit, and a failure is logged in any case.
    """

    def __init__(self, what: str, waiting: Waiting = contextlib.nullcontext) -> None:
        """Make the handle of a save that has not ended.

        Args:
            what: the save, for messages: "step 100", or the path.
            waiting: makes a context that is open while somebody waits for the save.
        """
        self._what = what
        self.durable: Future[T] = _Durable(waiting)
        """Done when the checkpoint is whole and on stable storage. Carries the error if anything failed. Cannot be cancelled."""

    def __repr__(self) -> str:
        error = self.durable.exception() if self.durable.done() else None
        state = "under way" if not self.durable.done() else "durable" if error is None else repr(error)
        return f"<{type(self).__name__} of {self._what}: {state}>"

    def done(self) -> bool:
        """Tell whether the save has ended, successfully or not."""
        return self.durable.done()

    def wait(self, timeout_s: float | None = None) -> T:
        """Block until the save is durable.

        Args:
            timeout_s: seconds; None: as long as it takes.

        Returns:
            The result of `durable`.

        Raises:
            TimeoutError: it is not durable yet; the save goes on.
            Exception: the save's own error; each call raises it.
        """
        try:
            return self.durable.result(None if timeout_s is None else bounded(timeout_s))
        except futures.TimeoutError:
            if self.durable.done():  # raises the save's own error
                raise
            # Before Python 3.11 the future's TimeoutError is not the built-in one that callers catch.
            raise TimeoutError(f"{self._what} is not durable after {timeout_s} s; the save goes on") from None


class SaveHandle(Handle[int]):
    """What `save_async` returns: a save under way, of one file or object. The result of `durable` is its size in bytes.

    Any thread. You need not wait for it: the interpreter waits at exit, and a failure is logged in any case.
    """

    def __init__(self, target: str) -> None:
        """Make the handle of a save to `target`, a text for messages."""
        super().__init__(target)
        self.target = target
        self.staged: Future[None] = Future()
        """Done when the state may change again. Errors before that moment are raised by `save_async` itself."""
