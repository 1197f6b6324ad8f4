"""Threads of fastckpt: a pool for one save or load, and the wait for them at the interpreter's end.

The threads are daemons, and at exit the interpreter waits for them, for EXIT_TIMEOUT_S at most. ThreadPoolExecutor cannot be used: it
refuses work once the interpreter begins to shut down, when a `save_async` at the end of a script still has most of its work to do.
Non-daemon threads cannot be used either: if a store hangs, they keep the process alive for ever.

The stages of an interpreter's end, and the stage after which no thread can be started:

    main thread's end ─→ callbacks of `threading` ─→ threads that are no daemons end ─→ atexit's handlers ─→ objects and modules go
           └ Python 3.12.0 to 3.12.2                                                                       └ all; before 3.12 `start` hangs

We wait twice: in `threading`'s callback, and again in atexit's, for saves that other threads begin in between. A save that begins when no
thread can be started, or when nobody would wait for one any more, runs on the calling thread: slower, but just as durable.
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
"""How long the interpreter waits at exit for saves under way. FASTCKPT_EXIT_TIMEOUT_S overrides it."""

_unfinished: set[threading.Thread] = set()
_given_up: set[threading.Thread] = set()
"""Unfinished threads for which nobody waits any more."""
_ending = False
_over = False
"""True: nobody will wait for a thread that is started now."""
_when_over: list[Callable[[], None]] = []
_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
_lock = threading.RLock()  # reentrant: a signal handler may save while the main thread holds it
_hurried = 0


def start(thread: threading.Thread) -> bool:
    """Start a thread. False if the interpreter is ending and allows none: then the caller does the work itself, or without a thread."""
    if _over:
        return False
    try:
        thread.start()
    except RuntimeError as error:  # Python 3.13 raises a subclass of its own, with the same text
        if "interpreter shutdown" not in str(error):
            raise
        return False
    return True


def start_thread(run: Callable[[], None], name: str) -> threading.Thread | None:
    """Start a thread for which the interpreter waits at exit. None if the interpreter is ending and allows none: then the caller does the
    work itself.
    """
    thread = threading.Thread(target=run, name=name, daemon=True)
    with _lock:  # held from the check of `_over` until the thread has begun
        # Threads that have ended are removed here. If a thread removed itself, it could still release tensors between that moment and its
        # very end, and doing so at the interpreter's end crashes the process.
        for threads in (_unfinished, _given_up):
            threads.difference_update([one for one in threads.copy() if one.ident is not None and not one.is_alive()])
        _unfinished.add(thread)
        started = False
        try:
            started = start(thread)
        finally:
            if not started:
                _unfinished.discard(thread)
    return thread if started else None


def exit_timeout_s() -> float:
    """How long the end of a process may be delayed by saves under way."""
    try:
        return float(os.environ.get(ENV_EXIT_TIMEOUT, EXIT_TIMEOUT_S))
    except ValueError:
        logger.warning("%s is %r: expected seconds", ENV_EXIT_TIMEOUT, os.environ[ENV_EXIT_TIMEOUT])
        return EXIT_TIMEOUT_S


def when_over(call: Callable[[], None]) -> None:
    """Register a call for the interpreter's end, after saves under way. `forget_when_over` with an equal call removes it."""
    _when_over.append(call)


def forget_when_over(call: Callable[[], None]) -> None:
    """Undo `when_over`, if it was called."""
    with contextlib.suppress(ValueError):
        _when_over.remove(call)


def _running() -> list[threading.Thread]:
    return [thread for thread in _unfinished.copy() if thread.is_alive() and thread not in _given_up]


def _wait() -> None:
    if not _running():
        return
    timeout_s = exit_timeout_s()
    end = time.monotonic() + timeout_s
    try:
        while running := _running():
            running[0].join(max(0.0, end - time.monotonic()))
            if running[0].is_alive():
                _give_up(running, f"{timeout_s:g} s after its main thread", f". {ENV_EXIT_TIMEOUT} gives them longer")
    except BaseException as error:  # Ctrl-C: the user does not want to wait
        _give_up(_running(), f"interrupted by {type(error).__name__}")
        raise


def _give_up(threads: list[threading.Thread], why: str, advice: str = "") -> None:
    _given_up.update(threads)  # the next wait does not wait for these
    names = ", ".join(sorted(thread.name for thread in threads))
    logger.error(
        "the process ends with saves under way, %s (%s): what they save is not committed%s", why, names, advice
    )


def is_ending() -> bool:
    """Whether the interpreter has begun to end: work that nobody waits for need not go on."""
    return _ending


def _wait_first() -> None:
    global _ending  # noqa: PLW0603 - set once
    _ending = True
    _wait()


def _end() -> None:
    global _over  # noqa: PLW0603 - under the lock
    try:
        _wait()
    finally:
        with _lock:
            _over = True
    _wait()  # for saves that began meanwhile
    while _when_over:
        _when_over.pop()()


def _register() -> bool:
    """Register the waits. False: this module is imported while the interpreter ends, and it is too late."""
    try:
        # Imported first: callbacks run in reverse order of registration, and stores of other authors may use these executors until saves
        # are done.
        import concurrent.futures.thread  # noqa: F401

        register: Callable[[Callable[[], None]], object] = getattr(threading, "_register_atexit", atexit.register)
        register(_wait_first)
    except RuntimeError:
        return False
    atexit.register(_end)
    return True


_over = not _register()


def _in_forked_child() -> None:
    """A forked child has none of the parent's threads."""
    global _lock, _hurried
    _lock, _hurried = threading.RLock(), 0
    _unfinished.clear()
    _given_up.clear()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """While this context is open, background work runs at ordinary priority: the caller is blocked on it.

    A thread that has lowered its priority cannot raise it again without root's rights. So pools get additional threads of ordinary
    priority.
    """
    global _hurried  # noqa: PLW0603 - under the lock
    with _lock:
        _hurried += 1
        pools = list(_pools)
    try:
        for pool in pools:
            with contextlib.suppress(RuntimeError):  # no more threads can be started: continue with the existing ones
                pool.hurry()
        yield
    finally:
        with _lock:
            _hurried -= 1


class WorkerPool:
    """A fixed number of threads that run submitted calls in order. Made and closed by its owner; never outlives the operation.

    When the interpreter is ending there may be fewer threads, or none. With none `inline` is true, and `submit` returns when its call is
    done.

    nice: how much lower the threads' priority is while nobody waits for them (Options.background_nice).
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
                self._start(self._n, self._nice)
        except BaseException:
            self.close()
            raise
        self.inline = not self._threads

    def _start(self, n: int, nice: int) -> None:
        """The caller holds the lock, so that a concurrent `close` knows of all threads."""
        for _ in range(n):
            thread = start_thread(lambda: self._work(nice), f"{self._name}-{len(self._threads)}")
            if thread is None:
                return
            self._threads.append(thread)

    def hurry(self) -> None:
        """From now on do the work at ordinary priority."""
        with _lock:
            if self._nice and not self._cancelled:
                self._nice = 0
                self._start(self._n, 0)

    def grow(self, n: int) -> None:
        """Start n threads more, or as many as can be started. Not more than 0: nothing happens."""
        with _lock:
            if not self._cancelled and not self.inline:
                with contextlib.suppress(
                    RuntimeError
                ):  # no more threads can be started: continue with the existing ones
                    self._start(n, self._nice)

    def __len__(self) -> int:
        return len(self._threads)

    def _work(self, nice: int) -> None:
        if nice:
            with contextlib.suppress(OSError, AttributeError):  # not Linux: keep ordinary priority
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        while (item := self._queue.get()) is not None:
            self._run(*item)
            del item  # otherwise the last chunk's buffers would live until the next chunk comes

    def _run(self, future: Future[Any], call: Callable[[], Any]) -> None:
        if self._cancelled:
            future.cancel()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(call())
        except BaseException as error:  # raised to the thread that waits for the future
            future.set_exception(error)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` on one of the threads; without threads, at once on the calling thread."""
        future: Future[T] = Future()
        if self.inline:
            self._run(future, call)
        else:
            self._queue.put((future, call))
        return future

    def close(self) -> None:
        """Cancel calls that have not begun, wait for the others, end the threads. May be called twice."""
        with _lock:
            self._cancelled = True
            threads, self._threads = self._threads, []
            _pools.discard(self)
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()
