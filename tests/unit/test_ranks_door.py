"""Ranks of one start find each other in a store that an earlier start has written to."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from fastckpt.errors import RanksError
from fastckpt.ranks.board import StoreBoard
from fastckpt.ranks.door import Door, enter, knock, new_session
from fastckpt.ranks.roll import Roll
from fastckpt.ranks.world import World

N = 3


def lobby(store: Any) -> StoreBoard:
    return StoreBoard(store, "lobby/")


def opened(store: Any) -> tuple[Door, str, StoreBoard]:
    outside, session = lobby(store), new_session()
    inside = outside.beside(f"{session}/")
    return Door(World(0, N), outside, inside, session), session, inside


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def comes(store: Any, rank: int) -> str:
    outside = lobby(store)
    session = knock(World(rank, N), outside, 60.0)
    enter(World(rank, N), outside.beside(f"{session}/"))
    return session


@pytest.mark.parametrize("starts", [1, 3])
def test_ranks_of_each_start_get_the_session_of_their_own_rank_0(starts: int) -> None:
    store = HashStore()
    sessions = set()
    for _ in range(starts):
        early, found_early = in_thread(
            lambda: comes(store, 1)
        )  # before rank 0, which finds knocks of earlier starts too
        door, session, _ = opened(store)
        assert door.turn()
        late, found_late = in_thread(lambda: comes(store, 2))
        while door.turn():
            pass
        early.join()
        late.join()
        assert found_early == found_late == [session]
        sessions.add(session)
    assert len(sessions) == starts


def test_a_start_that_was_killed_half_way_is_no_harm() -> None:
    store = HashStore()
    with pytest.raises(RanksError):
        knock(World(2, N), lobby(store), 0.05)
    door, _, _ = opened(store)
    assert door.turn()
    second, session, _ = opened(store)
    threads = [in_thread(lambda rank=rank: comes(store, rank)) for rank in (1, 2)]  # type: ignore[misc]
    while second.turn():
        pass
    for thread, found in threads:
        thread.join()
        assert found == [session]


def test_who_waits_for_rank_0_in_vain_is_told_so() -> None:
    with pytest.raises(RanksError, match=r"nothing was heard of rank 0 for 0\.05 s \(join_timeout_s\)"):
        knock(World(1, N), lobby(HashStore()), 0.05)


def test_ranks_that_make_other_calls_are_told_what_each_does() -> None:
    board = StoreBoard(HashStore(), "")

    def saves() -> str:
        with pytest.raises(RanksError) as caught:
            Roll(World(1, 2), board, 60.0).decide("beginning to save", None, lambda _: 1)
        return str(caught.value)

    other, found = in_thread(saves)
    words = r"rank 0 is restoring, and rank 1 is beginning to save"
    with pytest.raises(RanksError, match=words):
        Roll(World(0, 2), board, 60.0).decide("restoring", None, lambda _: 1)
    other.join()
    assert re.search(words, found[0])


def test_a_rank_that_never_comes_is_named_after_the_time_for_coming() -> None:
    """It has no pulse: nobody waits until a silence could tell."""
    with pytest.raises(RanksError, match="nothing was heard of rank 1 of 2"):
        Roll(World(0, 2), StoreBoard(HashStore(), ""), 0.05).decide("restoring", None, lambda _: 1)


@pytest.mark.parametrize(("waits", "missed"), [(0, 1), (1, 0)])
def test_a_rank_that_lives_and_does_something_else_is_missed_where_all_meet(waits: int, missed: int) -> None:
    """Else both would wait for ever: this one here, the other one in the next collective of the training."""
    board = StoreBoard(HashStore(), "")
    board.put(f"pulse/{missed}", b"1")
    with pytest.raises(RanksError, match=rf"^restoring: rank {missed} of 2 lives, but has not made this call for"):
        Roll(World(waits, 2), board, 0.05).decide("restoring", None, lambda _: 1, meets=True)


def test_a_rank_at_work_for_the_same_call_is_waited_for() -> None:
    board = StoreBoard(HashStore(), "")
    board.put("pulse/1", b"1")
    waited: list[float] = []

    def sleep(pause_s: float) -> None:
        waited.append(pause_s)
        if len(waited) == 3:  # long after the time for coming
            board.join("roll/1", 1, b'{"what": "restoring", "said": 7}')

    found = Roll(World(0, 2), board, 0.0, sleep=sleep).decide("restoring", 6, lambda said: said)
    assert found == [6, 7]
    assert len(waited) == 3
