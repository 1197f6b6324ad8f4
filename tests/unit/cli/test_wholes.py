"""The command line on a checkpoint of many ranks with parts of tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import fastckpt
from fastckpt import cli
from fastckpt.format import keys
from fastckpt.options import Options
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from fastckpt.upkeep import export_whole
from fastckpt.upkeep.export_whole import export_whole_to
from tests.support.command_line import run, run_json
from tests.support.repositories import commit_of, flip, keys_of
from tests.support.states import same
from tests.support.wholes import captured_parts, module, part_of, save_parts

LARGE = torch.randn(1200, 500, generator=torch.Generator().manual_seed(1))  # 2.4 MB: not read with the objects
SMALL = torch.arange(12.0).reshape(6, 2)
PLAIN = torch.randn(600, 512, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def saved(store: LocalStore) -> None:
    states = []
    for rank in range(2):
        large, at = part_of(LARGE, (1, 2), rank)
        small, first = part_of(SMALL, (2, 1), rank)
        model = module(large=torch.nn.Parameter(large), small=small)
        model["tied"] = model["large"]
        plain = PLAIN.clone()
        state = {"model": model, "n": {"plain": plain, "view": plain.t(), "step": 7}, "rng": torch.full((3,), rank)}
        places = {
            "model.large": (LARGE.shape, at),
            "model.tied": (LARGE.shape, at),
            "model.small": (SMALL.shape, first),
        }
        states.append(captured_parts(state, places, rank, shares={"n.plain": [(0, 600 * 512 * 2), (1, 600 * 512 * 2)]}))
    save_parts(store, states)


def test_restore_writes_one_whole_file(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x.fckpt")
    status, said, err = run(capsys, "restore", url, "--out", out)
    assert status == cli.OK
    assert "2 ranks as one" in said
    assert "Each rank had its own rng, of which that of rank 0 was loaded" in err
    found = fastckpt.load(out)
    assert same(found["model"]["large"].detach(), LARGE)
    assert type(found["model"]["large"]) is torch.nn.Parameter
    assert found["model"]["tied"] is found["model"]["large"]
    assert same(found["model"]["small"], SMALL)
    assert same(found["n"]["plain"], PLAIN)
    assert found["n"]["view"].data_ptr() == found["n"]["plain"].data_ptr()
    assert found["n"]["view"].stride() == (1, 512)
    assert (found["n"]["step"], found["rng"].tolist()) == (7, [0, 0, 0])
    assert run(capsys, "check", out)[0] == cli.OK
    with fastckpt.open(out) as reader:
        assert same(reader["model.large"], LARGE)
    status, value = run_json(capsys, "restore", url, "--out", out, "--force")
    assert (status, value["rank"], value["world"]) == (cli.OK, None, 2)
    assert value["container_bytes"] == os.path.getsize(out)
    assert run_json(capsys, "show", out)[1]["step"] == 1


def test_restore_of_a_rank_has_its_parts(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "x.fckpt")
    assert run(capsys, "restore", url, "--rank", "1", "--out", out)[0] == cli.OK
    assert same(fastckpt.load(out)["model"]["small"], SMALL[3:].clone())


def test_damage_leaves_no_file(url: str, store: LocalStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.fckpt"
    flip(store, keys_of(store, keys.DATA)[-1])
    status, _, err = run(capsys, "restore", url, "--out", str(out))
    assert status == cli.BAD_CHECKPOINT
    assert "fastckpt salvage" in err
    assert not list(tmp_path.glob("x*"))


def test_large_tensors_are_dropped_behind_the_encoder(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there one at a time, as far as the chunks in flight allow."""
    alive: list[int] = []
    inner = export_whole._PutTogether.release

    def counted(self: export_whole._PutTogether, number: int) -> None:
        inner(self, number)
        owners = self._state.owners
        alive.append(sum(owners[n] is None for n in range(len(owners))))

    monkeypatch.setattr(export_whole._PutTogether, "release", counted)
    done: list[tuple[int, int]] = []
    export_whole_to(
        str(tmp_path / "x"), Repository(store), commit_of(store, 1), Options(threads=1), lambda *both: done.append(both)
    )
    assert alive == sorted(alive)
    assert alive[-1] == 3  # the two large ones, and the small one that was cut
    assert done[-1][0] == done[-1][1] == LARGE.nbytes + PLAIN.nbytes + SMALL.nbytes + 24


def test_show_and_ls_name_the_layout(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "show", url)[1]["dtensors"] == 3
    assert "2 ranks, 3 of 6 names are DTensors" in run(capsys, "show", url)[1]
    assert "ranks" in run(capsys, "ls", url)[1]
