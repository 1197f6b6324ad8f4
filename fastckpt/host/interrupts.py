"""Delays Ctrl-C and similar signals in code that must not be left halfway."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# Signals for which programs install handlers that raise: torch's handler of SIGCHLD raises when a DataLoader worker dies. The signals of a
# profiler (SIGPROF) or a debugger are not delayed.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD")
    if hasattr(signal, name)
]


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Within this block, signals with Python handlers are held; they are handled at its end. For blocks of a few milliseconds in the main
    thread; signals never interrupt other threads.

    A handler may raise between any two instructions, as that of SIGINT does. So no order of statements alone can transfer the ownership of
    memory safely.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    came: dict[int, FrameType | None] = {}

    def note(number: int, frame: FrameType | None) -> None:
        came.setdefault(number, frame)

    try:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, note)
        yield
    finally:
        for number, handler in reversed(
            handlers.items()
        ):  # a notice's handler may set another handler for SIGCHLD: that one counts
            signal.signal(number, handler)
        with contextlib.ExitStack() as every_one:  # also if one of the handlers raises
            for number, frame in sorted(
                came.items(), reverse=True
            ):  # so that the lowest number is handled first, as the interpreter does
                every_one.callback(_handle, number, frame)


def _handle(number: int, frame: FrameType | None) -> None:
    """Call the handler that is set now: the handler of a lower number may have changed it."""
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, frame)
