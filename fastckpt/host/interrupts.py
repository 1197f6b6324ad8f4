"""Ctrl-C and its like, in places that must not be left halfway."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# Signals for which programs set handlers that raise; torch's handler of SIGCHLD does, when a worker of a DataLoader dies. The signals of a
# profiler (SIGPROF) or a debugger are not held back.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGCHLD")
    if hasattr(signal, name)
]


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Signals whose handlers are Python's are handled at the end of the block. For a few milliseconds, and the main thread: others are
    never interrupted.

    A handler may raise between any two instructions, as that of SIGINT does, so no order of statements hands memory over safely.
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
        ):  # a notice's own may set another one of SIGCHLD: that comes first
            signal.signal(number, handler)
        with contextlib.ExitStack() as every_one:  # also if one of them raises
            for number, frame in sorted(came.items(), reverse=True):  # called lowest first, as the interpreter does
                every_one.callback(_handle, number, frame)


def _handle(number: int, frame: FrameType | None) -> None:
    """By the handler that is set now: that of a lower number may have set another."""
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, frame)
