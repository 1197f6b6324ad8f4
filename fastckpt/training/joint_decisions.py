"""What a call of `step` or `save_now` comes to for one rank of several: all ranks save at the same call, or none does.

By steps every rank decides alone, and alike. All else is a *wish* of one rank, of which the agreement makes a call at which all save. If
one rank cannot make its part of a save, all abandon it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

from fastckpt.events import logger
from fastckpt.host.deadline import Deadline
from fastckpt.ranks.agreement import Decision, Estimate, Wish
from fastckpt.repository.joint_commit import JointTurn, abandon
from fastckpt.spot import Notice
from fastckpt.spot.ladder import Rung, rung_of
from fastckpt.training.decisions import Final
from fastckpt.training.ending import Ending
from fastckpt.training.engine import Engine
from fastckpt.training.save_queue import MAX_JOBS, CommitHandle
from fastckpt.training.saver import Saver
from fastckpt.training.schedule import Due, Every
from fastckpt.writing.rank import SaveAsked


class JointDecisions:
    """See the module. Used by the thread that trains. Thirteen attributes: five are the parts of this run that decisions need."""

    raises_first = False  # the other ranks begin the save that is due, and would wait for this one's part

    def __init__(self, engine: Engine, saver: Saver, ending: Ending, every: Every | None) -> None:
        """every: when saves are due; None: never. By minutes, and by a function, as rank 0 finds."""
        assert engine.team is not None
        self._team, self._queue, self._torn = engine.team, engine.queue, engine.torn
        self._saver, self._ending = saver, ending
        self._by_steps = Due(None if every is None or every.steps is None else Every(steps=every.steps))
        others = every if every is None or every.steps is None else replace_steps(every)
        self._by_rank_0 = Due(others if self._team.world.leads else None)
        self._wished_end = False
        self._decided: Decision | None = None
        """For the call under way."""
        self._extra = 0
        """Saves of the call under way so far."""
        self._tries: dict[int, int] = {}
        """Step → saves of it so far, by the same rule on every rank."""
        self._named = -1
        """The highest step of which a save was due: it is due once."""
        self._team.agreement.estimate = self._estimate

    def _estimate(self) -> Estimate:
        measured_s = self._queue.measured_s
        return Estimate(measured_s, measured_s if len(self._queue) else 0.0, len(self._queue) < MAX_JOBS)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def begin_call(self) -> None:
        self._extra = 0
        self._team.begin_call()
        self._decided, missed = self._team.agreement.due()
        for decision in missed:
            fate, rank = self._team.fate(f"{decision.calls}.0"), self._team.world.rank
            words = f"rank {rank} was past call {decision.calls} before it learned that all save there"
            logger.warning("%s: that save is abandoned, and ranks agree on another", words)
            self._team.later(lambda fate=fate, words=words: fate.abandon(words))  # type: ignore[misc]

    def final(self) -> Final | None:
        notice = self._ending.notice_after_step()
        decided, given_up = self._decided, self._team.agreement.given_up
        if decided is not None and decided.wish.ends_run:
            rung = rung_of(_left_s(decided), decided.fresh_s, decided.in_flight_s)
            return Final(notice or _notice_of(decided.wish), rung)
        if notice is not None and given_up is not None:  # ranks cannot agree any more: what is under way is let finish
            return Final(notice, Rung.FINISH)
        if notice is not None and not self._wished_end:
            self._wished_end = True
            left_s = notice.seconds_left(time.monotonic())
            self._team.agreement.wish(Wish("notice", self._team.world.rank, source=notice.source, left_s=left_s))
        return None

    def save_if_due(self, before: SaveAsked | None, asked: SaveAsked, now_s: float) -> None:
        before_step = None if before is None else before.step
        self._by_steps.look(before_step, asked.step, 0.0, {}, early=False)
        self._look_for_wishes(before_step, asked, now_s)
        trigger = self._by_steps.trigger or (None if self._decided is None else self._decided.wish.trigger)
        self._by_steps.done()
        if trigger is None or asked.step <= self._named:
            return
        self._named = asked.step
        with self.turn(asked.step) as turn:
            if self._saver.begin_due(replace(asked, trigger=trigger), turn) is None:
                self._team.agreement.postponed = trigger
                rank = self._team.world.rank
                self._team.later(lambda: turn.fate.abandon(f"rank {rank} had no room for it beside earlier saves"))

    def _look_for_wishes(self, before_step: int | None, asked: SaveAsked, now_s: float) -> None:
        """Wish for a save, where this rank finds that one is due: it comes a call later, or two."""
        agreement, rank = self._team.agreement, self._team.world.rank
        since_s = now_s - self._saver.counts.begun_s
        due = self._by_rank_0
        due.look(before_step, asked.step, since_s, asked.metrics, early=self._ending.may_go_early)
        triggers = [due.trigger, self._torn.trigger_for(asked.step) and "torn"]
        if len(self._queue) < MAX_JOBS:
            triggers.append(agreement.postponed)
            agreement.postponed = None
        else:
            triggers = [None]  # after the end of an earlier save
        for trigger in triggers:
            if trigger is not None and self._decided is None:
                agreement.wish(Wish(trigger, rank))
                due.done()

    def save_now(self, asked: SaveAsked) -> CommitHandle:
        """Every rank has to call it, for the same step."""
        self._saver.wait_for_step(asked.step)  # by then all ranks know what became of it
        with self.turn(asked.step) as turn:
            self._saver.refuse_other_state(asked)
            self._named = max(self._named, asked.step)
            return self._saver.begin(asked, turn=turn)

    def begin(self, asked: SaveAsked, deadline: Deadline) -> CommitHandle:
        with self.turn(asked.step) as turn:
            return self._saver.begin(asked, deadline, turn)

    def restored(self) -> None:
        self._named, self._tries, self._team.agreement.postponed = -1, {}, None

    # -- saves ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def turn(self, step: int) -> Iterator[JointTurn]:
        """The next save that all ranks make. An error inside has it abandoned by all."""
        name = f"{self._team.agreement.calls}.{self._extra}"
        self._extra += 1
        self._tries = {other: n for other, n in self._tries.items() if other >= step}
        attempt = self._tries.get(step, 0)
        self._tries[step] = attempt + 1
        turn = JointTurn(self._team.fate(name), attempt)
        try:
            yield turn
        except BaseException as raised:
            error = raised
            self._team.later(lambda: abandon(turn.fate, self._team.world.rank, error))
            raise


def replace_steps(every: Every) -> Every | None:
    """What is left of a rule without its steps."""
    if every.minutes is None and every.when is None:
        return None
    return replace(every, steps=None)


def _left_s(decided: Decision) -> float | None:
    return decided.wish.left_s


def _notice_of(wish: Wish) -> Notice:
    """Another rank's notice, in this rank's hands."""
    deadline_s = None if wish.left_s is None else time.monotonic() + wish.left_s
    return Notice("terminate", f"rank {wish.rank} ({wish.source})", deadline_s, "another rank's notice")
