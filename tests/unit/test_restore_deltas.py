"""Restores, loads and exports of checkpoints whose chunks are relative to those of earlier saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastckpt
from fastckpt import Checkpointer, Options
from fastckpt.errors import CorruptCheckpointError, PartialRestoreError
from fastckpt.format import records
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit
from fastckpt.host.files import AtomicFile
from fastckpt.kernels.transform import HAS_BASE, Transform
from fastckpt.reading.chunk_reader import affected
from fastckpt.reading.sources import PathSource
from fastckpt.repository.commit import open_vote
from fastckpt.repository.rank_reader import open_rank
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.upkeep.check.container import check_container
from fastckpt.upkeep.export import export
from fastckpt.upkeep.salvage import salvage
from tests.support.deltas import chain, chain_state, save_again
from tests.support.repositories import begin, commit_of, flip, load, save_shared, shared
from tests.support.states import same
from tests.support.straight import ReadStore, addresses, all_straight, plain

OPTIONS = Options(threads=2, connections=2, deltas=False)


def training() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 96), nn.BatchNorm1d(96), nn.Linear(96, 4))
    copies = {name: value.detach().bfloat16() for name, value in model.named_parameters()}
    return {"m": model, "o": torch.optim.AdamW(model.parameters(), lr=1e-5), "w": copies}


def train(state: dict[str, Any]) -> None:
    torch.manual_seed(1)
    for parameter in state["m"].parameters():
        parameter.grad = torch.randn_like(parameter)
    state["o"].step()
    for name, value in state["m"].named_parameters():
        state["w"][name].copy_(value.detach())


def opened(store: Store, state: dict[str, Any]) -> Checkpointer:
    return Checkpointer(store, state, every=None, spot=None, options=OPTIONS)


@pytest.fixture(scope="module")
def saved() -> tuple[dict[str, bytes], dict[str, Any]]:
    """Step 3 is the state of step 2, against step 1: the objects of the store, and the state."""
    store, state = ReadStore(), training()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastckpt.state.chunking.BUNDLE_BYTES", 0)
        with opened(store, state) as ckpt:
            for step in (1, 2):
                train(state)
                ckpt.save_now(step).wait()
    commit = save_again(
        store, 3, commit_of(store, 2), commit_of(store, 1), {f"w.{name}": f"m.{name}" for name in state["w"]}
    )
    found = set(open_vote(store, commit.vote(0)).records["transform"].tolist())
    assert found >= {Transform.SUBPACK, Transform.CAST}, found
    return {one.key: store.get(one.key) for one in store.list("")}, plain(
        {key: _dict(one) for key, one in state.items()}
    )


def _dict(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value


@pytest.fixture
def store(saved: tuple[dict[str, bytes], dict[str, Any]]) -> ReadStore:
    found = ReadStore()
    for key, data in saved[0].items():
        found.put(key, data)
    return found


def found_in(state: dict[str, Any]) -> Any:
    return plain({key: _dict(one) for key, one in state.items()})


@pytest.mark.parametrize("how", [{"atomic": True}, {"atomic": False}, {"overlap": True}])
@pytest.mark.parametrize("is_straight", [False, True])
def test_a_restore_gives_the_state(
    saved: Any, store: ReadStore, how: dict[str, bool], is_straight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_straight:
        all_straight(monkeypatch)
    state = training()
    before = addresses(state)
    with opened(store, state) as ckpt:
        assert ckpt.restore(step=3, **how)
        ckpt.fence()
        assert found_in(state) == saved[1]
    assert before.items() <= addresses(state).items()


def own_row(store: Store, commit: Commit, name: str) -> tuple[int, int, str]:
    """Of the row that a tensor is relative to: pack's key, position, and the row's number."""
    reader = open_vote(store, commit.vote(0))
    (storage,) = [one.storage for one in reader.directory.tensors if ".".join(map(str, one.name)) == name]
    row = next(reader.pieces(storage)).chunk
    while int(reader.records["transform"][row]) in HAS_BASE:
        row, _, _ = records.base_of(reader.records[row])
    return row, int(reader.records["offset"][row]), reader.files[int(reader.records["file"][row]) - 1].key


@pytest.mark.parametrize("act", ["flip", "delete"])
def test_damage_in_a_base_names_what_needs_it_and_a_whole_step(
    store: ReadStore, act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_straight(monkeypatch)
    commit = commit_of(store, 3)
    _, offset, key = own_row(store, commit, "w.0.weight")
    assert key.startswith(f"data/{commit.save.epoch:06}-{1:012}"), "not of an earlier save"
    if act == "flip":
        flip(store, key, offset)
    else:
        store.delete(key)
    state = training()
    with opened(store, state) as ckpt:
        with pytest.raises(PartialRestoreError if act == "flip" else CorruptCheckpointError) as caught:
            ckpt.restore(step=3)
        damage = caught.value if act == "delete" else caught.value.__cause__
        assert isinstance(damage, CorruptCheckpointError)
        assert {"m.0.weight", "w.0.weight"} <= set(affected(damage.damage))
        if act == "flip":
            assert set(affected(damage.damage)) == {"m.0.weight", "w.0.weight"}
            assert len(damage.damage) == 1
        with pytest.raises(CorruptCheckpointError) as caught:
            ckpt.restore(step=3, atomic=True)
        assert "step 2" in str(caught.value)
        assert ckpt.restore(step="latest-valid") == 2


@pytest.fixture
def folder(tmp_path: Path) -> tuple[str, LocalStore, Commit]:
    store = LocalStore(tmp_path / "run")
    return str(tmp_path / "run"), store, chain(store, steps=4)


def test_single_tensors_and_loads_from_a_folder(folder: tuple[str, LocalStore, Commit]) -> None:
    url, _, _ = folder
    assert same(fastckpt.load(url), chain_state(4))
    with fastckpt.open(url) as reader:
        for name, value in chain_state(4).items():
            if isinstance(value, torch.Tensor):
                assert same(reader[name], value)
        target = {name: torch.zeros_like(value) for name, value in chain_state(4).items() if name != "step"}
        reader.load_into(target)
        assert same(target, {name: value for name, value in chain_state(4).items() if name != "step"})


def test_an_export_is_whole_and_needs_no_other_file(folder: tuple[str, LocalStore, Commit], tmp_path: Path) -> None:
    _, store, commit = folder
    out = tmp_path / "out.fckpt"
    export(Repository(store), commit, 0, AtomicFile(str(out)), OPTIONS)
    assert same(fastckpt.load(out), chain_state(4))
    source = PathSource(str(out))
    assert check_container(source).ok
    source.close()


def test_salvage_leaves_out_what_a_damaged_base_takes_with_it(
    folder: tuple[str, LocalStore, Commit], tmp_path: Path
) -> None:
    _, store, commit = folder
    _, offset, key = own_row(store, commit, "b_copy")
    flip(store, key, offset)
    report = salvage(Repository(store), CheckpointId(1, 4), str(tmp_path / "out"), options=OPTIONS)
    assert sorted(str(lost.name[0]) for _, lost in report.lost) == ["a_master", "b_copy"]
    whole = fastckpt.load(tmp_path / "out" / "rank-00000.fckpt")
    expected = {name: chain_state(4)[name] for name in ("frozen", "ids", "slow")}
    assert same(whole, expected)


def test_ranks_that_share_what_they_hold_alike() -> None:
    """Owners' rows are relative to their own earlier ones; the merged index of a rank has both."""
    store = ReadStore()
    begin(store, 2)
    shares = {"w": [(0, 8_000), (1, 12_000)]}

    def states(step: int) -> list[Any]:
        whole = torch.randn(5_000, generator=torch.Generator().manual_seed(0))
        whole[::50] += step * 1e-4
        return [shared({"w": whole, "own": torch.full((3,), rank + step / 2)}, rank, shares) for rank in range(2)]

    first = save_shared(store, 1, 1, states(1))
    second = save_shared(store, 1, 2, states(2))
    third = save_again(store, 3, second, first)
    for rank in range(2):
        reader = open_rank(store, third, rank)
        assert Transform.SUBPACK in reader.records["transform"]
        assert same(load(reader), load(open_rank(store, second, rank)))
