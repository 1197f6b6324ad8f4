"""Errors of data-loader workers that die when a signal goes to the whole process group.

SLURM, systemd, `timeout` and a terminal send a signal to the workers of a DataLoader, too. torch then raises a RuntimeError in the main
thread, from its handler of SIGCHLD, between any two instructions. That could leave an update of the weights halfway, break off the final
save, or end the handler of the notice itself before it has noted anything. So such errors are raised only where training waits for a
worker, and would wait for ever. Everywhere else they are kept until the next call of `step`: by then there is a notice, or `step` raises
them.
"""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from fastckpt.spot import handlers

_LOADERS = ("torch.utils.data", "torchdata")
_WAITING = ("queue", "threading", "multiprocessing", "concurrent", "selectors")


class WorkerErrors:
    """Errors of workers that were kept for a training loop. Once it is dropped, or closed without a notice, it keeps none."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        """busy: whether the state is being changed. Called in a signal handler."""
        self.busy = busy
        self.pid = os.getpid()
        self._held: list[Exception] = []

    def hold(self) -> None:
        """Keep errors from now on. May be called again and again, because torch sets its handler only when the first worker starts. Outside
        the main thread this does nothing and raises nothing.
        """
        if handlers.may_be_set() and hasattr(signal, "SIGCHLD"):
            _guard(self)

    def hold_for_good(self) -> None:
        """Like `hold`, after a notice. Whenever another worker ends, torch finds the dead workers again, and that may come after
        `close`.
        """
        self.hold()
        _for_good.add(self)

    def keep(self, error: Exception) -> None:
        """Keep an error. Called in a signal handler."""
        self._held.append(error)

    def take(self) -> list[Exception]:
        """The errors that were kept since the last call."""
        held, self._held = self._held, []
        return held

    def close(self) -> None:
        """From now on errors are raised at once again, unless a notice has come."""
        if self not in _for_good:
            _owners.discard(self)
            if not _owners and handlers.may_be_set() and isinstance(top := signal.getsignal(signal.SIGCHLD), _Guard):
                signal.signal(signal.SIGCHLD, top.previous)


_owners: weakref.WeakSet[WorkerErrors] = weakref.WeakSet()
_for_good: set[WorkerErrors] = set()


class _Guard:
    """A handler of SIGCHLD above the existing one: a single one for all Checkpointers."""

    def __init__(self, previous: Callable[[int, FrameType | None], Any]) -> None:
        self.previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.previous(number, frame)
        except Exception as error:
            here = os.getpid()
            owners = [owner for owner in _owners if owner.pid == here]
            if not owners or may_raise(_modules(frame), busy=any(owner.busy() for owner in owners)):
                raise
            for owner in owners:
                owner.keep(error)


def _guard(owner: WorkerErrors) -> None:
    if owner not in _owners:
        _owners.add(owner)
    top = signal.getsignal(signal.SIGCHLD)
    if callable(top) and not isinstance(top, _Guard):  # otherwise no handler raises anything
        signal.signal(signal.SIGCHLD, _Guard(top))


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
