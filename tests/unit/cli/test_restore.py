"""`fastckpt restore` and `salvage`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import fastckpt
from fastckpt import cli
from fastckpt.format.keys import CheckpointId, commit_key
from fastckpt.store.local import LocalStore
from tests.support.command_line import rewound, run, run_json
from tests.support.repositories import begin, flip, keys_of, save_ranks, save_steps
from tests.support.states import rich_state, same

# restore


def test_restore(store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewound(store)
    out = str(tmp_path / "out.fckpt")
    status, said, _ = run(capsys, "restore", url, "--out", out)
    assert status == cli.OK
    assert "epoch 2, step 4" in said
    assert same(fastckpt.load(out, weights_only=False), rich_state(4))
    assert run(capsys, "check", out)[0] == cli.OK
    status, _, err = run(capsys, "restore", url, "--out", out, "--step", "3")
    assert status == cli.USAGE
    assert "--force" in err
    status, value = run_json(capsys, "restore", url, "--out", out, "--step", "3", "--force")
    assert status == cli.OK
    assert (value["step"], value["container_bytes"]) == (3, os.path.getsize(out))
    assert same(fastckpt.load(out, weights_only=False), rich_state(3))
    assert run(capsys, "restore", url, "--out", out, "--epoch", "1", "--force")[0] == cli.OK
    assert same(fastckpt.load(out, weights_only=False), rich_state(2)), "of epoch 1, the history has step 2"


def test_restore_of_a_rank(store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_ranks(store, begin(store, 2).number, 1, [rich_state(1), rich_state(2)])
    out = str(tmp_path / "out")
    status, _, err = run(capsys, "restore", url, "--rank", "1", "--out", out)
    assert status == cli.OK
    assert "--rank" in err
    assert same(fastckpt.load(out, weights_only=False), rich_state(2))
    assert run(capsys, "restore", url, "--rank", "2", "--out", f"{out}2")[0] == cli.BAD_CHECKPOINT


def test_restore_of_damage_names_the_next_step(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1, 2])
    store.delete(keys_of(store, "data/")[1])
    status, _, err = run(capsys, "restore", url, "--out", str(tmp_path / "out"))
    assert status == cli.BAD_CHECKPOINT
    assert "restore(step=1)" in err
    flip(store, keys_of(store, "data/")[0])
    status, _, err = run(capsys, "restore", url, "--step", "1", "--out", str(tmp_path / "out"))
    assert status == cli.BAD_CHECKPOINT
    assert "fastckpt salvage" in err
    assert not (tmp_path / "out").exists()


# salvage


def test_salvage(store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1, 2])
    out = tmp_path / "out"
    status, _, err = run(capsys, "salvage", url, "--out", str(out))
    assert status == cli.OK
    assert "fastckpt restore" in err
    flip(store, keys_of(store, "data/")[1], 3)
    assert run(capsys, "salvage", url, "--out", str(out))[0] == cli.USAGE
    status, said, err = run(capsys, "salvage", url, "--out", str(out), "--force")
    assert status == cli.FOUND_DAMAGE
    assert "8 tensors" in said
    assert "LOST: array" in err
    assert "whole in epoch 1, step 1" in err
    status, value = run_json(capsys, "salvage", url, "--out", str(out), "--force")
    assert status == cli.FOUND_DAMAGE
    assert value == json.loads((out / "report.json").read_text())


def test_salvage_of_a_damaged_commit_record(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1, 2])
    flip(store, commit_key(CheckpointId(1, 2)))
    status, _, err = run(capsys, "salvage", url, "--out", str(tmp_path / "out"))
    assert status == cli.OK, "all tensors were there"
    assert "commit record of epoch 1, step 2 is not right" in err
    flip(store, "fastckpt.json")
    status, _, err = run(capsys, "salvage", url, "1", "--out", str(tmp_path / "out2"))
    assert status == cli.OK
    assert "fastckpt.json is damaged" in err
