"""Threads of our own: a pool for one save or load, and the interpreter's end, which waits for them.

Not ThreadPoolExecutor: that one refuses work once the interpreter begins to shut down, and a `save_async` at the end of a script
still has most of its work before it. Nor threads that are no daemons: those keep a process for ever whose store hangs. Ours are
daemons that the interpreter's end waits for, EXIT_TIMEOUT_S at most.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
logger = logging.getLogger("fastckpt")

ENV_EXIT_TIMEOUT = "FASTCKPT_EXIT_TIMEOUT_S"
EXIT_TIMEOUT_S = 600.0
"""How long the end of the interpreter waits for saves under way. FASTCKPT_EXIT_TIMEOUT_S overrides it."""

_unfinished: set[threading.Thread] = set()
_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
_lock = threading.Lock()
_hurried = 0


def start_thread(run: Callable[[], None], name: str) -> threading.Thread:
    """Start a thread that the interpreter's end waits for."""
    thread = threading.Thread(target=run, name=name, daemon=True)
    # Those that have ended leave here, and not by themselves: between that and their very end they would let go of tensors, which the
    # interpreter's end answers by killing the process.
    _unfinished.difference_update([one for one in _unfinished.copy() if one.ident is not None and not one.is_alive()])
    _unfinished.add(thread)
    try:
        thread.start()
    except BaseException:
        _unfinished.discard(thread)
        raise
    return thread


def exit_timeout_s() -> float:
    """How long the end of a process may take because of saves under way."""
    try:
        return float(os.environ.get(ENV_EXIT_TIMEOUT, EXIT_TIMEOUT_S))
    except ValueError:
        logger.warning("%s is %r: expected seconds", ENV_EXIT_TIMEOUT, os.environ[ENV_EXIT_TIMEOUT])
        return EXIT_TIMEOUT_S


def _wait_at_exit() -> None:
    timeout_s = exit_timeout_s()
    end = time.monotonic() + timeout_s
    while running := [thread for thread in _unfinished.copy() if thread.is_alive()]:
        running[0].join(max(0.0, end - time.monotonic()))
        if running[0].is_alive():
            logger.error(
                "the process ends with saves under way, %g s after its main thread (%s): what they save is not committed. %s gives them "
                "longer",
                timeout_s,
                ", ".join(sorted(thread.name for thread in running)),
                ENV_EXIT_TIMEOUT,
            )
            return


# Before atexit's own handlers: from Python 3.12 on no thread can be started in those, and a save starts some.
_register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
_register(_wait_at_exit)


def _in_forked_child() -> None:
    """The threads stayed in the parent."""
    global _lock, _hurried
    _lock, _hurried = threading.Lock(), 0
    _unfinished.clear()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Somebody waits for what is in the background: until the context ends, it does not give way to anybody.

    A thread that has lowered its priority cannot raise it again, unless it is root's: so pools get more threads, of ordinary priority.
    """
    global _hurried  # noqa: PLW0603 - under the lock
    with _lock:
        _hurried += 1
        pools = list(_pools)
    try:
        for pool in pools:
            with contextlib.suppress(RuntimeError):  # no more threads to be had: then at the pace of those it has
                pool.hurry()
        yield
    finally:
        with _lock:
            _hurried -= 1


class WorkerPool:
    """`threads` threads that run what is submitted, in order. Made and closed by its owner; never outlives the operation.

    nice: by how much they give way to others while nobody waits for them (Options.background_nice).
    """

    def __init__(self, threads: int, name: str, *, nice: int = 0) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._n, self._name = threads, name
        self._cancelled = False
        self._threads: list[threading.Thread] = []
        try:
            with _lock:
                self._nice = 0 if _hurried else nice
                if self._nice:
                    _pools.add(self)
                self._start(self._nice)
        except BaseException:
            self.close()
            raise

    def _start(self, nice: int) -> None:
        """The caller holds the lock: whoever closes meanwhile must know of all threads."""
        for _ in range(self._n):
            self._threads.append(start_thread(lambda: self._work(nice), f"{self._name}-{len(self._threads)}"))

    def hurry(self) -> None:
        """From now on work is done at ordinary priority, too."""
        with _lock:
            if self._nice and not self._cancelled:
                self._nice = 0
                self._start(0)

    def _work(self, nice: int) -> None:
        if nice:
            with contextlib.suppress(OSError, AttributeError):  # not Linux: then at ordinary priority
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
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

    def close(self) -> None:
        """Cancel what has not begun, wait for what has, end the threads. May be called twice."""
        with _lock:
            self._cancelled = True
            threads, self._threads = self._threads, []
            _pools.discard(self)
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()
