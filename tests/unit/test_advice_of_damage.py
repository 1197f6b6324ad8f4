"""Damaged bytes are named by several checkpoints: what is advised instead of one of them needs none of these bytes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import Checkpointer, Options
from fastckpt.errors import CorruptCheckpointError
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import open_vote
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from tests.support.command_line import run

N = 300_000
OPTIONS = Options(threads=1, connections=1, host_budget_bytes=128 << 20)


def opened(url: str, state: dict[str, Any], *, read_only: bool) -> Checkpointer:
    return Checkpointer(url, {"x": state}, every=None, keep=None, spot=None, read_only=read_only, options=OPTIONS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 to 4. "always" is that of step 1; "twice" was made anew at step 3."""
    run = tmp_path_factory.mktemp("made") / "run"
    state = {"always": torch.randn(N), "twice": torch.randn(N), "each": torch.randn(N)}
    with opened(str(run), state, read_only=False) as ckpt:
        for step in range(1, 5):
            state["each"] = torch.randn(N)
            if step == 3:
                state["twice"] = torch.randn(N)
            ckpt.save_now(step).wait(60)
    return run


@pytest.fixture
def url(made: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(made, tmp_path / "run"))


def flip(url: str, step: int, name: str) -> None:
    """A bit of the pack that a step has a tensor in."""
    repository = Repository(LocalStore(url))
    catalog = Catalog(repository)
    (checkpoint,) = (one for one in catalog.history() if one.step == step)
    commit = repository.commit(checkpoint)
    reader = open_vote(repository.store, commit.vote(0))  # type: ignore[union-attr]
    (storage,) = (one.storage for one in reader.directory.tensors if one.name[-1] == name)
    row = reader.records[next(reader.pieces(storage)).chunk]
    pack = Path(url) / reader.files[int(row["file"]) - 1].key
    pack.chmod(0o600)
    data = bytearray(pack.read_bytes())
    data[int(row["offset"]) + 100] ^= 1
    pack.write_bytes(data)


def advised(error: CorruptCheckpointError) -> list[int]:
    """The steps that are named as complete."""
    return [int(step) for step in re.findall(r"complete one is step (\d+)", str(error))]


def by_restore(url: str, out: Path) -> None:
    state = {name: torch.zeros(N) for name in ("always", "twice", "each")}
    with opened(url, state, read_only=True) as ckpt:
        ckpt.restore(atomic=True)


def by_load(url: str, out: Path) -> None:
    fastckpt.load(url)


@pytest.mark.parametrize("read", [by_restore, by_load])
@pytest.mark.parametrize(("name", "step"), [("twice", [2]), ("each", [3]), ("always", [])])
def test_what_is_advised_needs_none_of_the_damaged_bytes(
    url: str, tmp_path: Path, name: str, step: list[int], read: Callable[[str, Path], None]
) -> None:
    flip(url, 4, name)
    with pytest.raises(CorruptCheckpointError) as caught:
        read(url, tmp_path)
    assert advised(caught.value) == step
    assert ("No other checkpoint is complete" in str(caught.value)) == (not step)


def test_an_older_step_is_damaged_and_newer_ones_do_without(url: str) -> None:
    flip(url, 1, "twice")
    state = {name: torch.zeros(N) for name in ("always", "twice", "each")}
    with opened(url, state, read_only=True) as ckpt:
        with pytest.raises(CorruptCheckpointError) as caught:
            ckpt.restore(step=2, atomic=True)
        assert advised(caught.value) == [4]
        assert ckpt.restore(step=4) == 4


def test_an_export_names_a_whole_step(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(url, 4, "twice")
    status, _, said = run(capsys, "restore", url, "--out", str(tmp_path / "one.ckpt"))
    assert status == 3
    assert "complete one is step 2" in said
