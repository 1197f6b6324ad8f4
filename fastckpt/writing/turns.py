"""Saves to one target take effect in the order of their calls.

Each save takes a *turn* at the call, waits for the earlier ones of its target before it touches it, and ends its turn when the save ends,
successfully or not. Turns exist within one process: other processes, and other programs that write to the target, do not take part. A
forked child starts without turns, because its parent's saves are not its own.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Collection, Hashable, Iterator

from fastckpt.errors import OvertakenError, TargetBusyError

_POLL_S = 1.0  # a save that was cut off (Ctrl-C between two lines) ends its turn when the turn is collected, and that wakes nobody


class Turn:
    """The place of one save in the order of its target."""

    def __init__(self, keys: Collection[Hashable], name: str) -> None:
        """See `take`."""
        self._keys = keys
        self.name = name
        self._begun_s = time.monotonic()
        self._thread: int | None = threading.get_ident()
        """The thread that runs the save; None: a thread that is just being started."""
        self._has_come = False
        self._overtaken_by = ""

    def hand_over(self) -> None:
        """Another thread continues the save."""
        with _changed:
            if self._thread == threading.get_ident():
                self._thread = None

    def wait(self, timeout_s: float) -> bool:
        """Wait until all earlier saves to the target have ended. Returns whether there were any.

        TargetBusyError after `timeout_s` seconds. OvertakenError if a save in a signal handler of this thread came first.
        """
        self._thread = threading.get_ident()
        waited, end = False, time.monotonic() + timeout_s
        with _changed:
            while True:
                if self._overtaken_by:
                    raise OvertakenError(
                        f"{self.name} was overtaken by {self._overtaken_by}, which interrupted it: the later one is there, and this one "
                        "was not written over it"
                    )
                earlier = self._earlier()
                if not earlier:
                    self._has_come = True
                    return waited
                waited = True
                left_s = end - time.monotonic()
                if left_s <= 0:
                    error = self._busy(earlier[0], f"has not ended after {timeout_s:g} s of waiting (max_order_wait_s)")
                    del earlier  # a traceback that holds it would keep a turn alive that nobody ends
                    raise error
                _changed.wait(min(left_s, _POLL_S))

    def _earlier(self) -> list[Turn]:
        """The turns that must end first. Called under the lock.

        An earlier turn of this same thread can end only after ours: we are in a signal handler that interrupted it. It lets us pass, unless
        it is just putting its bytes in place.
        """
        found = []
        for turn in self._before():
            if turn._thread == self._thread and not turn._overtaken_by:
                if turn._has_come:
                    raise self._busy(turn, "is being put in place, and was interrupted by this one")
                turn._overtaken_by = self.name
            if turn._thread != self._thread:
                found.append(turn)
        return found

    def _before(self) -> Iterator[Turn]:
        """Earlier turns that have a key in common with this one."""
        for key in self._keys:
            for turn in _of(key):
                if turn is self:
                    break
                yield turn

    def _busy(self, earlier: Turn, what: str) -> TargetBusyError:
        age_s = time.monotonic() - earlier._begun_s
        return TargetBusyError(
            f"{self.name} was not made: {earlier.name}, begun {age_s:.0f} s ago, has the same target and {what}. Had this one been "
            "written, the older state could have replaced it later. Look why the earlier save does not get on, or save to another name"
        )

    def end(self) -> None:
        """The save has ended, successfully or not. May be called twice."""
        with _changed:
            for key in self._keys:
                turns = _turns.get(key, [])
                turns[:] = [other for other in turns if other() not in (self, None)]
                if not turns:
                    _turns.pop(key, None)
            _changed.notify_all()


_turns: dict[Hashable, list[weakref.ref[Turn]]] = {}
_changed = threading.Condition()


def take(keys: Collection[Hashable], name: str) -> Turn:
    """Take the last place in the order of a target.

    keys: identify the target; two saves with a common key have the same target. name: of the save, for messages.
    """
    turn = Turn(keys, name)
    try:
        with _changed:
            for key in keys:
                _turns.setdefault(key, []).append(weakref.ref(turn))
        return turn
    except BaseException:  # Ctrl-C: its traceback may keep the turn alive as long as somebody keeps the traceback
        turn.end()
        raise


def _of(key: Hashable) -> list[Turn]:
    return [turn for one in _turns.get(key, ()) if (turn := one()) is not None]


def _in_forked_child() -> None:
    global _changed  # noqa: PLW0603 - its threads stayed in the parent
    _changed = threading.Condition()
    _turns.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
