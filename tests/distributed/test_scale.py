"""A save of 1,024 ranks, simulated: the requests of each, how long all wait, and that they agree. benchmarks/scale.py has more."""

from __future__ import annotations

import pytest

from benchmarks.scale_simulation import SCENARIOS, Plan, Save, agreement, one_save

MEAN, POLLING = 4.0, 60
"""Requests of a store for one save: of all ranks, but for their packs, and of a rank that looks for the outcome there."""
DECIDED_S = 30.0
OF_BOARD_PER_SECOND = 20_000
"""Half of what a store of torch.distributed answered where it was measured (docs/scale.md)."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_one_save_of_1024_ranks(name: str) -> None:
    found = one_save(name, 1024)
    print(found)
    assert found["outcome"] == ("abandoned" if "uploads" in name else "committed")
    assert found["store requests per rank, mean"] <= MEAN
    assert found["store requests of the busiest rank, votes read apart"] <= POLLING
    assert found["seconds until all know"] <= DECIDED_S
    assert found["board requests in the busiest second"] <= OF_BOARD_PER_SECOND
    assert found["commit record, bytes"] < 256 * 1024
    if "lost" not in name:  # a job of months leaves some bytes for each save, and not for each rank of it
        assert found["board keys left"] <= 1024 + 8


@pytest.mark.parametrize("seed", range(6))
def test_all_committers_die_at_once(seed: int) -> None:
    """Three nodes are gone; those that are left agree. Uploads take 10 to 20 s: from seed 5 on the save may be over by then."""
    found = Save(Plan(128, seed, dead=dict.fromkeys((0, 8, 16), 14.0 + 1.3 * seed))).run()
    print(found)
    assert found["outcome"] == "abandoned" or seed == 5
    assert found["seconds until all know"] <= DECIDED_S


@pytest.mark.parametrize("seed", range(8))
def test_the_board_is_lost_at_any_moment(seed: int) -> None:
    """Its host is rank 0's, which dies with it."""
    found = Save(Plan(64, seed, lost_from_s=19.0 + seed / 4, dead={0: 19.0 + seed / 4})).run()
    print(found)
    assert found["outcome"] in ("committed", "abandoned")


def test_one_round_of_1024_ranks() -> None:
    found = agreement(1024)
    print(found)
    assert found["ranks that missed the call"] == 0
    assert found["longest hold of a step, seconds"] <= 2
    assert found["board requests per second, idle"] <= 4000
    assert found["board requests in the busiest second of a round"] <= OF_BOARD_PER_SECOND
