"""Fates, pulses, rolls and roles on a board in memory, with clocks of our own."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt import errors
from fastckpt.errors import RanksError, RepositoryError, SaveError
from fastckpt.ranks import pulse
from fastckpt.ranks.board import BoardLostError, MemoryBoard
from fastckpt.ranks.fate import Fate
from fastckpt.ranks.pulse import Listener, Pulse, beat_s, silent_s
from fastckpt.ranks.roles import N_COMMITTERS, N_WATCHERS, commit_turn, committers, watches
from fastckpt.ranks.roll import Roll, remote_error
from fastckpt.ranks.team import look_s
from fastckpt.ranks.world import World
from fastckpt.repository.joint_commit import abandon, begin

SIZES = st.sampled_from([2, 3, 4, 8, 9, 64, 100, 1024, 16_384])


def fates(n: int, name: str = "1.0") -> list[Fate]:
    board = MemoryBoard()
    return [Fate(World(rank, n), board, name) for rank in range(n)]


# -- fates -------------------------------------------------------------------------------------------------------------


@given(st.permutations(["commit", "rank 1: torn", "rank 2: full"]))
def test_whoever_writes_a_fate_first_has_decided_it(order: list[str]) -> None:
    ranks = fates(3)
    said = [ranks[0].commit() if what == "commit" else ranks[1].abandon(what) for what in order]
    expected = None if order[0] == "commit" else order[0]
    assert said == [expected] * 3
    assert [rank.decided() for rank in ranks] == [expected or ""] * 3
    assert [rank.abandoned() for rank in ranks] == [expected] * 3


def test_votes_are_complete_when_the_last_has_voted() -> None:
    ranks = fates(3)
    for number in (2, 0):
        ranks[number].vote({"rank": number})
        assert not ranks[0].all_voted()
    assert ranks[0].votes() is None
    assert ranks[0].missing(5) == [1]
    ranks[1].vote({"rank": 1})
    assert ranks[0].all_voted()
    assert ranks[2].votes() == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert ranks[0].missing(5) == []


def test_a_vote_that_was_counted_twice_completes_nothing() -> None:
    """After an answer that was lost, it is told again."""
    ranks = fates(2)
    ranks[0].vote({})
    ranks[0].vote({})
    assert ranks[0].all_voted()
    assert ranks[0].votes() is None


def test_ranks_that_save_different_steps_find_out_at_once() -> None:
    ranks = fates(3)
    assert ranks[1].begin(10) is None
    assert ranks[0].begin(10) is None
    assert ranks[2].begin(11) == (1, 10)
    assert ranks[0].not_begun([0, 1, 2]) == []


def test_a_disagreement_is_an_error_on_every_rank() -> None:
    ranks = fates(2)
    begin(ranks[0], 0, 10)
    with pytest.raises(
        errors.AbandonedError, match="rank 0 saves step 10, and rank 1 step 11, at the same call"
    ) as own:
        begin(ranks[1], 1, 11)
    assert own.value.is_failure
    abandon(ranks[1], 1, own.value)
    why = ranks[0].abandoned()
    assert why is not None
    assert str(errors.AbandonedError(10, why)).startswith("step 10 was abandoned by all ranks: ranks disagree: rank 0")


def test_an_outcome_is_what_was_told_and_saves_do_not_meet() -> None:
    board = MemoryBoard()
    first, second = (Fate(World(0, 2), board, name) for name in ("1.0", "1.1"))
    first.finish({"digest": "00"})
    assert first.outcome() == {"digest": "00"}
    assert second.outcome() is None
    assert second.decided() is None


def test_what_is_forgotten_leaves_the_outcome() -> None:
    ranks = fates(2)
    for rank in ranks:
        rank.begin(1)
        rank.vote({})
    ranks[0].commit()
    ranks[0].finish({"digest": "00"})
    for rank in ranks:
        rank.forget()
    assert ranks[1].votes() is None
    assert ranks[1].outcome() == {"digest": "00"}
    assert ranks[1].decided() == ""


# -- pulses ------------------------------------------------------------------------------------------------------------


def test_a_rank_beats_when_it_is_time() -> None:
    now, board = [0.0], MemoryBoard()
    heart = Pulse(World(1, 4), board, lambda: now[0])
    for at_s in (0.0, 0.5, 1.9, 2.0, 2.1, 4.5):
        now[0] = at_s
        heart.beat()
    assert board.get("pulse/1") == b"3"


@pytest.mark.parametrize("size", [2, 16_384])
def test_silence_is_found_by_the_listeners_own_clock(size: int) -> None:
    now, board = [1e6], MemoryBoard()
    listener = Listener(World(0, size), board, lambda: now[0])
    hearts = [Pulse(World(rank, size), board, lambda: now[0] - 5e5) for rank in (0, 1)]  # clocks of others are wrong
    for heart in hearts:
        heart.beat()
    assert listener.silent([0, 1]) == []
    ended_s = now[0] + silent_s(size)
    while now[0] < ended_s:
        now[0] += 1.0
        hearts[0].beat()
        found = listener.silent([0, 1])
        assert 0 not in found
        assert (1 in found) == (now[0] > ended_s)
    now[0] += 1.0
    assert listener.silent([0, 1]) == [1]
    hearts[1].beat()
    assert listener.silent([0, 1]) == []  # it was only slow


def test_a_rank_that_was_never_heard_of_is_given_the_same_time() -> None:
    now = [0.0]
    listener = Listener(World(0, 2), MemoryBoard(), lambda: now[0])
    assert listener.silent([1]) == []
    now[0] = silent_s(2) / 2
    assert listener.silent([1]) == []
    now[0] = silent_s(2) + 0.1
    assert listener.silent([1]) == [1]


def test_whoever_did_not_listen_knows_of_no_silence() -> None:
    """A machine that stood still as a whole: the beats of the others did, too."""
    now = [0.0]
    listener = Listener(World(0, 2), MemoryBoard(), lambda: now[0])
    assert listener.silent([1]) == []
    now[0] = 1e4
    assert listener.silent([1]) == []
    now[0] += silent_s(2) / 2
    assert listener.silent([1]) == []
    now[0] += silent_s(2) / 2 + 0.1
    assert listener.silent([1]) == [1]


def test_a_standstill_counts_for_less_than_the_limit() -> None:
    """Two seconds of quiet, and then the machine stood still for nearly as long as a rank may be silent."""
    now, limit_s = [0.0], silent_s(2)
    listener = Listener(World(0, 2), MemoryBoard(), lambda: now[0])
    for gap_s in (0.0, 2.0, limit_s - 1.5):
        now[0] += gap_s
        assert listener.silent([1]) == []


@given(SIZES)
def test_requests_of_all_ranks_fit_into_a_second_of_one_store(size: int) -> None:
    """docs/scale.md: it answers 40,000; beats are not answered."""
    assert size / look_s(size) <= 8192
    assert size / beat_s(size) <= 4096
    assert silent_s(size) >= 3 * beat_s(size) + look_s(size)
    assert silent_s(size) <= 20


# -- roles -------------------------------------------------------------------------------------------------------------


@given(SIZES, st.sampled_from([1, 2, 4, 8]))
def test_every_rank_finds_the_same_committers_and_some_watchers(size: int, local_size: int) -> None:
    local_size = min(local_size, size)
    worlds = [World(rank, size, rank % local_size, local_size) for rank in range(size)]
    order = committers(worlds[0])
    assert order == committers(worlds[-1])
    assert order[0] == 0
    assert len(set(order)) == min(size, N_COMMITTERS)
    if size >= N_COMMITTERS * local_size:
        assert len({rank // local_size for rank in order}) == N_COMMITTERS
    assert [commit_turn(worlds[rank]) for rank in order] == list(range(len(order)))
    assert sum(commit_turn(world) is not None for world in worlds) == len(order)
    watching = sum(map(watches, worlds))
    assert min(size, N_WATCHERS) <= watching <= 2 * N_WATCHERS


# -- rolls -------------------------------------------------------------------------------------------------------------


class Threads:
    """Ranks as threads, whose pauses make a clock go on."""

    def __init__(self, n: int, come_s: float = 300.0) -> None:
        self.board, self._ticks = MemoryBoard(), itertools.count()
        self.rolls = [Roll(World(rank, n), self.board, come_s, self.clock, self.sleep) for rank in range(n)]
        self.found: list[Any] = [None] * n

    def clock(self) -> float:
        return next(self._ticks) * 1e-3

    def sleep(self, seconds: float) -> None:
        threading.Event().wait(1e-4)

    def run(self, calls: list[Callable[[Roll], Any] | None]) -> list[Any]:
        """What each rank's call has returned or raised; None: that rank does not come."""

        def work(rank: int, call: Callable[[Roll], Any]) -> None:
            try:
                self.found[rank] = call(self.rolls[rank])
            except BaseException as error:
                self.found[rank] = error

        threads = [
            threading.Thread(target=work, args=(rank, call), daemon=True)
            for rank, call in enumerate(calls)
            if call is not None
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.found


def test_rank_0_judges_what_all_say() -> None:
    def call(rank: int) -> Callable[[Roll], Any]:
        return lambda roll: [roll.decide("a", rank, sum), roll.decide("b", {"rank": rank}, lambda said: said[1])]

    assert Threads(3).run([call(0), call(1), call(2)]) == [[3, {"rank": 1}]] * 3


@pytest.mark.parametrize(
    "error", [RepositoryError("there are checkpoints"), SaveError("no"), TypeError("a Lock"), ValueError("every")]
)
def test_an_error_of_rank_0_is_raised_on_every_rank_by_its_type(error: Exception) -> None:
    def judge(said: list[Any]) -> None:
        raise error

    found = Threads(3).run([lambda roll: roll.decide("opening", None, judge)] * 3)
    assert [type(one) for one in found] == [type(error)] * 3
    assert [str(one) for one in found] == [str(error)] * 3


def test_an_error_that_takes_more_than_words_is_told_by_words() -> None:
    found = remote_error("CorruptCheckpointError", "damaged")
    assert isinstance(found, RanksError)
    assert "CorruptCheckpointError: damaged" in str(found)
    assert isinstance(remote_error("SystemExit", "2"), RanksError)
    assert isinstance(remote_error("KeyboardInterrupt", ""), RanksError)
    assert isinstance(remote_error("no_such_error", "x"), RanksError)


def test_a_rank_that_never_comes_is_named_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENT_S", 0.2)
    job = Threads(3, come_s=0.5)
    # Rank 0 beats, or rank 1 would miss it at the same moment.
    beats = iter(range(1 << 30))
    told, get = job.board, job.board.get
    monkeypatch.setattr(told, "get", lambda key: b"%d" % next(beats) if key == "pulse/0" else get(key))
    found = job.run([lambda roll: roll.decide("making a Checkpointer", None, len)] * 2 + [None])
    assert all(isinstance(one, RanksError) for one in found[:2]), found
    assert all("nothing was heard of rank 2 of 3" in str(one) for one in found[:2]), found


def test_a_rank_that_died_uncounted_has_said_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENT_S", 0.4)
    job = Threads(3)
    job.board.put("roll/1/2", b'{"what": "restoring", "said": 5}')
    assert job.run([lambda roll: roll.decide("restoring", 1, sum)] * 2 + [None])[:2] == [7, 7]


@pytest.mark.parametrize("verb", ["put", "join"])
def test_a_write_without_an_answer_is_made_again(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    """The rank lives and beats, so the others would wait for what it has to say."""
    job = Threads(2)
    write, fails = getattr(job.board, verb), iter([True, True])

    def late(*arguments: Any) -> None:
        if next(fails, False):
            raise BoardLostError("not within 2 s")
        write(*arguments)

    monkeypatch.setattr(job.board, verb, late)
    assert job.run([lambda roll: roll.decide("restoring", 1, sum)] * 2) == [2, 2]


def test_a_silent_rank_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SILENT_S", 0.2)
    found = Threads(2, come_s=0.5).run([None, lambda roll: roll.decide("restoring", None, len)])
    assert isinstance(found[1], RanksError)
    assert "nothing was heard of rank 0" in str(found[1])
