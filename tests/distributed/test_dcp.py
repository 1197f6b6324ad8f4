"""torch.distributed.checkpoint over fastckpt, by real ranks."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fastckpt.cli import main
from fastckpt.dcp import FastckptReader
from tests.distributed.dcp_programs import in_turn, same, save_until_killed, save_with_a_failing_rank, whole, writer
from tests.distributed.programs import TRAINS_FSDP2
from tests.support.dcp import HAS_USE_COLLECTIVES, packs
from tests.support.ranks import run_ranks, started

needs_fsdp2 = pytest.mark.skipif(not TRAINS_FSDP2, reason="FSDP2 of this torch does not train on a CPU")


@needs_fsdp2
def test_layouts_change_between_saving_and_loading(tmp_path: Path) -> None:
    """FSDP2 of two ranks saves uneven shards; other layouts load them, and torch's own files give the same. Takes 12 s: torch's modules
    for DTensors are imported by each rank.
    """
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "torch")
    calls = [
        ("save", ours, "fsdp", 7),
        ("save", theirs, "fsdp", 7, "torch"),
        ("load", ours, "tp"),
        ("load", theirs, "tp", "torch"),
    ]
    ranks = run_ranks(2, in_turn, *calls)
    saved = ranks[0][0]
    assert all(same(saved, found) for results in ranks for found in results)
    for (loaded,) in run_ranks(3, in_turn, ("load", ours, "fsdp")):
        assert same(saved, loaded)
    assert same(whole(FastckptReader(ours).read_state_dict()), saved)
    assert main(["check", ours]) == 0


WAYS = ["save", "thread", *(["process", "cached plans", "alone"] if HAS_USE_COLLECTIVES else [])]


def test_all_ways_to_save(tmp_path: Path) -> None:
    """Takes 15 s: torch starts a process for each rank, and imports itself there."""
    urls = {how: str(tmp_path / how / "step-12") for how in WAYS}
    calls = [("save", urls[how], "tp", 5, how) for how in WAYS] + [("load", urls[how], "tp") for how in WAYS]
    for results in run_ranks(2, in_turn, *calls):
        assert all(same(results[0], found) for found in results)
    for how, url in urls.items():
        root = Path(url) / ("rank-00001" if how == "alone" else "")
        newest = sorted(path.name for path in root.glob("commits/*"))[-1]
        epoch, step = 2 if how in ("thread", "process") else 1, 1 if how == "alone" else 12
        assert newest == f"{epoch:06}-{step:012}.json", how


def test_plain_replicas_are_written_once(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    for saved, loaded in run_ranks(2, in_turn, ("save", url, "ddp", 3), ("load", url, "ddp")):
        assert same(saved, loaded)
    n_bytes = sum(v.nbytes for v in saved.values() if isinstance(v, torch.Tensor))
    assert sum(path.stat().st_size for path in packs(url)) < 1.2 * n_bytes
    assert same(whole(FastckptReader(url).read_state_dict()), saved)


def test_a_rank_that_fails_commits_nothing(tmp_path: Path) -> None:
    for found in run_ranks(2, save_with_a_failing_rank, str(tmp_path)):
        assert found[0] == "1 StoreFullError"
        assert all(line.endswith("SaveError") for line in found[1:])
        assert found[1:]
    assert len(list(tmp_path.glob("commits/*"))) == 1


def test_damage_is_told_to_all_ranks_by_its_type_and_tensor(tmp_path: Path) -> None:
    calls = [("save_and_flip", str(tmp_path)), ("damaged", str(tmp_path)), ("damaged", str(tmp_path / "nowhere"))]
    for _, found, nowhere in run_ranks(2, in_turn, *calls):
        assert found
        assert all("CorruptCheckpointError" in line and ('"x"' in line or '"y"' in line) for line in found)
        assert len(nowhere) == 2
        assert all(line.startswith("NoCheckpointError") for line in nowhere)


@pytest.mark.parametrize(("place", "victim"), [("upload", 1), ("commit", 0)])
def test_a_job_that_is_killed_before_the_commit_leaves_the_old_checkpoint(
    place: str, victim: int, tmp_path: Path
) -> None:
    with started(2, save_until_killed, str(tmp_path), place, victim) as ranks:
        for rank in ranks:
            rank.wait_for("saves")
        ranks[victim].process.join(60)
        assert ranks[victim].process.exitcode == -signal.SIGKILL
    assert FastckptReader(tmp_path).read_state_dict()["n"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"n": 3}, checkpoint_id=tmp_path, storage_writer=writer())
    assert FastckptReader(tmp_path).read_state_dict() == {"n": 3}


@needs_fsdp2
def test_a_checkpoint_of_checkpointers_is_read(tmp_path: Path) -> None:
    """Takes 8 s: torch's modules for DTensors are imported by each rank."""
    urls = [str(tmp_path / mode) for mode in ("fsdp", "ddp")]
    calls = [
        ("train_and_checkpoint", urls[0], "fsdp"),
        ("train_and_checkpoint", urls[1], "ddp"),
        ("load_model", urls[0], "tp"),
        ("load_model", urls[1], "fsdp"),
    ]
    for results in run_ranks(2, in_turn, *calls):
        assert same(results[0], results[2])
        assert same(results[1], results[3])
