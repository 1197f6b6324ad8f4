"""Signal handlers for any number of receivers, which can be removed in any order.

    signal.signal's table ─→ layer ─→ previous handler, or the default
                               └ tells every receiver that is still there

Each signal has one *layer* of ours, whatever the number of receivers, so receivers may leave in any order. There is a second layer only if
somebody else has set a handler above the first, because that handler may not pass signals on. Receivers are held weakly: a receiver that
was dropped, or belongs to the parent of this forked process, is not called. A layer without receivers behaves as if it were absent, even if
it is still in the table (other threads cannot remove it, and a handler above it may still call it).
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from pathlib import Path
from types import FrameType
from typing import Any, Protocol


class Receiver(Protocol):
    """An object that wants to be told of a signal. Compared by identity."""

    pid: int
    """The process that the receiver belongs to."""

    def received(self, number: int, now_s: float) -> None:
        """Called in the signal's handler, by the main thread, between any two instructions. Must take no lock, log nothing and raise
        nothing.
        """


class _Line:
    """All layers of one signal."""

    def __init__(self) -> None:
        self.receivers: list[weakref.ref[Receiver]] = []
        self.telling = False
        """A layer is calling receivers; a layer below it, called by a handler in between, need not do so again."""

    def living(self) -> list[Receiver]:
        here = os.getpid()
        return [one for ref in self.receivers if (one := ref()) is not None and one.pid == here]


class _Layer:
    """One entry in the interpreter's table of handlers."""

    def __init__(self, line: _Line, previous: Any) -> None:
        self.line, self.previous = line, previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        line = self.line
        living = line.living()
        outermost, line.telling = not line.telling, True
        try:
            if outermost:
                now_s = time.monotonic()
                for one in living:
                    one.received(number, now_s)
            if callable(self.previous):
                self.previous(number, frame)
            elif self.previous is signal.SIG_DFL and not living:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        finally:
            if outermost:
                line.telling = False


_lines: dict[int, _Line] = {}


def may_be_set() -> bool:
    """Whether this is the main thread: only that may set handlers."""
    return threading.current_thread() is threading.main_thread()


def install(number: int, receiver: Receiver) -> None:
    """Call the receiver at this signal from now on, until `remove` or until nobody holds the receiver. Main thread only."""
    line = _lines.setdefault(number, _Line())
    line.receivers = [ref for ref in line.receivers if ref() is not None]
    line.receivers.append(weakref.ref(receiver))
    top = signal.getsignal(number)
    if not isinstance(top, _Layer):
        signal.signal(number, _Layer(line, signal.SIG_DFL if top is None else top))


def remove(number: int, receiver: Receiver) -> None:
    """Any thread; may be called twice. If no receiver is left and nobody has set another handler since, the main thread puts the previous
    handler back.
    """
    line = _lines.get(number)
    if line is None:
        return
    line.receivers = [ref for ref in line.receivers if ref() not in (None, receiver)]
    if not may_be_set() or line.living():
        return
    while isinstance(top := signal.getsignal(number), _Layer):
        signal.signal(number, top.previous)


def is_default(number: int) -> bool:
    """Whether only our handlers act at this signal, in C as well: faulthandler's handler is not in Python's table."""
    top = signal.getsignal(number)
    if isinstance(top, _Layer):
        return top.previous is signal.SIG_DFL
    return top is signal.SIG_DFL and not _in_mask(number)


def _in_mask(number: int) -> bool:
    """Whether the kernel has a handler for the signal, or ignores it. False if there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigIgn:", "SigCgt:"))]
    except (OSError, ValueError, IndexError):
        return False
    return any(mask >> (number - 1) & 1 for mask in masks)
