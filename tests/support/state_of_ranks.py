"""What each of several real ranks does in tests/distributed/test_state_of_ranks.py: trains, and looks at its own state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastckpt import Checkpointer
from fastckpt.ranks.world import current_world
from fastckpt.store.memory import MemoryStore
from fastckpt.training.live_state import LiveState
from tests.support.fake_ranks import each_on_its_own


class Layer(nn.Module):
    def __init__(self, n_hidden: int = 9) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, n_hidden), nn.Linear(n_hidden, 6), nn.BatchNorm1d(6)

    def forward(self, x: torch.Tensor) -> Any:
        return self.norm(self.b(torch.relu(self.a(x))))


def plain(mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(Layer())


def sharded(mesh: DeviceMesh) -> nn.Module:
    model = Layer()
    fully_shard(model, mesh=mesh["tp"])
    return model


def hybrid(mesh: DeviceMesh) -> nn.Module:
    model = Layer()
    fully_shard(model, mesh=mesh)
    return model


def in_two_dimensions(mesh: DeviceMesh) -> nn.Module:
    model = Layer(10)  # uneven for FSDP alone: torch does not train uneven tensor parallelism
    parallelize_module(model, mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return model


def trained(model: nn.Module, steps: int = 2) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)
    for number in range(steps):
        torch.manual_seed(10 * dist.get_rank() + number)  # each rank has data of its own
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optim": optimizer}


def check_places(state: dict[str, Any]) -> None:
    """Every row that has a place is that block of the whole, which torch puts together from all ranks."""
    named: dict[Any, Any] = {("model", name): tensor for name, tensor in state["model"].named_parameters()}
    for number, parameter in enumerate(state["model"].parameters()):
        for key, value in state["optim"].state[parameter].items():
            named["optim", "state", number, key] = value
    whole = {name: one.full_tensor() for name, one in named.items() if isinstance(one, DTensor)}
    captured = LiveState(state, sampled=False, world=current_world()).take().captured
    rows = {entry.name: entry for entry in captured.tensors}
    for name, full in whole.items():
        row = rows[name]
        assert row.place is not None
        assert row.place.shape == tuple(full.shape)
        block = tuple(slice(at, at + n) for at, n in zip(row.place.offset, row.shape, strict=True))
        local = torch.as_strided(
            torch.empty(0, dtype=full.dtype).set_(captured.owners[row.storage]), row.shape, row.stride, row.offset
        )
        assert not local.numel() or torch.equal(local, full[block]), name


def check_replicas(state: dict[str, Any]) -> None:
    """Who is said to hold the same bytes does, and says the same of who writes them."""
    captured = LiveState(state, sampled=False, world=current_world()).take().captured
    names: dict[int, Any] = {}
    for entry in captured.tensors:
        names[entry.storage] = min(names.get(entry.storage, entry.name), entry.name)
    mine = {}
    for number, shares in captured.shares.items():
        content = bytes(captured.owners[number].tolist())
        mine[names[number]] = shares, content
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    for name, (shares, content) in mine.items():
        for share in shares:
            theirs = everybody[share.rank][name]
            assert theirs[0] == shares, name
            assert "running" in str(name) or theirs[1] == content, name
    assert mine


def parts(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return getattr(value, "_local_tensor", value).detach().clone()
    return {key: parts(one) for key, one in value.items()} if isinstance(value, dict) else value


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def check_alone(state: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Ranks save and restore one after the other: a collective would wait for those whose turn has not come."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for turn in range(world):
        if turn == rank:
            # What this rank alone writes: its own state, as if it were the only one.
            with each_on_its_own():
                store = MemoryStore()
                with Checkpointer(store, state, every=None, spot=None) as ckpt:
                    ckpt.save_now(1).wait()
                with Checkpointer(store, fresh, every=None, spot=None) as ckpt:
                    assert ckpt.restore() == 1
        dist.monitored_barrier()
    expected, found = ({name: parts(one.state_dict()) for name, one in s.items()} for s in (state, fresh))
    assert equal(expected, found)


def play() -> None:
    """One rank. Of two, all in one dimension; of four, in two."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    for build in (plain, sharded) if world == 2 else (hybrid, in_two_dimensions):
        torch.manual_seed(0)
        state = trained(build(mesh))
        check_places(state)
        if build in (plain, hybrid):
            check_replicas(state)
        torch.manual_seed(1)
        fresh = build(mesh)
        check_alone(state, {"model": fresh, "optim": torch.optim.AdamW(fresh.parameters())})
