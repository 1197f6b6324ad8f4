"""torch.distributed.checkpoint over fastckpt, by real ranks."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from fastckpt.dcp import FastckptReader
from tests.distributed.dcp_programs import (
    damaged,
    load,
    load_model,
    same,
    save,
    save_two,
    save_until_killed,
    save_with_a_failing_rank,
    train_and_checkpoint,
    whole,
    writer,
)
from tests.distributed.programs import TRAINS_FSDP2
from tests.support.dcp import HAS_USE_COLLECTIVES, flip, packs
from tests.support.ranks import run_ranks, started

needs_fsdp2 = pytest.mark.skipif(not TRAINS_FSDP2, reason="FSDP2 of this torch does not train on a CPU")


@needs_fsdp2
def test_layouts_change_between_saving_and_loading(tmp_path: Path) -> None:
    """FSDP2 of two ranks with uneven shards, saved by plans that torch has cached; other layouts load it. Torch's own files give the same.
    Takes 15 s: eight jobs of real ranks.
    """
    (saved, *_) = run_ranks(2, save, str(tmp_path / "ours"), "fsdp", 7, "save")
    (other, *_) = run_ranks(2, save, str(tmp_path / "torch"), "fsdp", 7, "torch")
    assert same(saved, other)
    for n, mode in ((3, "fsdp"), (2, "tp"), (4, "fsdp_tp"), (1, "plain")):
        for loaded in run_ranks(n, load, str(tmp_path / "ours"), mode):
            assert same(saved, loaded), (n, mode)
    (theirs, *_) = run_ranks(2, load, str(tmp_path / "torch"), "tp", "torch")
    assert same(saved, theirs)
    whole_state = FastckptReader(tmp_path / "ours").read_state_dict()
    assert same(whole(whole_state), saved)


def test_plain_replicas_are_written_once(tmp_path: Path) -> None:
    saved = run_ranks(2, save, str(tmp_path / "a"), "ddp", 3)
    n_bytes = sum(v.nbytes for v in saved[0].values() if isinstance(v, torch.Tensor))
    assert sum(path.stat().st_size for path in packs(tmp_path / "a")) < 1.2 * n_bytes
    assert all(same(saved[0], loaded) for loaded in run_ranks(2, load, str(tmp_path / "a"), "ddp"))
    assert all(same(saved[0], loaded) for loaded in run_ranks(1, load, str(tmp_path / "a"), "ddp"))


@pytest.mark.parametrize("how", ["thread", "process", "cached plans", "alone"])
def test_other_ways_to_save(how: str, tmp_path: Path) -> None:
    if how != "thread" and not HAS_USE_COLLECTIVES:
        pytest.skip("torch 2.6 has none of these")
    saved = run_ranks(2, save, str(tmp_path / "a-12"), "tp", 5, how)
    assert all(same(saved[0], loaded) for loaded in run_ranks(2, load, str(tmp_path / "a-12"), "tp"))
    root = tmp_path / "a-12" / ("rank-00001" if how == "alone" else "")
    records = sorted(path.name for path in root.glob("commits/*"))
    assert records[-1] == f"{2 if how in ('thread', 'process') else 1:06}-{1 if how == 'alone' else 12:012}.json"


def test_a_rank_that_fails_commits_nothing(tmp_path: Path) -> None:
    for found in run_ranks(2, save_with_a_failing_rank, str(tmp_path)):
        assert found[0] == "1 StoreFullError"
        assert all(line.endswith("SaveError") for line in found[1:])
        assert found[1:]
    assert len(list(tmp_path.glob("commits/*"))) == 1


def test_damage_is_told_to_all_ranks_by_its_type_and_tensor(tmp_path: Path) -> None:
    run_ranks(2, save_two, str(tmp_path))
    first = packs(tmp_path)[0]
    flip(first, first.stat().st_size // 2)
    for found in run_ranks(2, damaged, str(tmp_path)):
        assert found
        assert all("CorruptCheckpointError" in line and ('"x"' in line or '"y"' in line) for line in found)
    for found in run_ranks(2, damaged, str(tmp_path / "nowhere")):
        assert len(found) == 2
        assert all(line.startswith("NoCheckpointError") for line in found)


@pytest.mark.parametrize(("place", "victim"), [("begin", 0), ("upload", 1), ("upload", 0), ("commit", 0)])
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
    for number, mode in enumerate(("fsdp", "ddp")):
        url = str(tmp_path / mode)
        (saved, *_) = run_ranks(2, train_and_checkpoint, url, mode)
        for loaded in run_ranks(3 - number, load_model, url, mode):
            assert same(saved, loaded), mode
