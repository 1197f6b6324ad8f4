"""Handlers of signals that can be put back in any order, by any number of those who want to be told.

    signal.signal's table ─→ layer ─→ previous handler, or the default
                               └ tells every receiver that is still there

A signal has one *layer* of ours, however many receivers it has: nobody has to leave in the order of coming. There is a second layer only
where somebody else has set a handler above the first, which may not pass signals on. A receiver is held weakly: one that was forgotten, or
belongs to the process that this one was forked from, is told nothing. A layer without receivers does what would have been done without it,
whether or not it could be taken out of the table (other threads cannot do that, and a handler above it may still call it).
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
    """Somebody who is told. Compared by identity."""

    pid: int
    """The process that it belongs to."""

    def received(self, number: int, now_s: float) -> None:
        """Called in the signal's handler, by the main thread between any two instructions: takes no lock, logs nothing, raises nothing."""


class _Line:
    """All layers of one signal."""

    def __init__(self) -> None:
        self.receivers: list[weakref.ref[Receiver]] = []
        self.telling = False
        """A layer is telling; one below it, that a handler in between calls, need not."""

    def living(self) -> list[Receiver]:
        here = os.getpid()
        return [one for ref in self.receivers if (one := ref()) is not None and one.pid == here]


class _Layer:
    """What stands in the interpreter's table."""

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
    """Handlers can be set by the main thread only."""
    return threading.current_thread() is threading.main_thread()


def install(number: int, receiver: Receiver) -> None:
    """Have the receiver told. Main thread. Until `remove`, or until nobody holds the receiver any more."""
    line = _lines.setdefault(number, _Line())
    line.receivers = [ref for ref in line.receivers if ref() is not None]
    line.receivers.append(weakref.ref(receiver))
    top = signal.getsignal(number)
    if not isinstance(top, _Layer):
        signal.signal(number, _Layer(line, signal.SIG_DFL if top is None else top))


def remove(number: int, receiver: Receiver) -> None:
    """Any thread; may be called twice. The main thread puts the previous handler back where nobody wants to be told any more and nobody
    has set another one since.
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
    """Whether nobody but us does anything at this signal, in C neither: faulthandler's handler is not in Python's table."""
    top = signal.getsignal(number)
    if isinstance(top, _Layer):
        return top.previous is signal.SIG_DFL
    return top is signal.SIG_DFL and not _in_mask(number)


def _in_mask(number: int) -> bool:
    """Whether the kernel knows a handler, or that it is ignored. False where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigIgn:", "SigCgt:"))]
    except (OSError, ValueError, IndexError):
        return False
    return any(mask >> (number - 1) & 1 for mask in masks)
