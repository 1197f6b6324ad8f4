"""fastckpt analyze: what it says about a state is what a save makes of it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.cli import BAD_CHECKPOINT, USAGE, main
from fastckpt.store.local import LocalStore
from tests.support.repositories import commit_of


def state(seed: int, moved: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(700, 900, generator=generator) * 0.02
    frozen = torch.randn(600, 700, generator=generator)
    if moved:
        weight = weight + torch.randn(700, 900, generator=generator) * 1e-7
    return {
        "model": {"weight": weight, "frozen": frozen, "half": weight.bfloat16()},
        "optimizer": {"state": {0: {"exp_avg_sq": weight.square(), "step": torch.tensor(1.0)}}},
        "ids": torch.arange(1000),
    }


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    fastckpt.save(state(1, False), tmp_path / "old.fckpt")
    torch.save(state(1, True), tmp_path / "new.pt")
    return str(tmp_path / "new.pt"), str(tmp_path / "old.fckpt")


def groups(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[tuple[str, str], Any]:
    assert main(["analyze", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "fastckpt.analyze/1"
    return {(g["dtype"], g["role"]): g for g in found["groups"]}


def test_groups_and_their_codings(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    _, old = files
    found = groups(capsys, old)
    assert set(found) == {
        ("float32", ""),
        ("bfloat16", ""),
        ("float32", "exp_avg_sq"),
        ("float32", "step"),
        ("int64", ""),
    }
    weights = found["float32", ""]
    assert (weights["tensors"], weights["raw_bytes"]) == (2, 4 * (700 * 900 + 600 * 700))
    assert weights["delta"] is None
    assert set(weights["alone"]["transforms"]) == {"ROT"}
    assert set(found["float32", "exp_avg_sq"]["alone"]["transforms"]) == {"ROTU"}
    assert 0.97 < weights["alone"]["stored_bytes"] / weights["entropy_bytes"] < 1.02


def test_what_is_promised_is_what_real_saves_store(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the byte: of a full save, of one against a state that was saved in full, and of one against a checkpoint with differences."""
    new, old = files
    run, live = str(tmp_path / "run"), state(1, False)
    with fastckpt.Checkpointer(run, live, every=None, spot=None, options=fastckpt.Options(effort="normal")) as ckpt:
        ckpt.save_now(1).wait()
        for part in ("model", "optimizer"):
            copy_into(live[part], state(1, True)[part])
        ckpt.save_now(2).wait()
        ckpt.wait()
        promised = groups(capsys, old, "--against", run)
        for part in ("model", "optimizer"):
            copy_into(live[part], state(1, False)[part])
        ckpt.save_now(3).wait()
    stored = {step: commit_of(LocalStore(run), step).stored_bytes for step in (1, 2, 3)}
    found = groups(capsys, new, "--against", old)
    assert sum(g["alone"]["stored_bytes"] for g in groups(capsys, old).values()) == stored[1]
    assert sum(g["delta"]["stored_bytes"] for g in found.values()) == stored[2]
    assert sum(g["delta"]["stored_bytes"] for g in promised.values()) == stored[3]
    assert stored[2] < 0.8 * stored[1]


def copy_into(live: Any, new: Any) -> None:
    for key, value in new.items():
        if isinstance(value, torch.Tensor):
            live[key].copy_(value)
        else:
            copy_into(live[key], value)


def test_a_delta_against_an_older_state(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    new, old = files
    found = groups(capsys, new, "--against", old)
    weights = found["float32", ""]
    assert weights["based_bytes"] == weights["raw_bytes"]
    assert weights["same_bytes"] == 600 * 700 * 4, "what is frozen"
    assert weights["delta"]["transforms"]["REF"] == 600 * 700 * 4
    assert weights["delta"]["stored_bytes"] < 0.6 * weights["alone"]["stored_bytes"]
    half = found["bfloat16", ""]
    assert half["delta"]["stored_bytes"] == half["alone"]["stored_bytes"] == 0, "a copy of a master takes nothing"
    assert set(half["alone"]["transforms"]) == {"CAST"}


def test_saves_in_a_row_keep_what_a_restore_reads_within_its_cap(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = files
    assert main(["analyze", new, "--against", old, "--saves", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found["saves"]
    assert len(row["stored_bytes"]) == 6
    assert row["stored_bytes"][0] == found["next_bytes"]
    assert sum(row["stored_bytes"]) < 6 * found["full_bytes"]
    assert max(row["read_amplification"]) <= fastckpt.Options().read_amplification + 0.01
    assert 1 <= row["longest_chain"] <= 6
    assert main(["analyze", new, "--against", old, "--saves", "2"]) == 0
    assert "2 saves in a row" in capsys.readouterr().out
    assert main(["analyze", new, "--saves", "2"]) == USAGE


def test_what_has_no_older_version(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, _ = files
    fastckpt.save({"model": {"weight": torch.zeros(5)}}, tmp_path / "other.fckpt")
    for group in groups(capsys, new, "--against", str(tmp_path / "other.fckpt")).values():
        assert group["based_bytes"] == 0
        assert group["delta"]["stored_bytes"] == group["alone"]["stored_bytes"]


def test_the_table(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", files[0], "--against", files[1]]) == 0
    out = capsys.readouterr().out
    assert "float32 exp_avg_sq" in out
    assert "against the older state" in out


def test_a_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(300, 300)
    with fastckpt.Checkpointer(tmp_path / "run", {"model": model}, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    assert ("float32", "") in groups(capsys, str(tmp_path / "run"))


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fastckpt.save({"a": 1}, tmp_path / "empty.fckpt")
    assert main(["analyze", str(tmp_path / "empty.fckpt")]) == 0
    assert "no tensors" in capsys.readouterr().err
    assert main(["analyze", str(tmp_path / "missing")]) == 4


@pytest.mark.parametrize("writer", [torch.save, fastckpt.save])
def test_what_a_restricted_load_refuses_is_told_with_the_way_on(
    writer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state"
    writer({"weight": torch.zeros(5000), "took": datetime.timedelta(1)}, path)
    assert main(["analyze", str(path)]) == USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"fastckpt: {path} is not read by a restricted load")
    assert "--trust-pickle loads it" in said.err
    assert "datetime.timedelta" in said.err
    assert main(["analyze", str(path), "--trust-pickle"]) == 0


@pytest.mark.parametrize("trust", [[], ["--trust-pickle"]])
def test_a_damaged_file_of_torch_is_an_error_in_words(
    trust: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state"
    torch.save({"weight": torch.zeros(5000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:60])
    assert main(["analyze", str(path), *trust]) == BAD_CHECKPOINT
    assert f"fastckpt: {path} cannot be analyzed: " in capsys.readouterr().err
