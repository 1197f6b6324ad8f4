"""The command line on a repository whose ranks share what they hold alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastckpt
from fastckpt.format.keys import CheckpointId, commit_key, vote_key
from fastckpt.store.local import LocalStore
from tests.support.command_line import run, run_json
from tests.support.repositories import begin, commit_of, save_shared, shared
from tests.support.states import same


def state_of(rank: int) -> dict[str, torch.Tensor]:
    return {"bias": torch.arange(300.0), "own": torch.full((700,), float(rank)), "weight": torch.arange(5000.0)}


@pytest.fixture(autouse=True)
def saved(store: LocalStore) -> None:
    begin(store, 2)
    shares = {"weight": [(0, 8000), (1, 12000)], "bias": [(1, 1200)]}
    save_shared(store, 1, 1, [shared(state_of(rank), rank, shares) for rank in range(2)])


@pytest.mark.parametrize("rank", [0, 1])
def test_restore_writes_whole_ranks(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int) -> None:
    out = tmp_path / "out.fckpt"
    status, _, _ = run(capsys, "restore", url, "--rank", str(rank), "--out", str(out))
    assert status == 0
    assert same(fastckpt.load(out), state_of(rank))
    assert run(capsys, "check", str(out))[0] == 0


def test_show_says_what_is_held_and_what_is_written(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, value = run_json(capsys, "show", url)
    assert status == 0
    assert [(one["held_bytes"], one["raw_bytes"], one["owners"]) for one in value["ranks"]] == [
        (24000, 10800, [1]),
        (24000, 16000, [0]),
    ]
    assert "written" in run(capsys, "show", url)[1]


def test_check_names_who_loses_what(url: str, store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check", url)[0] == 0
    store.delete(vote_key(commit_of(store, 1).vote(1)))
    status, value = run_json(capsys, "check", url)
    assert status != 0
    (found,) = (one for one in value["repositories"][0]["damage"] if one["also_ranks"])
    assert (found["rank"], found["also_ranks"], found["tensors"]) == (1, [0], ["bias", "weight"])
    (one,) = value["repositories"][0]["checkpoints"]
    assert (one["state"], one["tensors_lost"]) == ("damaged", ["bias", "weight"])


def test_repair_completes_a_save_with_shares(url: str, store: LocalStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.delete(commit_key(CheckpointId(1, 1)))
    assert run(capsys, "check", url, "--repair", "--yes")[0] == 0
    assert run(capsys, "check", url)[0] == 0
    assert commit_of(store, 1).world == 2


def test_salvage_and_analyze_read_them(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "analyze", url)[0] == 0
    assert run(capsys, "salvage", url, "1", "--out", str(tmp_path / "out"))[0] == 0
    for rank in range(2):
        assert same(fastckpt.load(tmp_path / "out" / f"rank-{rank:05}.fckpt"), state_of(rank))
