"""The command line on repositories: directories that Incarnation made, as a person and as a program meet them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import cli
from fastckpt.format.keys import CheckpointId, commit_key, epoch_key
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from tests.support.command_line import rewound, run, run_json
from tests.support.repositories import begin, flip, keys_of, save_ranks, save_steps, vote
from tests.support.states import rich_state

# ls


def test_ls(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    status, value = run_json(capsys, "ls", url)
    assert status == cli.OK
    assert value["schema"] == "fastckpt.ls/1"
    assert value["checkpoints"] == []
    (found,) = value["repositories"]
    rows = [(c["epoch"], c["step"], c["branch"], c["newest"]) for c in found["checkpoints"]]
    assert rows == [
        (2, 9, "unfinished", False),
        (2, 4, "history", True),
        (1, 3, "abandoned", False),
        (1, 2, "history", False),
        (1, 1, "history", False),
    ]
    assert found["checkpoints"][2]["metrics"] == {"loss": "NaN"}
    assert found["checkpoints"][1]["raw_bytes"] > 1_000_000
    status, out, _ = run(capsys, "ls", url)
    lines = out.splitlines()
    assert status == cli.OK
    assert lines[0].split()[:3] == ["epoch", "step", "when"]
    assert "unfinished: votes of 1 of 2 ranks" in lines[1]
    assert lines[2].endswith("newest")
    assert "loss=2" in lines[2]
    assert lines[3].endswith("abandoned")


def test_ls_shows_what_is_damaged(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1, 2])
    flip(store, commit_key(CheckpointId(1, 2)))
    status, out, _ = run(capsys, "ls", url)
    assert status == cli.OK
    assert "damaged: see fastckpt check" in out.splitlines()[1]
    flip(store, epoch_key(1))
    status, value = run_json(capsys, "ls", url)
    assert status == cli.OK
    assert [c["branch"] for c in value["repositories"][0]["checkpoints"]] == ["damaged", "unknown"]


def test_ls_of_a_mixture(store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1])
    fastckpt.save({"a": 1}, tmp_path / "a.fckpt")
    _, value = run_json(capsys, "ls", url, str(tmp_path))
    assert len(value["checkpoints"]) == len(value["repositories"]) == 1
    assert cli.main(["ls", f"file://{url}"]) == cli.OK


def test_ls_of_an_empty_repository(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    Repository(store).initialise()
    status, out, err = run(capsys, "ls", url)
    assert (status, out) == (cli.OK, "")
    assert "no checkpoints" in err


# show


def test_show(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    status, value = run_json(capsys, "show", url)
    assert (status, value["schema"], value["step"]) == (cli.OK, "fastckpt.show-repository/1", 4)
    assert value["parent"] == {"epoch": 1, "step": 2}
    (rank,) = value["ranks"]
    assert ["model", "weight"] in [tensor["name"] for tensor in rank["tensors"]]
    assert rank["packs"] == 1
    assert rank["shared_bytes"] == 0
    assert run_json(capsys, "show", url, "--step", "3")[1]["branch"] == "abandoned"
    status, out, _ = run(capsys, "show", url, "--step", "2")
    assert status == cli.OK
    assert "model.weight" in out
    assert re.search(r"metrics +loss=1.0", out)


def test_show_of_several_ranks_with_one_damaged(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_ranks(store, begin(store, 2).number, 1, [rich_state(1), rich_state(2)])
    store.delete(keys_of(store, "votes/")[1])
    status, out, err = run(capsys, "show", url)
    assert status == cli.BAD_CHECKPOINT
    assert "model.weight" in out
    assert "rank 1 cannot be shown" in err


def test_steps_that_are_not_there(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1])
    for argv in (
        ["show", url, "--step", "7"],
        ["show", url, "--epoch", "7"],
        ["restore", url, "--step", "7", "--out", "x"],
    ):
        status, _, err = run(capsys, *argv)
        assert status == cli.BAD_CHECKPOINT
        assert "fastckpt ls" in err
    status, _, err = run(capsys, "salvage", url, "7", "--out", "x")
    assert status == cli.BAD_CHECKPOINT


# check


def test_check(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    status, out, _ = run(capsys, "check", url)
    assert status == cli.OK
    assert "epoch 1, step 3, abandoned: ok" in out
    assert "unfinished save of epoch 2, step 9" in out
    assert re.search(r"\d packs, .*MiB, \d+ chunks verified", out)
    key = keys_of(store, "data/000001-000000000002-000/")[0]
    flip(store, key, 3)
    status, out, err = run(capsys, "check", url)
    assert status == cli.FOUND_DAMAGE
    assert f"{key}: DAMAGED: " in out
    assert "1 tensors cannot be restored: array" in out
    assert "fastckpt salvage" in err
    status, value = run_json(capsys, "check", url)
    (found,) = value["repositories"]
    assert status == cli.FOUND_DAMAGE
    assert not found["ok"]
    assert found["damage"][0]["key"] == key
    assert found["damage"][0]["checkpoint"] == {"epoch": 1, "step": 2}
    assert [c["state"] for c in found["checkpoints"]] == ["ok", "ok", "damaged", "ok"]
    assert found["repair"] is None
    assert run(capsys, "check", url, "--quick")[0] == cli.OK
    assert run(capsys, "check", url, "--step", "3")[0] == cli.OK
    assert run(capsys, "check", url, "--step", "2")[0] == cli.FOUND_DAMAGE


def test_check_of_a_repository_without_marker(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1])
    store.delete("fastckpt.json")
    status, out, _ = run(capsys, "check", url)
    assert status == cli.FOUND_DAMAGE
    assert "fastckpt.json: DAMAGED" in out


def test_check_of_a_repository_without_checkpoints(
    store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that never saved, or a wrong prefix, must not pass for one that is well."""
    begin(store, 1)
    status, out, _ = run(capsys, "check", url)
    assert (status, out) == (cli.BAD_CHECKPOINT, f"{store.url}: no checkpoints: nothing to verify\n")
    status, value = run_json(capsys, "check", url)
    assert (status, value["repositories"][0]["ok"]) == (cli.BAD_CHECKPOINT, True)
    store.put("fastckpt.json", b"{}")
    assert run(capsys, "check", url)[0] == cli.FOUND_DAMAGE


def test_check_of_a_step_that_is_not_there(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1])
    status, out, _ = run(capsys, "check", url, "--step", "7")
    assert status == cli.BAD_CHECKPOINT
    assert "no checkpoints of step 7: nothing to verify" in out


def test_check_of_a_repository_and_a_file(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1])
    fastckpt.save({"a": torch.ones(3)}, tmp_path / "a")
    status, value = run_json(capsys, "check", str(tmp_path / "a"), url)
    assert status == cli.OK
    assert value["checked"][0]["ok"]
    assert value["repositories"][0]["ok"]


def test_repair_needs_a_yes(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str], terminal: Any) -> None:
    save_steps(store, [1])
    vote(store, 1, 5, 0, 1, rich_state(5))
    status, out, err = run(capsys, "check", url, "--repair")
    assert status == cli.USAGE
    assert "to repair: commit epoch 1, step 5, try 0: the next restore continues from it" in out
    assert "--yes" in err
    status, value = run_json(capsys, "check", url, "--repair")
    assert status == cli.USAGE
    assert value["repositories"][0]["repair"]["done"] == []
    terminal("n\n")
    assert run(capsys, "check", url, "--repair")[0] == cli.OK
    assert keys_of(store, "commits/") == [commit_key(CheckpointId(1, 1))]
    terminal("y\n")
    status, out, _ = run(capsys, "check", url, "--repair")
    assert status == cli.OK
    assert "step 5: committed" in out
    choice = Catalog(Repository(store)).choose()
    assert choice is not None
    assert choice.commit.save.step == 5
    status, out, _ = run(capsys, "check", url, "--repair", "--yes")
    assert status == cli.OK
    assert "nothing to repair" in out


def test_repair_with_yes_and_json(store: LocalStore, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    begin(store, 2)
    for rank in range(2):
        vote(store, 1, 5, rank, 2, rich_state(rank))
    status, value = run_json(capsys, "check", url, "--repair", "--yes")
    assert status == cli.OK
    assert value["repositories"][0]["repair"]["done"] == [{"epoch": 1, "step": 5, "error": None}]
    assert run(capsys, "check", url)[0] == cli.OK
