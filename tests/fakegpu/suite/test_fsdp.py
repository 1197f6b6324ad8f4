"""FSDP2 on two ranks: each one's shards are saved whole, in every schedule and without a report.

Over 5 s: two processes start torch, meet, and train some fifty times between them (fsdp_worker.py). The tests then read what they found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakegpu.suite.fsdp_worker import BUGS, OPTIMIZERS, RANKS
from tests.fakegpu.suite.schedules import ALL, Schedule

ROOT = Path(__file__).parents[3]
# The runs of all tests are made in the set-up of the first.
pytestmark = pytest.mark.timeout(900)
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=[f"gpu-{schedule}" for schedule in ALL])
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has found: by schedule and by what was run."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "error", "-m", "tests.fakegpu.suite.fsdp_worker"]
    # A queued operation is run by whichever thread of the host needs it, and a product that is split between two threads is rounded in
    # another way. torch.set_num_threads would speak for the main thread only.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # "threads" cannot be left.
    schedules = json.dumps(sorted(ALL, key=lambda schedule: schedule.name == "threads"))
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(RANKS):
            with (folder / f"rank{rank}.log").open("wb") as log:
                arguments = [*command, str(rank), str(folder), schedules]
                running.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log))
        codes = [process.wait(800) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"rank{rank}.log").read_text(errors="replace")[-5000:] for rank in range(RANKS))
    assert codes == [0] * RANKS, logs
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@every_optimizer
def test_training_on_two_gpus_is_that_of_one_host(ranks: list[dict[str, Any]], optimizer: str) -> None:
    assert all(found[optimizer]["learns"] for found in ranks)


@every_schedule
@every_optimizer
def test_shards_are_those_of_their_step(ranks: list[dict[str, Any]], optimizer: str, schedule: Schedule) -> None:
    for rank, found in enumerate(ranks):
        one = found[f"{schedule.name}-{schedule.seed}-{optimizer}"]
        assert not one["reports"], f"rank {rank}"
        assert not one["wrong"], f"rank {rank}: the checkpoints of these steps hold something else"


@every_schedule
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_reported_by_each_rank(ranks: list[dict[str, Any]], bug: str, schedule: Schedule) -> None:
    for rank, found in enumerate(ranks):
        assert any("RACE" in text for text in found[f"{schedule.name}-{schedule.seed}-{bug}"]["reports"]), (
            f"rank {rank}"
        )
