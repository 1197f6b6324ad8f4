"""Ranks that are killed: what was acknowledged is restored, and no survivor waits long."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from tests.distributed import programs
from tests.support.ranks import Rank, join, run_ranks, started

DECIDED_S = 30.0


def acknowledged(ranks: list[Rank]) -> int:
    return max([0, *(int(step) for rank in ranks for step in re.findall(r"durable (\d+)", rank.log))])


def a_killed_rank(tmp_path: Path, seed: int) -> str:
    """One round of the test. Returns what it did, in words."""
    dice = random.Random(seed)
    n, mode = dice.choice([2, 3, 4]), "ddp"
    agent_store = dice.random() < 0.5
    victim, at_step, then_s = dice.randrange(n), dice.randint(1, 5), dice.uniform(0, 0.2)
    url = f"{tmp_path}/{seed}"
    with started(n, programs.train_until_killed, url, mode, agent_store=agent_store) as ranks:
        ranks[victim].wait_for(f"durable {at_step}")
        time.sleep(then_s)
        ranks[victim].kill()
        killed_s = time.monotonic()
        known = acknowledged(ranks)
        join(ranks, DECIDED_S)
        took_s = time.monotonic() - killed_s
        known = max(known, acknowledged(ranks))
    steps = run_ranks(n, programs.restored_step, url, mode)
    words = f"{seed}: {n} ranks, {mode}, rank {victim} at {at_step}: acknowledged {known}, restored {steps}, decided in {took_s:.1f} s"
    print(words)
    assert set(steps) == {steps[0]}, words
    assert steps[0] >= known, words
    return words


@pytest.mark.parametrize("seed", range(5))
def test_a_rank_is_killed_at_random(tmp_path: Path, seed: int) -> None:
    """2–4 processes, started twice, and up to 4 s in which a rank that is silent is waited for."""
    a_killed_rank(tmp_path, seed)


@pytest.mark.parametrize("moment", ["before the fate", "before the put", "after the put"])
@pytest.mark.parametrize("agent_store", [False, True])
def test_who_commits_dies(tmp_path: Path, moment: str, agent_store: bool) -> None:
    """Another rank commits; if the store of the process group has died too, by the votes in the repository."""
    url = f"{tmp_path}/run"
    with started(3, programs.die_before_commit, url, moment, agent_store=agent_store) as ranks:
        ranks[0].process.join(60)
        began = time.monotonic()
        join(ranks, DECIDED_S)
        print(f"{moment}, {agent_store}: {time.monotonic() - began:.1f} s")
        assert [rank.result for rank in ranks[1:]] == [1, 1]
    catalog = Catalog(Repository(LocalStore(url)))
    assert [checkpoint.step for checkpoint in catalog.history()] == [1]
    assert run_ranks(3, programs.restored_step, url, "plain") == [1, 1, 1]
