"""A program that has chosen another default device than the CPU, and one that has put our functions in the place of torch's."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt import Checkpointer, RNGState
from fastckpt.store.memory import MemoryStore


@pytest.fixture
def state() -> dict[str, Any]:
    return {"w": torch.arange(6.0).view(2, 3), "array": np.arange(20_000.0), "empty": torch.empty(0)}


@pytest.fixture
def meta() -> Iterator[None]:
    """Whatever is made without naming a device has no data."""
    with torch.device("meta"):
        yield


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return (
        found["w"].device.type == found["empty"].device.type == "cpu"
        and torch.equal(found["w"], expected["w"])
        and np.array_equal(found["array"], expected["array"])
    )


def test_open_reads_tensors_and_arrays(state: dict[str, Any]) -> None:
    file = io.BytesIO()
    with torch.device("meta"):
        fastckpt.save(state, file)
        file.seek(0)
        with fastckpt.open(file) as reader:
            found = dict(reader)
        file.seek(0)
        loaded = fastckpt.load(file, weights_only=False)
    assert same(found, state)
    assert same(loaded, state)


def test_placement_is_that_of_the_file_or_of_map_location(state: dict[str, Any], tmp_path: Path) -> None:
    fastckpt.save(state, tmp_path / "x")
    with torch.device("meta"):
        assert same(fastckpt.load(tmp_path / "x", weights_only=False), state)
        assert same(fastckpt.load(tmp_path / "x", "cpu", weights_only=False), state)
        assert fastckpt.load(tmp_path / "x", "meta", weights_only=False)["w"].is_meta
    with torch.device("cpu"):
        assert fastckpt.load(tmp_path / "x", "meta", weights_only=False)["w"].is_meta


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.ones(3), "empty": torch.empty(0)}, tmp_path / "no_suffix")
    with torch.device("meta"):
        loaded = fastckpt.load(tmp_path / "no_suffix")
    assert {tensor.device.type for tensor in loaded.values()} == {"cpu"}


@pytest.mark.usefixtures("meta")
def test_generators_are_saved_and_restored() -> None:
    generators = RNGState()
    before = generators.state_dict()
    drawn = np.random.rand()
    assert before["python"]["words"].device.type == before["numpy"]["words"].device.type == "cpu"
    generators.load_state_dict(before)
    assert np.random.rand() == drawn


@pytest.mark.usefixtures("meta")
def test_a_checkpointer_saves_and_restores() -> None:
    store = MemoryStore()
    with torch.device("cpu"):
        state: dict[str, Any] = {"model": torch.nn.Linear(3, 3), "d": {"w": torch.ones(3)}, "rng": RNGState()}
        again: dict[str, Any] = {"model": torch.nn.Linear(3, 3), "d": {}, "rng": RNGState()}
    with Checkpointer(store, state, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    with Checkpointer(store, again, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 1
    assert torch.equal(again["model"].weight, state["model"].weight)
    assert torch.equal(again["d"]["w"], state["d"]["w"])


def test_ours_may_stand_in_the_place_of_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    tensor = torch.ones(3)
    torch.save({"w": tensor}, tmp_path / "zip")
    torch.save({"w": tensor}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    safetensors.save_file({"w": tensor}, tmp_path / "x.safetensors")
    for module in (torch, torch.serialization):
        monkeypatch.setattr(module, "save", fastckpt.save)
        monkeypatch.setattr(module, "load", fastckpt.load)
    for name in ("zip", "legacy", "x.safetensors"):
        assert torch.equal(torch.load(tmp_path / name)["w"], tensor), name
    torch.save({"w": tensor}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert torch.equal(torch.load(tmp_path / "old")["w"], tensor)
    file = io.BytesIO()
    torch.save({"w": tensor}, file, _use_new_zipfile_serialization=False)
    file.seek(0)
    assert torch.equal(torch.load(file)["w"], tensor)
    # A storage that is pickled without us calls torch.save and torch.load by their names.
    storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
    assert list(pickle.loads(pickle.dumps(storage))._untyped_storage) == list(tensor.untyped_storage())
    torch.save({"w": tensor}, tmp_path / "ours")
    with fastckpt.open(tmp_path / "ours") as reader:
        assert torch.equal(reader["w"], tensor)


def test_an_empty_storage_keeps_each_of_its_element_types() -> None:
    untyped = torch.UntypedStorage(0)
    state = {
        str(dtype): torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        for dtype in (torch.float32, torch.int16, torch.uint8)
    }
    state["again"] = state["torch.int16"]
    file = io.BytesIO()
    fastckpt.save(state, file)
    file.seek(0)
    loaded = fastckpt.load(file)
    assert {name: storage.dtype for name, storage in loaded.items()} == {
        name: storage.dtype for name, storage in state.items()
    }
    assert loaded["again"] is loaded["torch.int16"]
    assert len({storage._untyped_storage._cdata for storage in loaded.values()}) == 1
