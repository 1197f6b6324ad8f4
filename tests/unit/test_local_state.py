"""States with DTensors: what a Checkpointer saves are plain tensors over the same memory, with their places in the whole."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fastckpt import Checkpointer
from fastckpt.errors import SaveError
from fastckpt.format.directory import GlobalPlace, TensorEntry
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.commit import open_vote
from fastckpt.snapshot import FencedTensors
from fastckpt.state.local_state import localised
from fastckpt.state.shards import Shard as KnownShard
from fastckpt.store.memory import MemoryStore
from fastckpt.training.live_state import LiveState
from tests.support.fake_ranks import as_rank, each_on_its_own
from tests.support.repositories import commit_of


@pytest.fixture
def rank() -> Iterator[None]:
    """Of two, the second."""
    with as_rank(1, 2):
        yield


def around(local: torch.Tensor, *placements: Any, whole: tuple[int, ...] | None = None) -> Any:
    """A DTensor with this part."""
    mesh = init_device_mesh("cpu", (2,))
    shape = torch.Size(whole or (2 * local.shape[0], *local.shape[1:]))
    return DTensor.from_local(
        local, mesh, placements or [Shard(0)], shape=shape, stride=torch.empty(shape, device="meta").stride()
    )


def address(tensor: Any) -> int:
    return int(getattr(tensor, "_local_tensor", tensor).data_ptr())


def rows(live: LiveState) -> dict[Any, TensorEntry]:
    return {entry.name: entry for entry in live.look()[0].tensors}


def saved(state: dict[str, Any], step: int = 1) -> Reader:
    """What one rank of several writes, in a repository of its own."""
    store = MemoryStore()
    with each_on_its_own(), Checkpointer(store, state, every=None, spot=None) as ckpt:
        ckpt.save_now(step).wait()
    return open_vote(store, commit_of(store, step).vote(0))


class Pair(NamedTuple):
    one: Any
    other: Any


def test_nothing_is_copied_where_there_is_no_dtensor(rank: None) -> None:
    inner = {"a": torch.zeros(2), "n": [1, 2, (3, torch.zeros(1))]}
    state = {"x": inner, "d": around(torch.zeros(2, 3)), "more": {"deep": [inner]}}
    found, dtensors = localised({"x": inner})
    assert found["x"] is inner
    assert not dtensors
    found, dtensors = localised(state)
    assert found is not state
    assert found["x"] is inner
    assert found["more"] is state["more"]
    assert isinstance(state["d"], DTensor), "the state itself stays as it is"
    assert list(dtensors.values()) == [state["d"]]


def test_every_container_keeps_its_kind(rank: None) -> None:
    d = around(torch.arange(6.0).view(2, 3))
    ordered: Any = OrderedDict(w=d)
    vars(ordered)["_metadata"] = {"": 1}
    counted: Any = defaultdict(list, w=d)
    state = {"o": ordered, "l": [d, 1], "t": (d, 2), "p": Pair(d, 3), "c": counted, "twice": ordered}
    found, _ = localised(state)
    plain = found["l"][0]
    assert type(plain) is torch.Tensor
    assert address(plain) == address(d)
    assert found["o"]["w"] is found["t"][0] is found["p"].one is found["c"]["w"] is plain
    assert type(found["o"]) is OrderedDict
    assert vars(found["o"]) == vars(ordered)
    assert found["twice"] is found["o"]
    assert type(found["p"]) is Pair
    assert found["c"].default_factory is list
    assert list(found) == list(state)


@pytest.mark.parametrize("wants_gradients", [False, True])
def test_parameters_stay_parameters(rank: None, wants_gradients: bool) -> None:
    parameter = nn.Parameter(around(torch.zeros(2, 3)), requires_grad=wants_gradients)
    other = around(torch.zeros(2)).requires_grad_(wants_gradients)
    found, _ = localised([parameter, other])
    assert type(found[0]) is nn.Parameter
    assert type(found[1]) is torch.Tensor
    for plain, whole in zip(found, (parameter, other), strict=True):
        assert address(plain) == address(whole)
        assert plain.requires_grad == wants_gradients


def test_partial_sums_and_sharded_tensors_are_refused_by_name(rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed._shard.sharded_tensor import api

    class ShardedTensor:
        pass

    monkeypatch.setattr(api, "ShardedTensor", ShardedTensor)
    state = {"a": [around(torch.zeros(2), Partial(), whole=(2,))], "b": {"e": ShardedTensor()}}
    with pytest.raises(SaveError) as error:
        localised(state)
    words = str(error.value)
    assert "a.0: a DTensor with placements (Partial(sum),) is a partial sum" in words
    assert "b.e is a ShardedTensor" in words
    assert "redistribute" in words


def test_the_directory_has_plain_names_and_places(rank: None) -> None:
    strided = around(torch.arange(8.0).view(4, 2), _StridedShard(0, split_factor=2), whole=(8, 2))
    state = {
        "s": {"w": around(torch.ones(2, 3)), "p": nn.Parameter(around(torch.ones(3, 1)))},
        "r": [around(torch.ones(4), Replicate(), whole=(4,))],
        "b": strided,
    }
    reader = saved(state)
    assert b"torch.distributed" not in reader.skeleton
    found = {entry.name: entry for entry in reader.directory.tensors}
    assert set(found) == {("s", "w"), ("s", "p"), ("r", 0), ("b",), ("b", "box", 0), ("b", "box", 1)}
    assert (found["s", "w"].kind, found["s", "w"].place) == ("tensor", GlobalPlace((4, 3), (2, 0)))
    assert (found["s", "p"].kind, found["s", "p"].place) == ("parameter", GlobalPlace((6, 1), (3, 0)))
    assert found["s", "p"].requires_grad
    assert found["r", 0].place == GlobalPlace((4,), (0,))
    assert found["b",].place is None
    assert found["b",].shape == (4, 2)
    one, other = found["b", "box", 0], found["b", "box", 1]
    assert one.storage == other.storage == found["b",].storage
    assert (one.shape, one.offset, one.kind, one.place) == ((2, 2), 0, "part", GlobalPlace((8, 2), (2, 0)))
    assert (other.shape, other.offset, other.place) == ((2, 2), 4, GlobalPlace((8, 2), (6, 0)))


def test_a_part_that_moves_within_the_whole_is_told_anew(rank: None) -> None:
    state = {"d": {"w": around(torch.zeros(2, 2), Shard(0), whole=(4, 2))}}
    live = LiveState(state, sampled=False)
    first = live.look()[0]
    assert live.look()[0].form is first.form
    assert first.tensors[0].place == GlobalPlace((4, 2), (2, 0))
    state["d"]["w"] = around(torch.zeros(2, 2), Shard(1), whole=(2, 4))
    second = live.look()[0]
    assert second.form is not first.form
    assert second.tensors[0].place == GlobalPlace((2, 4), (0, 2))


class Net(nn.Module):
    """Uneven on two ranks: the second part is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 7), nn.BatchNorm1d(7)


def sharded() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return model, optimizer


def test_fsdp_and_its_optimizer(rank: None) -> None:
    model, optimizer = sharded()
    live = LiveState({"model": model, "optim": optimizer}, sampled=True)
    found = rows(live)
    captured = live.take().captured
    assert b"torch.distributed" not in captured.skeleton
    assert found["model", "a.weight"].place == GlobalPlace((7, 4), (4, 0))
    assert found["optim", "state", 0, "exp_avg"].place == GlobalPlace((7, 4), (4, 0))
    assert found["optim", "state", 0, "step"].place is None
    assert found["model", "norm.running_mean"].place is None
    assert captured.shards["model", "a.weight"] == KnownShard(group=(1,), owns_storage=True)
    assert ("model", "norm.running_mean") not in captured.shards
    assert captured.storages[found["model", "a.weight"].storage].n_bytes == 4 * 4 * 4, "as torch does, with the padding"
    # Nothing but buffers, counters and what optimizers keep in lists is copied before a save returns.
    fenced = FencedTensors([optimizer])
    first = {e.name for e in captured.tensors if captured.addresses[e.storage] not in fenced.addresses}
    assert first == {("model", f"norm.{name}") for name in ("running_mean", "running_var", "num_batches_tracked")}
    for parameter in model.parameters():
        assert address(parameter) in fenced.addresses


@pytest.mark.parametrize("locally", [False, True])
def test_a_write_to_a_shard_is_seen_by_versions(rank: None, locally: bool) -> None:
    model, optimizer = sharded()
    parameter: Any = next(model.parameters())
    live = LiveState({"model": model, "optim": optimizer}, sampled=False)
    live.remember(1, live.take())
    assert not live.has_changed_since(1)
    fenced = FencedTensors([optimizer])
    with torch.no_grad():
        (parameter._local_tensor if locally else parameter).mul_(2)
    assert fenced.changed() == address(parameter)
    assert locally or live.has_changed_since(1)
