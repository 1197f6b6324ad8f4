"""Which storages are written once for several ranks: each rank decides by itself, and all decide alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import post_localSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastckpt import Checkpointer, RNGState
from fastckpt.format.directory import Share
from fastckpt.format.tensor_names import Name
from fastckpt.ranks.ownership import share_out
from fastckpt.ranks.world import World, current_world
from fastckpt.store.memory import MemoryStore
from fastckpt.training import replicas
from fastckpt.training.live_state import LiveState
from tests.support.fake_ranks import as_rank

WORLD = 4
Build = Callable[[], tuple[dict[str, Any], tuple[str, ...]]]


class Net(nn.Module):
    """One parameter that is cut between ranks, small ones, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.norm = nn.Linear(1200, 4000), nn.Linear(3, 5), nn.BatchNorm1d(5)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return optimizer


def shared(build: Build) -> list[dict[Name, tuple[Share, ...]]]:
    """For each rank, what it says of its storages by their first names."""
    found = []
    for rank in range(WORLD):
        with as_rank(rank, WORLD):
            state, declared = build()
            captured = LiveState(state, sampled=False, replicated=declared, world=World(rank, WORLD)).take().captured
            names: dict[int, Name] = {}
            for entry in reversed(captured.tensors):
                names[entry.storage] = entry.name
            assert captured.rank == rank
            for number, shares in captured.shares.items():
                assert sum(share.n_bytes for share in shares) == captured.storages[number].n_bytes
            found.append({names[number]: shares for number, shares in captured.shares.items()})
    return found


def owners(shares: tuple[Share, ...]) -> set[int]:
    return {share.rank for share in shares}


def test_ddp_with_its_optimizer_and_buffers() -> None:
    def build() -> tuple[dict[str, Any], tuple[str, ...]]:
        model = nn.parallel.DistributedDataParallel(Net())
        return {"m": model, "o": trained(model), "rng": RNGState(), "x": {"t": torch.zeros(9)}}, ()

    ranks = shared(build)
    assert all(one == ranks[0] for one in ranks)
    assert set(ranks[0]) == {("m", name) for name in Net().state_dict()} | {
        ("o", "state", number, "momentum_buffer") for number in range(6)
    }
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert owners(ranks[0]["m", f"norm.{name}"]) == {0}
    assert owners(ranks[0]["m", "large.weight"]) | owners(ranks[0]["o", "state", 0, "momentum_buffer"]) == {0, 1, 2, 3}


def test_ddp_over_some_ranks_without_buffers_and_with_what_it_ignores() -> None:
    class Ignoring(Net):
        _ddp_params_and_buffers_to_ignore = ("small.weight",)

    def build() -> tuple[dict[str, Any], tuple[str, ...]]:
        mine = torch.distributed.get_rank() % 2
        groups = [torch.distributed.new_group([0, 2]), torch.distributed.new_group([1, 3])]
        inner = nn.parallel.DistributedDataParallel(Ignoring(), process_group=groups[mine], broadcast_buffers=False)
        return {"m": nn.Sequential(nn.Linear(2, 2), inner)}, ()

    ranks = shared(build)
    assert ranks[0] == ranks[2]
    assert ranks[1] == ranks[3]
    kept = ("large.weight", "large.bias", "small.bias", "norm.weight", "norm.bias")
    assert set(ranks[0]) == {("m", f"1.{name}") for name in kept}
    assert owners(ranks[0]["m", "1.large.weight"]) == {0, 2}
    assert owners(ranks[1]["m", "1.large.weight"]) == {1, 3}


def own(state: Any, bucket: Any) -> Any:
    """A hook of the user's own: who knows what it does."""
    raise NotImplementedError


own.__annotations__ = {}  # torch looks at them, and not at texts


@pytest.mark.parametrize(
    ("hook", "alike"),
    [
        (default_hooks.allreduce_hook, True),
        (default_hooks.fp16_compress_hook, True),
        (own, False),
        (post_localSGD_hook, False),
        (noop_hook, False),
    ],
)
def test_ddp_whose_gradients_somebody_else_averages(hook: Any, alike: bool) -> None:
    def build() -> tuple[dict[str, Any], tuple[str, ...]]:
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        model.register_comm_hook(None, hook)
        return {"m": model}, ()

    assert [bool(one) for one in shared(build)] == [alike] * WORLD


@pytest.mark.parametrize("inner", [False, True])
def test_ddp_with_other_wrappers(inner: bool) -> None:
    def build() -> tuple[dict[str, Any], tuple[str, ...]]:
        ddp: Any = nn.parallel.DistributedDataParallel
        compiled: Any = partial(torch.compile, backend="eager")
        model = ddp(compiled(Net())) if inner else compiled(ddp(Net()))
        return {"m": nn.Sequential(model)}, ()

    assert set(shared(build)[0]) == {("m", f"0.{name}") for name in Net().state_dict()}


def test_hybrid_sharding() -> None:
    def build() -> tuple[dict[str, Any], tuple[str, ...]]:
        model = Net()
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        return {"m": model, "o": trained(model)}, ("m", "o")

    ranks = shared(build)
    assert ranks[0] == ranks[2]
    assert ranks[1] == ranks[3]
    # DTensors are known; what is declared is for the others.
    for rank, group in ((0, {0, 2}), (1, {1, 3})):
        large = [ranks[rank][name] for name in (("m", "large.weight"), ("o", "state", 0, "momentum_buffer"))]
        assert set.union(*map(owners, large)) == group
    assert ranks[0]["m", "norm.running_mean"] == ranks[1]["m", "norm.running_mean"]


def test_shards_are_a_ranks_own() -> None:
    def build() -> tuple[dict[str, Any], tuple[str, ...]]:
        model = Net()
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        return {"m": model, "o": trained(model)}, ()

    assert shared(build) == [{}] * WORLD


def test_replicated_dtensors_of_one_dimension_of_the_mesh() -> None:
    def build() -> tuple[dict[str, Any], tuple[str, ...]]:
        mesh = init_device_mesh("cpu", (2, 2))
        layouts: dict[str, Any] = {
            "rs": [Replicate(), Shard(0)],
            "sr": [Shard(0), Replicate()],
            "rr": [Replicate(), Replicate()],
        }
        return {"d": {name: DTensor.from_local(torch.zeros(4), mesh, one) for name, one in layouts.items()}}, ()

    groups = {"rs": [{0, 2}, {1, 3}, {0, 2}, {1, 3}], "sr": [{0, 1}, {0, 1}, {2, 3}, {2, 3}], "rr": [{0, 1, 2, 3}] * 4}
    ranks = shared(build)
    for name, group in groups.items():
        for rank in range(WORLD):
            assert owners(ranks[rank]["d", name]) <= group[rank]
    assert [set(one) for one in ranks] == [{("d", name) for name in groups}] * WORLD


def test_declared_names() -> None:
    def build() -> tuple[dict[str, Any], tuple[str, ...]]:
        model = Net()
        return {"m": model, "mine": nn.Linear(2, 2), "o": trained(model)}, ("m.large", "o.state", "mine.bia")

    names = {name for one in shared(build) for name in one}
    assert names == {("m", "large.weight"), ("m", "large.bias"), *(("o", "state", n, "momentum_buffer") for n in range(6))}  # fmt: skip


def test_a_storage_that_is_in_part_something_else_is_a_ranks_own() -> None:
    def build() -> tuple[dict[str, Any], tuple[str, ...]]:
        whole, flat, tied = torch.zeros(10), torch.zeros(8), torch.zeros(6)
        return (
            {
                "part": {"a": whole[:6]},  # nobody knows what the rest is
                "both": {"a": flat[:4], "b": flat[4:]},
                "mixed": {"a": tied},
                "other": {"a": tied},
                "text": {("x",): torch.zeros(3)},  # a name that is for people
                "nothing": {"a": torch.zeros(0), "m": torch.zeros(2, device="meta")},
            },
            ("part", "both", "mixed", "text", "nothing"),
        )

    ranks = shared(build)
    assert [set(one) for one in ranks] == [{("both", "a")}] * WORLD


def test_nothing_is_decided_again_while_the_form_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[int] = []
    monkeypatch.setattr(replicas, "share_out", lambda storages: decided.append(len(storages)) or share_out(storages))
    with as_rank(1, 2):
        model = Net()
        live = LiveState({"m": model}, sampled=False, replicated=("m",), world=current_world())
        first = live.take().captured
        with torch.no_grad():
            model.small.weight.add_(1)
        second = live.take().captured
        assert decided == [9]
        assert second.shares is first.shares
        assert first.own_bytes < first.n_bytes
        model.small = nn.Linear(3, 6)
        live.take()
        assert decided == [9, 9]


def test_a_single_rank_shares_nothing() -> None:
    captured = LiveState({"m": Net()}, sampled=False, replicated=("m",), world=current_world()).take().captured
    assert captured.shares == {}
    assert captured.own_bytes == captured.n_bytes


def test_a_name_that_nothing_has_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with as_rank(0, 2):
        state = {"d": {"t": torch.zeros(3)}}
        live = LiveState(state, sampled=False, replicated=("d.t", "d.u"), world=current_world())
        for _ in range(2):
            state["d"] = {**state["d"], str(len(state["d"])): torch.zeros(1)}
            live.take()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["replicated names d.u, and no tensor of the state has a name that begins so"]


@pytest.mark.parametrize(
    ("replicated", "error", "words"),
    [
        ("model", TypeError, "replicated is 'model': expected names, such as"),
        ([1, None], TypeError, "replicated has 1, None"),
        (("m", "optim.state"), ValueError, "replicated names 'optim.state', which is in no object of the state: its names begin with 'm'"),
    ],
)  # fmt: skip
def test_wrong_names_are_refused(replicated: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        Checkpointer(MemoryStore(), {"m": {}}, every=None, spot=None, replicated=replicated)
