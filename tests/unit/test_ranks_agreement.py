"""Agreement without deaths: in whatever order ranks train and look at the board, all save at the same call, and none is held too long."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.ranks.agreement import HOLD_SHARE, MAX_HOLD_S, VOID_S, Agreement, Decision, Estimate, Wish
from fastckpt.ranks.board import MemoryBoard
from fastckpt.ranks.world import World

TICK_S = 1e-3


@dataclass
class Rank:
    """One rank, whose training is made of three moments: a call begins, it looks whether it has to wait, it looks whether it saves."""

    agreement: Agreement
    clock: Callable[[], float]
    moment: str = "begin"
    began_s: float = 0.0
    longest_s: float = 0.0
    saved: list[int] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)

    def train(self) -> None:
        if self.moment == "begin":
            self.agreement.begin_call()
            self.began_s, self.moment = self.clock(), "wait"
        elif self.moment == "wait":
            if self.agreement.must_wait() <= 0:
                self.longest_s = max(self.longest_s, self.clock() - self.began_s)
                self.moment = "save"
        else:
            decision, missed = self.agreement.due()
            if decision is not None:
                assert decision.calls == self.agreement.calls
                self.saved.append(decision.calls)
            self.missed += [one.calls for one in missed if one.calls is not None]
            self.moment = "begin"


class Job:
    def __init__(self, n: int) -> None:
        self.now_s = 0.0
        self.board = MemoryBoard()
        self.ranks = [
            Rank(Agreement(World(rank, n), self.board, lambda: self.now_s), lambda: self.now_s) for rank in range(n)
        ]

    def act(self, rank: int, what: str, seconds: float = TICK_S) -> None:
        self.now_s += seconds
        one = self.ranks[rank % len(self.ranks)]
        if what == "look":
            one.agreement.turn()
        elif what == "train":
            one.train()
        else:
            one.agreement.wish(Wish(what, rank % len(self.ranks)))

    def settle(self, seconds: float = TICK_S) -> None:
        """Every rank gets its turns, until all rounds are over and what was decided has come."""
        for _ in range(400):
            for rank in range(len(self.ranks)):
                self.act(rank, "look", seconds)
                self.act(rank, "train", seconds)
            if not any(one.agreement.is_open or one.agreement._due for one in self.ranks):
                break
        else:
            raise AssertionError("the ranks do not come to rest")
        last = max(one.agreement.calls for one in self.ranks)
        while any(one.agreement.calls < last or one.moment != "begin" for one in self.ranks):
            for one in self.ranks:
                if one.agreement.calls < last or one.moment != "begin":
                    one.train()


ACTIONS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(["look", "look", "train", "train", "train", "interval", "torn"])),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(n=st.integers(2, 4), actions=ACTIONS)
def test_all_save_at_the_same_calls_while_nobody_is_slow(n: int, actions: list[tuple[int, str]]) -> None:
    job = Job(n)
    job.act(0, "interval")
    for rank, what in actions:
        job.act(rank, what)
    job.settle()
    first = job.ranks[0]
    assert first.saved
    for one in job.ranks:
        assert one.saved == first.saved
        assert one.missed == []


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(2, 4),
    actions=st.lists(
        st.tuples(
            st.integers(0, 3), st.sampled_from(["look", "train", "train", "interval"]), st.sampled_from([0.001, 0.5, 3])
        ),
        max_size=80,
    ),
)
def test_a_slow_rank_misses_a_call_and_says_so(n: int, actions: list[tuple[int, str, float]]) -> None:
    """A call that one rank has missed is missed by it alone, it knows, and after that there is another one that all save at."""
    job = Job(n)
    job.act(0, "interval")
    for rank, what, seconds in actions:
        job.act(rank, what, seconds)
    job.settle()
    decided = {call for one in job.ranks for call in [*one.saved, *one.missed]}
    for one in job.ranks:
        assert sorted([*one.saved, *one.missed]) == sorted(decided)
        # It is let go at the first look after the limit: here after 3 s for each of two actions of four ranks.
        assert one.longest_s <= MAX_HOLD_S + 3.0 * len(actions)
    missed = {call for one in job.ranks for call in one.missed}
    assert not decided or max(decided) not in missed


@settings(max_examples=200, deadline=None)
@given(left_s=st.none() | st.floats(0.1, 1000), at_s=st.floats(0, 100))
def test_a_call_is_held_no_longer_than_the_limit(left_s: float | None, at_s: float) -> None:
    """The other rank never answers. After a notice the limit is a part of what is left."""
    job = Job(2)
    job.now_s = at_s
    agreement = job.ranks[0].agreement
    agreement.wish(Wish("notice", 0, left_s=left_s))
    agreement.turn()
    agreement.begin_call()
    limit_s = MAX_HOLD_S if left_s is None else min(MAX_HOLD_S, HOLD_SHARE * left_s)
    assert agreement.must_wait() == pytest.approx(limit_s)
    job.now_s += limit_s / 2
    assert 0 < agreement.must_wait() <= limit_s / 2 + 1e-6
    job.now_s += limit_s / 2 + 1e-6
    assert agreement.must_wait() == 0
    agreement.begin_call()
    assert agreement.must_wait() == 0  # once a round


def test_the_call_after_the_furthest() -> None:
    job = Job(3)
    for rank, calls in enumerate((4, 9, 7)):
        for _ in range(calls):
            job.ranks[rank].agreement.begin_call()
    job.act(1, "interval")
    for rank in (0, 1, 2, 0):
        job.act(rank, "look")
    assert json.loads(job.board.get("decision/0") or b"")["calls"] == 10


def test_the_slowest_estimate_counts_and_an_unknown_one_is_unknown() -> None:
    for estimates, fresh_s in ([(2.0, 0.0), (5.0, 1.0)], 5.0), ([(2.0, 0.0), (None, 0.0)], None):
        job = Job(2)
        for one, estimate in zip(job.ranks, estimates, strict=True):
            one.agreement.estimate = lambda estimate=estimate: Estimate(*estimate)  # type: ignore[misc]
        job.act(0, "interval")
        for rank in (0, 1, 0):
            job.act(rank, "look")
        assert json.loads(job.board.get("decision/0") or b"")["fresh_s"] == fresh_s


@pytest.mark.parametrize("trigger", ["interval", "notice"])
def test_a_rank_without_room_stops_a_save_but_not_the_end_of_a_run(trigger: str) -> None:
    job = Job(2)
    job.ranks[1].agreement.estimate = lambda: Estimate(None, None, has_room=False)
    job.act(0, trigger)
    for rank in (0, 1, 0, 1):
        job.act(rank, "look")
    decision = json.loads(job.board.get("decision/0") or b"")
    assert (decision["calls"] is None) == (trigger == "interval")
    if trigger == "interval":
        assert "ranks 1 have no room" in decision["why"]
        assert [one.agreement.postponed for one in job.ranks] == [None, "interval"]


def test_a_round_that_lacks_an_answer_is_given_up_by_name() -> None:
    job = Job(3)
    job.act(0, "notice")
    for rank in (0, 2):
        job.act(rank, "look")
    job.act(0, "look", VOID_S)
    given_up: Decision | None = job.ranks[0].agreement.given_up
    assert given_up is not None
    assert given_up.why == f"no answer of ranks 1 within {VOID_S:g} s"
    job.act(1, "look")
    assert job.ranks[1].agreement.given_up == given_up


def test_an_answer_that_was_not_counted_is_an_answer() -> None:
    """Its rank has died between the two: the round is not given up for the lack of nobody's answer."""
    job = Job(2)
    job.act(0, "interval")
    job.board.put("answer/0/1", b'{"calls": 3, "fresh_s": null, "in_flight_s": 0.0, "has_room": true}')
    job.act(0, "look")
    assert job.board.get("decision/0") is None
    job.act(0, "look", VOID_S)
    assert [one.calls for one in job.ranks[0].agreement._due] == [4]


def test_another_decider_where_the_first_is_silent() -> None:
    """Rank 0 has answered and then hangs: rank 1 decides a second later."""
    job = Job(3)
    job.act(0, "interval")
    for rank in (0, 1, 2, 1, 2):
        job.act(rank, "look")
    assert job.board.get("decision/0") is None
    job.act(1, "look", 1.0)
    assert job.board.get("decision/0") is not None


def test_a_notice_goes_before_a_wish_and_is_not_forgotten() -> None:
    """A round for a save is under way when the notice comes: the next round is the notice's."""
    job = Job(2)
    job.act(0, "interval")
    job.act(0, "look")
    job.act(1, "notice")
    job.settle()
    found: list[Any] = [json.loads(job.board.get(f"wish/{number}") or b"{}").get("trigger") for number in (0, 1)]
    assert found == ["interval", "notice"]
