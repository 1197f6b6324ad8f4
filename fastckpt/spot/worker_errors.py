"""What dies beside training when a signal goes to the whole process group.

SLURM, systemd, `timeout` and a terminal send a signal to the workers of a DataLoader, too. torch then raises a RuntimeError in the main
thread, from its handler of SIGCHLD, between any two instructions: an update of the weights would be left halfway, or the final save itself
would be broken off. So from the notice on such errors come only where training waits for something, which it would not get any more.
Everywhere else it goes on to its next call of `step`, which ends it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from fastckpt.spot import handlers

_LOADERS = ("torch.utils.data", "torchdata")
_WAITING = ("queue", "threading", "multiprocessing", "concurrent", "selectors")


class WorkerErrors:
    """A handler of SIGCHLD above the one that is there."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        """busy: whether the state is being changed. Called in a signal's handler."""
        self._busy = busy
        self._previous: Callable[[int, FrameType | None], Any] | None = None
        self._held: list[Exception] = []

    def hold(self) -> None:
        """From now on; for good, as dead workers are found again at each end of another one. May be called in a signal's handler. Outside
        the main thread nothing is done, and nothing raised there.
        """
        if not handlers.may_be_set() or not hasattr(signal, "SIGCHLD"):
            return
        top = signal.getsignal(signal.SIGCHLD)
        if self._previous is None and callable(top):  # otherwise nobody raises anything
            self._previous = top
            signal.signal(signal.SIGCHLD, self._handle)

    def take(self) -> list[Exception]:
        """Those that were kept back since the last call: for the log."""
        held, self._held = self._held, []
        return held

    def _handle(self, number: int, frame: FrameType | None) -> None:
        assert self._previous is not None
        try:
            self._previous(number, frame)
        except Exception as error:
            if may_raise(_modules(frame), busy=self._busy()):
                raise
            self._held.append(error)


def _modules(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield str(frame.f_globals.get("__name__", ""))
        frame = frame.f_back


def may_raise(modules: Iterator[str], *, busy: bool) -> bool:
    """Whether an error may interrupt the main thread. modules: of its frames, innermost first."""
    if busy:
        return False
    names = list(modules)
    if any(_below(name, ("fastckpt",)) for name in names):
        return False
    return any(_below(name, _LOADERS) for name in names) or (bool(names) and _below(names[0], _WAITING))


def _below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)
