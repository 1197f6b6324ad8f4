"""A pool of plain threads for one save or load.

Not ThreadPoolExecutor: that one refuses work once the interpreter begins to shut down, and a `save_async` at the end of a script
still has most of its work before it. These threads are no daemons: the interpreter waits for them, so no save is lost.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class WorkerPool:
    """`threads` threads that run what is submitted, in order. Made and closed by its owner; never outlives the operation."""

    def __init__(self, threads: int, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}") for i in range(threads)]
        self._cancelled = False
        started = 0
        try:
            for thread in self._threads:
                thread.start()
                started += 1
        except BaseException:
            del self._threads[started:]
            self.close()
            raise

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, call = item
            if self._cancelled:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # reaches whoever waits for the future
                future.set_exception(error)
            del item, future, call  # or the last chunk's buffers live until the next one comes

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` on one of the threads."""
        future: Future[T] = Future()
        self._queue.put((future, call))
        return future

    def drain(self) -> None:
        """Nothing more will be submitted: the threads end by themselves once the queue is empty. Does not wait."""
        for _ in self._threads:
            self._queue.put(None)

    def close(self) -> None:
        """Cancel what has not begun, wait for what has, end the threads. May be called twice."""
        self._cancelled = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
