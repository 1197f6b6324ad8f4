"""`load_into` fills live DTensors: each rank its own part, from a file or from the checkpoint of any other ranks. No collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import fastckpt
from fastckpt import TensorReader
from fastckpt.errors import CorruptCheckpointError, UnknownTensorError
from fastckpt.format import keys
from fastckpt.options import Options
from fastckpt.reading.contents import OfContainer
from fastckpt.reading.whole_contents import WholeContents
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.store.memory import MemoryStore
from tests.support.fake_ranks import as_rank
from tests.support.repositories import commit_of, flip, keys_of
from tests.support.states import same
from tests.support.wholes import captured_parts, module, part_of, save_parts

WHOLES = {
    "a.weight": torch.randn(7, 4, generator=torch.Generator().manual_seed(1)),
    "a.bias": torch.randn(7, generator=torch.Generator().manual_seed(2)),
}


def net() -> nn.Module:
    model = nn.Module()
    model.a = nn.Linear(4, 7)
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    fastckpt.save({"model": module(**WHOLES)}, tmp_path / "x.fckpt")
    return tmp_path / "x.fckpt"


@pytest.fixture
def store() -> MemoryStore:
    """Three ranks: rows of one tensor, while the other is cut in columns, which is two of them and nothing."""
    states = []
    for rank in range(3):
        weight, at = part_of(WHOLES["a.weight"], (1, 3), rank)
        bias, first = part_of(WHOLES["a.bias"], (3,), rank)
        places = {"model.a.weight": ((7, 4), at), "model.a.bias": ((7,), first)}
        states.append(captured_parts({"model": module(**{"a.weight": weight, "a.bias": bias})}, places, rank))
    store = MemoryStore()
    save_parts(store, states)
    return store


def opened(store: MemoryStore) -> TensorReader:
    return TensorReader(WholeContents(SavedRanks(store, commit_of(store, 1)), Options(threads=1), "here"))


@contextmanager
def no_collectives() -> Iterator[None]:
    with CommDebugMode() as mode:
        yield
    assert not mode.get_total_counts()


def local(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor._local_tensor
    return found.detach()


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("source", ["file", "repository"])
def test_a_module_under_fsdp(file: Path, store: MemoryStore, source: str, rank: int) -> None:
    with as_rank(rank, 2):
        model = net()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        before = dict(model.named_parameters())
        with fastckpt.open(file) if source == "file" else opened(store) as reader, no_collectives():
            assert sorted(reader.load_into({"model": model})) == ["model.a.bias", "model.a.weight"]
        for name, parameter in model.named_parameters():
            assert parameter is before[name]
            assert same(local(parameter), part_of(WHOLES[name], (2, 1)[: parameter.dim()], rank)[0])


@pytest.mark.parametrize("source", ["file", "repository"])
def test_any_placement(file: Path, store: MemoryStore, source: str) -> None:
    with as_rank(3, 4):
        mesh = init_device_mesh("cpu", (2, 2))
        weight = DTensor.from_local(
            torch.zeros(3, 2), mesh, [Shard(0), Shard(1)], shape=torch.Size((7, 4)), stride=(4, 1)
        )
        bias = DTensor.from_local(torch.zeros(7), mesh, [Replicate(), Replicate()])
        with fastckpt.open(file) if source == "file" else opened(store) as reader:
            reader.load_into({"model": {"a.weight": weight, "a.bias": bias}})
        assert same(local(weight), WHOLES["a.weight"][4:, 2:].clone())
        assert same(local(bias), WHOLES["a.bias"])


def test_all_that_does_not_fit_is_listed_and_nothing_is_changed(file: Path, store: MemoryStore) -> None:
    with as_rank(1, 2):
        mesh = init_device_mesh("cpu", (2,))

        def around(part: torch.Tensor, *shape: int, placement: Any = None) -> Any:
            stride = torch.empty(shape, device="meta").stride()
            return DTensor.from_local(part, mesh, [placement or Shard(0)], shape=torch.Size(shape), stride=stride)

        state = {
            "model": {
                "a.weight": around(torch.zeros(4, 4), 8, 4),
                "a.bias": around(torch.zeros(3).double(), 7),
                "new": around(torch.zeros(1), 2),
            }
        }
        for reader in (fastckpt.open(file), opened(store)):
            with reader, pytest.raises(UnknownTensorError) as error:
                reader.load_into(state)
            words = str(error.value)
            assert "model.a.weight: float32 [7, 4] in the checkpoint, float32 [8, 4], a DTensor, in the state" in words
            assert "model.a.bias: float32 [7] in the checkpoint, float64 [7], a DTensor, in the state" in words
            assert "model.new: not in the checkpoint" in words
        with fastckpt.open(file) as reader:
            assert reader.load_into(state, strict=False) == []
            partial = {"model": {"a.bias": around(torch.zeros(7), 7, placement=Partial())}}
            with pytest.raises(UnknownTensorError, match="nobody can tell what this rank has of it"):
                reader.load_into(partial)


def test_a_rank_fills_its_part_from_its_own(store: MemoryStore) -> None:
    with as_rank(1, 3):
        mesh = init_device_mesh("cpu", (3,))
        bias = DTensor.from_local(torch.zeros(3), mesh, [Shard(0)], shape=torch.Size((7,)), stride=(1,))
        weight = DTensor.from_local(torch.zeros(3, 4), mesh, [Shard(0)], shape=torch.Size((7, 4)), stride=(4, 1))
        ranks = SavedRanks(store, commit_of(store, 1))
        with TensorReader(OfContainer(ranks.whole(1), Options(threads=1))) as reader:
            reader.load_into({"model": {"a.bias": bias}})
            with pytest.raises(UnknownTensorError, match=r"does not have all of \[3, 4\] at \[3, 0\] of \[7, 4\]"):
                reader.load_into({"model": {"a.weight": weight}})
        assert same(local(bias), WHOLES["a.bias"][3:6])


def test_modules_have_the_names_of_their_state_dicts(file: Path) -> None:
    """Not those of what else they keep: a wrapper's name, a cache, a buffer that is not saved."""
    model: Any = net()
    model.a.cache = torch.zeros(1)
    model.register_buffer("scratch", torch.zeros(1), persistent=False)
    wrapped = nn.DataParallel(model)
    with fastckpt.open(file) as reader:
        assert sorted(reader.load_into({"model": wrapped})) == ["model.a.bias", "model.a.weight"]
    assert all(same(parameter.detach(), WHOLES[name]) for name, parameter in model.named_parameters())


def test_damage_names_the_tensor(store: MemoryStore) -> None:
    flip(store, keys_of(store, keys.DATA)[0])
    with as_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        state = {"model": {"a.weight": DTensor.from_local(torch.zeros(7, 4), mesh, [Replicate()])}}
        with opened(store) as reader, pytest.raises(CorruptCheckpointError) as error:
            reader.load_into(state)
    assert any("model.a.weight" in item.tensors for item in error.value.damage)
