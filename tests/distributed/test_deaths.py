"""Ranks that are killed: what was acknowledged is restored, and no survivor waits long."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from tests.distributed import deaths, programs
from tests.support.ranks import Rank, join, run_ranks, started

DECIDED_S = 30.0
RESULTS = Path(__file__).parent / "results"


def acknowledged(ranks: list[Rank]) -> int:
    return max([0, *(int(step) for rank in ranks for step in re.findall(r"durable (\d+)", rank.log))])


def a_killed_rank(tmp_path: Path, seed: int) -> dict[str, Any]:
    """One round of the test. Returns what it did and found."""
    dice = random.Random(seed)
    n, mode = dice.choice([2, 3, 4]), dice.choice(["ddp", "ddp", "fsdp"] if programs.TRAINS_FSDP2 else ["ddp"])
    agent_store = dice.random() < 0.5
    victim, at_step, then_s = dice.randrange(n), dice.randint(1, 5), dice.uniform(0, 0.2)
    url = f"{tmp_path}/{seed}"
    with started(n, deaths.train_until_killed, url, mode, agent_store=agent_store) as ranks:
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
    shutil.rmtree(url)
    return {
        "acknowledged": known,
        "restored": steps[0],
        "decided_s": round(took_s, 1),
        "store_in_rank_0": not agent_store,
        "victim": victim,
    }


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_is_killed_at_random(tmp_path: Path, seed: int) -> None:
    """2–4 processes, started twice, and up to 4 s in which a rank that is silent is waited for."""
    a_killed_rank(tmp_path, seed)


@pytest.mark.slow
def test_many_ranks_are_killed_at_random(tmp_path: Path) -> None:
    """200 jobs: some 20 minutes."""
    seed = int(os.environ.get("FASTCKPT_TEST_SEED", "1"))
    rounds = [a_killed_rank(tmp_path, 1000 * seed + number) for number in range(200)]
    record(
        "killed_ranks",
        seed,
        killed=len(rounds),
        newer_than_acknowledged=sum(one["restored"] > one["acknowledged"] for one in rounds),
        lost=sum(one["restored"] < one["acknowledged"] for one in rounds),
        rank_0_with_the_store_killed=sum(one["store_in_rank_0"] and one["victim"] == 0 for one in rounds),
        decided_s_most=max(one["decided_s"] for one in rounds),
    )


@pytest.mark.slow
def test_who_commits_dies_many_times(tmp_path: Path) -> None:
    """51 jobs: some 5 minutes."""
    took_s = []
    for number in range(51):
        moment = ["before the fate", "before the put", "after the put"][number % 3]
        took_s.append(who_commits_dies(tmp_path / str(number), moment, agent_store=number % 2 == 0))
    record(
        "killed_committers",
        0,
        killed=len(took_s),
        committed_all_the_same=len(took_s),
        decided_s_most=round(max(took_s), 1),
    )


def record(name: str, seed: int, **figures: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    head = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "seed": seed}
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "fastckpt": fastckpt.__version__}
    (RESULTS / f"{name}.json").write_text(json.dumps({**head, **versions, **figures}, indent=1) + "\n")


def test_a_rank_dies_between_its_vote_and_the_count(tmp_path: Path) -> None:
    """All votes are there, and durable: the save is committed, and nobody waits until it has to be given up."""
    url = f"{tmp_path}/run"
    with started(3, deaths.die_uncounted, url, agent_store=True) as ranks:
        ranks[2].process.join(60)
        began = time.monotonic()
        join(ranks, DECIDED_S)
        print(f"decided in {time.monotonic() - began:.1f} s")
        assert [rank.result for rank in ranks[:2]] == [1, 1]
    assert run_ranks(3, programs.restored_step, url, "plain") == [1, 1, 1]


@pytest.mark.parametrize("moment", ["before the fate", "before the put", "after the put"])
@pytest.mark.parametrize("agent_store", [False, True])
def test_who_commits_dies(tmp_path: Path, moment: str, agent_store: bool) -> None:
    """Another rank commits; if the store of the process group has died too, by the votes in the repository."""
    who_commits_dies(tmp_path, moment, agent_store=agent_store)


def who_commits_dies(tmp_path: Path, moment: str, *, agent_store: bool) -> float:
    """Seconds until all others had their outcome."""
    url = f"{tmp_path}/run"
    with started(3, deaths.die_before_commit, url, moment, agent_store=agent_store) as ranks:
        ranks[0].process.join(60)
        began = time.monotonic()
        join(ranks, DECIDED_S)
        took_s = time.monotonic() - began
        print(f"{moment}, {agent_store}: {took_s:.1f} s")
        assert [rank.result for rank in ranks[1:]] == [1, 1]
    catalog = Catalog(Repository(LocalStore(url)))
    assert [checkpoint.step for checkpoint in catalog.history()] == [1]
    assert run_ranks(3, programs.restored_step, url, "plain") == [1, 1, 1]
    return took_s
