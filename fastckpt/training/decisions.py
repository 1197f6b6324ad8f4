"""What a call of `step` or `save_now` comes to for a process that trains alone: whether it saves, and whether it is the last one.

`joint_decisions` has the same for one rank of several.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

from fastckpt.host.deadline import Deadline
from fastckpt.spot import Notice
from fastckpt.spot.ladder import Rung
from fastckpt.training.ending import Ending
from fastckpt.training.engine import Engine
from fastckpt.training.save_queue import CommitHandle
from fastckpt.training.saver import Saver
from fastckpt.training.schedule import Due, Every
from fastckpt.writing.rank import SaveAsked


class Final(NamedTuple):
    """The last save of a run is made now."""

    notice: Notice
    rung: Rung | None = None
    """What the time allows, where that was agreed on; None: this process finds out."""


class Decisions(Protocol):
    """See the module. Used by the thread that trains."""

    raises_first: bool
    """Whether what has failed in the background is raised before a save is begun; else after it."""

    def begin_call(self) -> None:
        """A call of `step` has begun."""

    def final(self) -> Final | None:
        """Whether the run ends with this call. Raises what a worker's death was kept back for, if it does not."""

    def save_if_due(self, before: SaveAsked | None, asked: SaveAsked, now_s: float) -> None:
        """Begin a save, if one is due. before: the call before this one. now_s: time.monotonic() of this one."""

    def save_now(self, asked: SaveAsked) -> CommitHandle:
        """Begin a save. Waits for room."""

    def begin(self, asked: SaveAsked, deadline: Deadline) -> CommitHandle:
        """Begin the last save of a run. Waits for room. Errors as those of `Saver.begin`."""

    def restored(self) -> None:
        """The objects have gone back to a checkpoint: its steps come again."""


class OwnDecisions:
    """Those of a process that trains alone."""

    raises_first = True

    def __init__(self, engine: Engine, saver: Saver, ending: Ending, every: Every | None) -> None:
        """every: when saves are due; None: never."""
        self._torn, self._saver, self._ending = engine.torn, saver, ending
        self._due = Due(every)

    def begin_call(self) -> None:
        """Nobody else has to know."""

    def final(self) -> Final | None:
        notice = self._ending.notice_after_step()
        return None if notice is None else Final(notice)

    def save_if_due(self, before: SaveAsked | None, asked: SaveAsked, now_s: float) -> None:
        due = self._due
        since_s = now_s - self._saver.counts.begun_s
        before_step = None if before is None else before.step
        due.look(before_step, asked.step, since_s, asked.metrics, early=self._ending.may_go_early)
        due.repeat(self._torn.trigger_for(asked.step))
        if due.trigger is None or self._torn.is_lost(asked.step) or self._saver.is_saved(asked.step):
            return
        if self._saver.begin_due(replace(asked, trigger=due.trigger)) is not None:
            due.done()

    def save_now(self, asked: SaveAsked) -> CommitHandle:
        self._saver.refuse_other_state(asked)
        return self._saver.begin(asked)

    def begin(self, asked: SaveAsked, deadline: Deadline) -> CommitHandle:
        return self._saver.begin(asked, deadline)

    def restored(self) -> None:
        """What was saved is the incarnation's to know."""
