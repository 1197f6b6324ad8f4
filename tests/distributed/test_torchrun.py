"""The examples under real torchrun: workers that die, notices, ranks that never come. Each agent and its two workers take 8 s to start."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from tests.distributed import programs
from tests.support.ranks import join, started
from tests.support.torchrun import EXAMPLES, Agent, torchrun

EXAMPLE = EXAMPLES / "train_ddp.py"
STEPS = 40
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Otherwise gloo and NCCL may find addresses of the dead workers in the agent's store: docs/how-to/many-ranks.md."""
SETTINGS = ("--steps", STEPS, "--every", 5, "--digest")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Digests of both ranks after a run that nothing disturbs."""
    return digests_of(EXAMPLE, tmp_path_factory.mktemp("undisturbed"))


def digests_of(example: Path, folder: Path) -> list[str]:
    """Of a run that nothing disturbs, without an agent: its ranks start in a tenth of the time."""
    with started(2, programs.run_script, str(example), str(folder / "run"), *map(str, SETTINGS)) as ranks:
        join(ranks)
        digests = [digest for rank in ranks for digest in re.findall(r"rank \d+: ([0-9a-f]{64})\b", rank.log)]
        assert len(set(digests)) == 2, [rank.log for rank in ranks]
    return digests


def durable_steps(url: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Catalog(Repository(LocalStore(str(url)))).history()]


def restored(agent: Agent) -> list[int]:
    return [int(step) for step in agent.found(r"restored (\d+)")]


def test_a_killed_worker_is_started_again_and_training_goes_on(tmp_path: Path, undisturbed: list[str]) -> None:
    """torchrun starts both workers again, twice. Rank 0's death takes the board with it. Some 30 s."""
    with torchrun(
        tmp_path / "log",
        EXAMPLE,
        tmp_path / "run",
        *SETTINGS,
        flags=("--standalone", "--max-restarts", "2"),
        PAUSE_S="0.1",
        **RESTARTS,
    ) as agent:
        for times, victim, durable in ((1, 1, "5|10"), (2, 0, "20|25|30")):  # the other rank, and the one that leads
            agent.wait_for(rf"durable (?:{durable})\n")
            pid = agent.worker(victim)
            os.kill(pid, signal.SIGKILL)
            agent.wait_for(r"pid (\d+)", 2 * (times + 1))
        assert agent.wait() == 0, agent.log
    steps = restored(agent)
    assert len(steps) == 6, agent.log
    for start in range(0, 6, 2):
        assert steps[start] == steps[start + 1]
    assert steps[0] == 0
    assert steps[2] >= 5
    assert steps[4] >= 20
    assert agent.digests == undisturbed
    assert durable_steps(tmp_path / "run")[0] == STEPS


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch trains on no CPU")
def test_fsdp2_goes_on_too(tmp_path: Path) -> None:
    """Shards of both ranks. Takes some 20 s: torchrun starts both workers twice."""
    example = EXAMPLES / "train_fsdp2.py"
    with torchrun(
        tmp_path / "log",
        example,
        tmp_path / "run",
        *SETTINGS,
        flags=("--standalone", "--max-restarts", "1"),
        PAUSE_S="0.1",
        **RESTARTS,
    ) as agent:
        agent.wait_for(r"durable (?:5|10)\n")
        os.kill(agent.worker(1), signal.SIGKILL)
        assert agent.wait() == 0, agent.log
    assert min(restored(agent)[2:]) >= 5
    assert agent.digests == digests_of(example, tmp_path / "undisturbed")


def test_a_notice_to_the_agent_ends_all_ranks_at_one_durable_step(tmp_path: Path, undisturbed: list[str]) -> None:
    """torchrun passes SIGTERM on to its workers, waits for them, and ends with a status of its own. Takes some 15 s."""
    with torchrun(tmp_path / "log", EXAMPLE, tmp_path / "run", *SETTINGS, PAUSE_S="0.1") as agent:
        agent.wait_for(r"step (7) ")
        agent.process.send_signal(signal.SIGTERM)
        assert agent.wait() == 1, agent.log
    left = agent.found(r"left at (\d+) with 75")
    assert len(left) == 2, agent.log
    assert left[0] == left[1]
    assert durable_steps(tmp_path / "run")[0] == int(left[0])
    assert digests_of(EXAMPLE, tmp_path) == undisturbed, "it goes on from there"


def test_workers_that_a_notice_has_ended_are_started_again(tmp_path: Path, undisturbed: list[str]) -> None:
    """Their status 75 is a failure for torchrun: with --max-restarts it starts them on the same machine. Takes some 20 s."""
    notice = tmp_path / "notice"
    with torchrun(
        tmp_path / "log",
        EXAMPLE,
        tmp_path / "run",
        *SETTINGS,
        flags=("--standalone", "--max-restarts", "1"),
        PAUSE_S="0.1",
        FASTCKPT_NOTICE_FILE=str(notice),
        **RESTARTS,
    ) as agent:
        agent.wait_for(r"step (7) ")
        notice.write_text("60\n")
        agent.wait_for(r"left at (\d+) with 75", 2)
        notice.unlink()
        assert agent.wait() == 0, agent.log
    left = [int(step) for step in agent.found(r"left at (\d+) with 75")]
    assert restored(agent) == [0, 0, *left]
    assert agent.digests == undisturbed


@pytest.mark.parametrize("absent", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_never_makes_its_checkpointer(tmp_path: Path, absent: int) -> None:
    """The other one says so within join_timeout_s, and torchrun ends both. Takes some 15 s."""
    with torchrun(
        tmp_path / "log",
        EXAMPLE,
        tmp_path / "run",
        *SETTINGS,
        NEVER_COMES=str(absent),
        FASTCKPT_JOIN_TIMEOUT_S="3",
    ) as agent:
        agent.wait_for(r"(stays away)")
        began = time.monotonic()
        agent.wait_for(rf"RanksError: making a Checkpointer: nothing was heard of (rank {absent})\b")
        assert time.monotonic() - began < 60  # 3 s, but for a machine that is busy
        assert agent.wait() == 1
