"""Many saves of ranks with wrong clocks, slow links, lost stores and deaths, under virtual time."""

from __future__ import annotations

import datetime
import json
import platform
import random
from pathlib import Path

import pytest

import fastckpt
from fastckpt import Every
from tests.distributed.simulated import Simulation

RESULT = Path(__file__).parent / "results" / "skewed_clocks.json"


def test_saves_by_time_with_skewed_clocks_and_one_slow_link() -> None:
    """The rank with a tenth of the others' rate holds all of them up. Takes some 5 s: 4 ranks, 12 threads."""
    skewed(seed=1, calls=400, at_least=40)


@pytest.mark.slow
def test_200_saves_by_time_with_skewed_clocks_and_one_slow_link() -> None:
    """The same for longer: some 30 s for each seed."""
    begun = {seed: skewed(seed, calls=3300, at_least=200) for seed in (1, 2)}
    found = {
        "date": datetime.date.today().isoformat(),
        "fastckpt": fastckpt.__version__,
        "python": platform.python_version(),
        "calls of step": 3300,
        "saves begun, committed (by seed)": begun,
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


def skewed(seed: int, calls: int, at_least: int) -> tuple[int, int]:
    """Saves that were begun, and those that all ranks have committed."""
    world = Simulation(
        4, seed=seed, every=Every(minutes=0.1), step_s=0.5, upload_s=lambda rank: 4.0 if rank == 2 else 0.4
    )
    world.run(calls)
    began = len({step for one in world.ranks for _, step in one.outcomes})
    print(seed, began, world.committed)
    assert began >= at_least
    assert world.committed >= 0.9 * began
    return began, world.committed


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_link_that_is_too_slow_for_the_interval(seed: int) -> None:
    """Ranks do not agree on a save for which one has no room: the slow link is always busy, and nothing is copied in vain."""
    world = Simulation(
        4, seed=seed, every=Every(minutes=0.1), step_s=0.5, upload_s=lambda rank: 14.0 if rank == 1 else 1.0
    )
    world.run(calls=300)
    began = len({step for one in world.ranks for _, step in one.outcomes})
    print(seed, began, world.committed)
    assert world.committed == began >= 9


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_by_steps_a_rank_without_room_has_a_save_abandoned_by_all(seed: int) -> None:
    world = Simulation(
        4, seed=seed, every=Every(steps=12), step_s=0.5, upload_s=lambda rank: 14.0 if rank == 1 else 1.0
    )
    world.run(calls=400)
    began = len({step for one in world.ranks for _, step in one.outcomes})
    print(seed, began, world.committed)
    assert 8 <= world.committed < began


def test_by_steps_no_round_is_needed() -> None:
    world = Simulation(3, seed=3, every=Every(steps=10), step_s=0.2, upload_s=lambda rank: 0.3)
    world.run(calls=200)
    assert world.committed == 20
    assert all(one.team.agreement._round.number == 0 for one in world.ranks)


@pytest.mark.parametrize("seed", range(6))
def test_a_rank_dies_at_any_moment(seed: int) -> None:
    """The others decide within 30 s what becomes of the save under way."""
    world = Simulation(4, seed=seed, every=Every(steps=20), step_s=0.2, upload_s=lambda rank: 1.0)
    victim, moment_s = world.ranks[seed % 4], 4.0 * world.dice.randint(2, 5) + world.dice.uniform(0, 2.5)
    waited: list[float] = []

    def kill() -> None:
        world.time.sleep(moment_s)
        victim.dead = True
        while any(one.jobs for one in world.ranks if not one.dead):
            world.time.sleep(0.1)
        waited.append(world.time.now_s - moment_s)

    world.time.spawn(kill)
    world.run(calls=150)
    print(seed, waited, world.ranks[(seed + 1) % 4].outcomes)
    assert waited[0] <= 30


def die_at_requests(seed: int, deaths: dict[int, int]) -> Simulation:
    """Four ranks save every fifth step; some die, each before so many requests of the board or the store. The others decide within 30 s."""
    world = Simulation(4, seed=seed, every=Every(steps=5), step_s=0.2, upload_s=lambda rank: 0.4)
    waited = [0.0]
    for rank, n in deaths.items():
        world.ranks[rank].requests.dies_at = n

    def watch() -> None:
        while not any(one.dead for one in world.ranks):
            if all(one.team._stop.is_set() for one in world.ranks):
                return
            world.time.sleep(0.1)
        died_s = world.time.now_s
        while any(one.jobs for one in world.ranks if not one.dead):
            world.time.sleep(0.1)
        waited[0] = world.time.now_s - died_s

    world.time.spawn(watch)
    world.run(calls=16)
    assert waited[0] <= 30, (seed, deaths, waited)
    return world


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_dies_before_any_of_its_requests(rank: int) -> None:
    """A third of them in `make test`, the others in `test_ranks_die_before_each_of_their_requests`."""
    whole = die_at_requests(1, {})
    assert whole.committed == 3
    for n in range(1 + rank % 3, whole.ranks[rank].requests.n, 3):
        die_at_requests(1, {rank: n})


@pytest.mark.parametrize("seed", range(2))
def test_two_ranks_die_before_any_of_their_requests(seed: int) -> None:
    two_die(seed, 30)


def two_die(seed: int, times: int) -> None:
    dice = random.Random(seed)
    for _ in range(times):
        die_at_requests(seed, {rank: dice.randrange(1, 108) for rank in dice.sample(range(4), 2)})


@pytest.mark.slow
def test_ranks_die_before_each_of_their_requests() -> None:
    """Some minutes: each request of each of four ranks in three saves, on three seeds; and two ranks at random."""
    swept, twice = 0, 500
    two_die(7, twice)
    for seed in (1, 2, 3):
        for rank in range(4):
            for n in range(1, die_at_requests(seed, {}).ranks[rank].requests.n):
                die_at_requests(seed, {rank: n})
                swept += 1
    found = {
        "date": datetime.date.today().isoformat(),
        "fastckpt": fastckpt.__version__,
        "python": platform.python_version(),
        "deaths of one rank": swept,
        "deaths of two": twice,
        "decided otherwise by others, or later than 30 s": 0,
    }
    (RESULT.parent / "each_request.json").write_text(json.dumps(found, indent=1) + "\n")


@pytest.mark.parametrize("seed", range(4))
def test_the_board_is_lost_for_all(seed: int) -> None:
    """The host of the store has died: votes in the repository decide, then and later."""
    world = Simulation(4, seed=seed, every=Every(minutes=0.1), step_s=0.5, upload_s=lambda rank: 1.0)
    from_s = 20 + world.dice.uniform(0, 10)
    for one in world.ranks:
        one.team.board.lost = lambda: world.time.now_s > from_s  # type: ignore[attr-defined]
    world.run(calls=200)
    print(seed, world.committed, world.tombstones())
    assert world.committed >= 5


@pytest.mark.parametrize("seed", range(4))
def test_the_board_is_lost_for_one_rank_for_a_while(seed: int) -> None:
    world = Simulation(4, seed=seed, every=Every(minutes=0.1), step_s=0.5, upload_s=lambda rank: 1.0)
    one, from_s = world.ranks[seed % 4], 20 + world.dice.uniform(0, 10)
    one.team.board.lost = lambda: from_s < world.time.now_s < from_s + 25  # type: ignore[attr-defined]
    world.run(calls=200)
    print(seed, world.committed, world.tombstones())
    assert world.committed >= 10


@pytest.mark.parametrize("seed", range(4))
def test_a_notice_ends_all_ranks_at_one_step(seed: int) -> None:
    """Also where the board is lost to all from the moment of the notice."""
    from fastckpt.spot import Notice

    world = Simulation(4, seed=seed, every=None, step_s=0.5, upload_s=lambda rank: 1.0)
    told = world.ranks[world.dice.randrange(4)]

    def tell() -> None:
        world.time.sleep(10)
        if seed % 2:
            for one in world.ranks:
                one.team.board.lost = lambda: True  # type: ignore[attr-defined]
        told.notice = Notice("terminate", "test", None)

    world.time.spawn(tell)
    world.run(calls=400)
    left = {one.left_at for one in world.ranks}
    print(seed, left)
    assert len(left) == 1
    assert None not in left
    assert world.committed == 1
