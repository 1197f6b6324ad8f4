"""At which call of `step` all ranks save, where the step alone does not say so: by time, after a notice, after a tear.

A round: one rank *wishes*; every rank *answers* how many calls it has begun, and from then on begins its next call only when the round is
decided; one rank *decides*: the call after the furthest. Every rank saves at that call. No rank waits for another one's training: answers
come from a thread beside it. A rank waits MAX_HOLD_S at most; if it is past the call by the time it learns of it, it has *missed* it: the
save is abandoned by all, and there is one more round.

Pure but for the board, and with the caller's clock: `turn` is called again and again, by one thread.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from fastckpt.ranks.board import Board, member_key, missing_members
from fastckpt.ranks.world import World

logger = logging.getLogger("fastckpt")
MAX_HOLD_S = 5.0
"""Longest that a call of `step` waits for a decision. An answer takes one look at the board, 2 s at most."""
HOLD_SHARE = 0.05
"""… and not more than this part of the time that a notice has left."""
VOID_S = 10.0
"""After which a round that lacks answers is given up: a rank that is there answers within two looks."""
_SHOWN = 20
N_DECIDERS = 3
"""Ranks 0 to 2 decide, each a second after the one before: whoever of them lives."""


@dataclass(frozen=True)
class Wish:
    """Why a rank wants all to save."""

    trigger: str
    """"interval", "rebalance", "torn" or "notice": see `SaveAsked`."""
    rank: int
    source: str = ""
    """Of a notice."""
    left_s: float | None = None
    """Of a notice: seconds until the machine goes; None: not known."""
    again: bool = False
    """A rank had missed the call that was decided before."""

    @property
    def ends_run(self) -> bool:
        """Whether the save is the last one of this run."""
        return self.trigger == "notice"


class Estimate(NamedTuple):
    """What a rank knows of its own saves. None: not known."""

    fresh_s: float | None
    """A save of the next step."""
    in_flight_s: float | None
    """What an earlier one still takes; 0: there is none."""
    has_room: bool = True
    """Whether a save can begin now, beside earlier ones."""


@dataclass(frozen=True)
class Decision:
    """The outcome of a round: the same on every rank."""

    number: int
    wish: Wish
    calls: int | None
    """The call at which all save; None: the round was given up."""
    fresh_s: float | None = None
    """The slowest rank's estimate."""
    in_flight_s: float | None = 0.0
    why: str = ""
    """Why it was given up."""
    lacks_room: bool = False
    """It was given up because a rank had no room for a save."""


@dataclass
class _Round:
    """What this rank has done in the round under way."""

    number: int
    wish: Wish | None = None
    answer: bytes = b""
    answered_s: float | None = None
    had_room: bool = True
    held_from: int | None = None
    """The first call that waits for the decision."""
    hold_s: float = 0.0
    """For how long, at most."""
    held_since_s: float | None = None


class Agreement:
    """See the module. `begin_call`, `must_wait` and `due` are for the thread that trains, `turn` for the one beside it, `wish` for any."""

    def __init__(
        self,
        world: World,
        board: Board,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: seconds."""
        self._world, self._board, self._clock = world, board, clock
        self.estimate: Callable[[], Estimate] = lambda: Estimate(None, 0.0)
        """Of this rank's saves, asked for every answer; any thread."""
        self.changed = threading.Condition()
        """Notified when `must_wait` may have become False."""
        self.calls = 0
        """Calls that have begun."""
        self.given_up: Decision | None = None
        """The last round that ended without a call, if it was to end the run."""
        self.postponed: str | None = None
        """The trigger of a save that could not begin, because this rank had no room for it."""
        self._round = _Round(0)
        self._wishes: list[Wish] = []
        self._due: list[Decision] = []

    # -- any thread ----------------------------------------------------------------------------------------------------

    def wish(self, wish: Wish) -> None:
        """Have all ranks save soon. Returns at once."""
        with self.changed:
            comes = any(
                d.wish.ends_run or not wish.ends_run for d in self._due
            )  # a save that was agreed on, and will do
            if not comes and not any(w.trigger == wish.trigger for w in self._wishes):
                self._wishes.append(wish)

    @property
    def is_open(self) -> bool:
        """Whether a round is under way here, or a wish waits for one."""
        return bool(self._wishes) or self._round.answered_s is not None

    # -- the thread that trains ----------------------------------------------------------------------------------------

    def begin_call(self) -> None:
        """One more call of `step` has begun."""
        with self.changed:
            self.calls += 1
            self._round.held_since_s = None

    def must_wait(self) -> float:
        """Seconds for which the call that has begun waits for a decision, at most; 0: it goes on."""
        with self.changed:
            here = self._round
            if here.held_from is None or self.calls < here.held_from:
                return 0.0
            now_s = self._clock()
            if here.held_since_s is None:
                here.held_since_s = now_s
            left_s = here.held_since_s + here.hold_s - now_s
            if left_s <= 0:  # once a round: training goes on
                here.held_from = None
            return max(0.0, left_s)

    def due(self) -> tuple[Decision | None, list[Decision]]:
        """What this call saves for, if it saves; and what should have been saved at an earlier call, which this rank has missed."""
        with self.changed:
            past = [d for d in self._due if d.calls is not None and d.calls <= self.calls]
            self._due = [d for d in self._due if d not in past]
        now = [d for d in past if d.calls == self.calls]
        missed = [d for d in past if d.calls != self.calls]
        for decision in missed:
            if not decision.wish.again:
                self.wish(replace(decision.wish, again=True))
        final = next((d for d in now if d.wish.ends_run), None)
        return final or (now[0] if now else None), missed

    # -- the thread beside it ------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """Look at the board once, and do what is to be done. Returns whether a round is under way. BoardLostError."""
        here = self._round
        if here.wish is None:
            said = self._board.get(f"wish/{here.number}")
            if said is None:
                if not self._wishes:
                    return False
                said = self._board.put_once(f"wish/{here.number}", _to_bytes(asdict(self._wishes[0])))
            here.wish = Wish(**json.loads(said))
        wish = here.wish
        if here.answered_s is None:
            self._answer(here, wish)
        decided = self._board.get(f"decision/{here.number}")
        if decided is None:
            decided = self._decide(here.number, wish)
        if decided is None:
            return True
        self._take(_decision(decided))
        return False

    def _answer(self, here: _Round, wish: Wish) -> None:
        estimate = self.estimate()
        with self.changed:
            here.hold_s = MAX_HOLD_S if wish.left_s is None else min(MAX_HOLD_S, HOLD_SHARE * wish.left_s)
            here.held_from, here.held_since_s, here.had_room = self.calls + 1, None, estimate.has_room
            here.answer = _to_bytes({"calls": self.calls, **estimate._asdict()})
        self.repeat_answer()
        here.answered_s = self._clock()

    def repeat_answer(self) -> None:
        """Give the answer of this round once more, as it was: it may have gone where not all look. BoardLostError."""
        self._board.join(f"answer/{self._round.number}", self._world.rank, self._round.answer)

    def waits_s(self) -> float:
        """Seconds since this rank has answered in the round under way; 0: there is none."""
        answered_s = self._round.answered_s
        return 0.0 if answered_s is None else self._clock() - answered_s

    def _decide(self, number: int, wish: Wish) -> bytes | None:
        """The decision that stands, if this rank is to make it and can."""
        waited_s = self.waits_s()
        rank, size = self._world.rank, self._world.size
        if rank >= N_DECIDERS or waited_s < rank:
            return None
        group = f"answer/{number}"
        answers, silent = None, None
        if waited_s >= VOID_S:
            silent = missing_members(self._board, group, size, _SHOWN + 1)
        if silent == [] or self._board.n_joined(group) >= size:
            answers = self._board.get_all([member_key(group, member) for member in range(size)])
        if answers is not None:
            decision = _decided(number, wish, [json.loads(answer) for answer in answers])
        elif silent:
            why = f"no answer of ranks {_some(silent)} within {VOID_S:g} s"
            decision = Decision(number, wish, None, why=why)
        else:
            return None
        return self._board.put_once(f"decision/{number}", _to_bytes(asdict(decision)))

    def _take(self, decision: Decision) -> None:
        wish = decision.wish
        if decision.calls is None:
            level = logging.INFO if decision.lacks_room else logging.WARNING
            logger.log(level, "ranks did not agree on a step to save (%s): %s", wish.trigger, decision.why)
        with self.changed:
            had_room, self._round = self._round.had_room, _Round(decision.number + 1)
            # Whoever only wants a save gets one; a run is ended by nothing but a wish that ends it.
            self._wishes = [w for w in self._wishes if w.ends_run and not wish.ends_run]
            if decision.calls is not None:
                self._due.append(decision)
            elif wish.ends_run:
                self.given_up = decision
            elif decision.lacks_room and not had_room:
                self.postponed = wish.trigger
            self.changed.notify_all()
        if self._world.leads:  # whoever is slow finds the decision
            group = f"answer/{decision.number}"
            self._board.delete([member_key(group, member) for member in range(self._world.size)])


def _decided(number: int, wish: Wish, answers: list[dict[str, Any]]) -> Decision:
    """The call after the furthest, and the estimates of the slowest; no call if a rank has no room, and the run goes on."""
    full = [rank for rank, answer in enumerate(answers) if not answer["has_room"]]
    if full and not wish.ends_run:
        why = f"ranks {_some(full)} have no room for a save beside earlier ones"
        return Decision(number, wish, None, why=why, lacks_room=True)
    fresh = [answer["fresh_s"] for answer in answers]
    in_flight = [answer["in_flight_s"] for answer in answers]
    return Decision(
        number,
        wish,
        max(answer["calls"] for answer in answers) + 1,
        fresh_s=None if None in fresh else max(fresh),
        in_flight_s=None if None in in_flight else max(in_flight),
    )


def _decision(data: bytes) -> Decision:
    value = json.loads(data)
    return Decision(**{**value, "wish": Wish(**value["wish"])})


def _to_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:_SHOWN])) + (" and more" if len(ranks) > _SHOWN else "")
