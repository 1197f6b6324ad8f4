"""What several ranks have saved, in one process: nothing of a rank is left out without a word, and nothing is taken from the wrong one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastckpt
from fastckpt import Checkpointer
from fastckpt.errors import RestoreError
from fastckpt.format.keys import SaveId
from fastckpt.ranks.world import World
from fastckpt.repository.commit import try_commit
from fastckpt.store.base import Store
from fastckpt.store.memory import MemoryStore
from fastckpt.store.open import open_store
from fastckpt.training.live_state import LiveState
from tests.support.fake_ranks import as_rank
from tests.support.repositories import begin, save_ranks, vote_shared


def saved_plain(states: Sequence[Any]) -> MemoryStore:
    store = MemoryStore()
    begin(store, len(states))
    save_ranks(store, 1, 1, states)
    return store


def saved_by(n: int, build: Callable[[int], dict[str, Any]], store: Store | None = None) -> Store:
    """As ranks of a process group save what `build` makes for each of them. store: None for one in memory."""
    store = store or MemoryStore()
    begin(store, n)
    for rank in range(n):
        with as_rank(rank, n):
            taken = LiveState(build(rank), sampled=False, world=World(rank, n)).take().captured
            taken.rank = rank
            vote_shared(store, 1, 1, n, taken)
    assert try_commit(store, SaveId(1, 1, 0)) is not None
    return store


def restore(store: Store, state: dict[str, Any], reassign: Any = None) -> None:
    with Checkpointer(store, state, every=None, spot=None, read_only=True, reassign=reassign) as ckpt:
        assert ckpt.restore() == 1


def refused(store: Store, state: dict[str, Any]) -> str:
    with pytest.raises(RestoreError) as error:
        restore(store, state)
    return str(error.value)


@pytest.mark.parametrize(
    ("first", "other", "name"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, "notes"),
        ({"a": 1, "b": 2}, {"a": 1}, "notes"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}, "notes"),
        ({"ema": {"a": torch.ones(2)}}, {"ema": {"a": torch.ones(2), "b": torch.ones(2)}}, "notes.ema"),
        ({"a": None}, {"a": torch.ones(2)}, "notes.a"),
        ({"a": torch.ones(2)}, {"a": 1.0}, "notes.a"),
    ],
)
def test_what_one_rank_alone_has_needs_a_word(first: Any, other: Any, name: str) -> None:
    live: dict[str, Any] = {"notes": {"before": 1}}
    assert f"'notes': {name} of rank 1 is not that of rank 0" in refused(
        saved_plain([{"notes": first}, {"notes": other}]), live
    )
    assert live == {"notes": {"before": 1}}


class Buffers(nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


@pytest.mark.parametrize("other", [torch.full((3,), 2.0), torch.ones(4)])
def test_layers_that_rank_0_does_not_have_and_others_have_each_its_own(other: torch.Tensor) -> None:
    tensors = [{"a": torch.ones(3)}, {"b": torch.ones(3)}, {"b": other}]
    live = Buffers(a=torch.zeros(3), b=torch.zeros(3))
    store = saved_plain([{"model": Buffers(**one).state_dict()} for one in tensors])
    assert "of model.b ranks had parts of different tensors, or different ones" in refused(store, {"model": live})
    assert not live.get_buffer("a").any()
    restore(
        saved_plain([{"model": Buffers(**one).state_dict()} for one in (*tensors[:2], tensors[1])]), {"model": live}
    )
    assert live.get_buffer("b").tolist() == [1, 1, 1]


def test_parts_without_elements_at_one_place_of_a_storage() -> None:
    """As an optimizer with one flat buffer has them: two tensors of three ranks, of which the one whose objects are taken has nothing."""
    wholes = {"first": torch.arange(6.0).reshape(2, 3), "second": torch.arange(6.0, 12.0).reshape(2, 3)}

    def build(rank: int) -> dict[str, Any]:
        place, flat, at = 2 - rank, torch.zeros(12), 0
        found: dict[str, Any] = {}
        for name, whole in wholes.items():
            rows = whole[place : place + 1]
            part = flat[at : at + rows.numel()].view(-1, 3).copy_(rows)
            at += rows.numel()
            mesh = DeviceMesh("cpu", [2, 1, 0])
            found[name] = DTensor.from_local(
                part, mesh, [Shard(0)], shape=whole.shape, stride=whole.stride(), run_check=False
            )
        return {"t": found}

    live = {"t": {name: torch.zeros(2, 3) for name in wholes}}
    restore(saved_by(3, build), live)
    assert all(torch.equal(live["t"][name], whole) for name, whole in wholes.items())


def own_and_spread(rank: int, n: int = 2) -> dict[str, Any]:
    """A module of which each rank has a buffer of its own, an optimizer, and a dictionary, all with DTensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5))
    model[1].get_buffer("running_mean").fill_(rank)
    noted = torch.arange(8.0)
    if n > 1:
        mesh = DeviceMesh("cpu", list(range(n)))
        fully_shard(model, mesh=mesh)
        noted = distribute_tensor(noted, mesh, [Shard(0)], src_data_rank=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 + rank, momentum=0.9, foreach=False)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number)
    optimizer.step()
    return {"model": model, "optim": optimizer, "notes": {"spread": noted, "rank": rank}}


def test_reassigned_objects_with_dtensors_are_whole() -> None:
    """The state that `reassign` gives has that rank's own values, and of DTensors what belongs here."""
    store, live = saved_by(2, own_and_spread), own_and_spread(7, 1)
    for tensor in live["model"].state_dict().values():
        tensor.zero_()
    restore(store, live, lambda key, states, rank, world: states[1])
    momenta = [live["optim"].state[p]["momentum_buffer"] for p in live["model"].parameters()]
    assert [m.unique().tolist() for m in momenta] == [[0], [1], [2], [3]]
    assert [m.shape for m in momenta] == [p.shape for p in live["model"].parameters()]
    assert live["model"][1].running_mean.tolist() == [1.0] * 5
    assert live["optim"].param_groups[0]["lr"] == 1.1
    assert live["notes"] == {"spread": live["notes"]["spread"], "rank": 1}
    assert live["notes"]["spread"].tolist() == list(range(8))


def test_reassigned_parts_that_cannot_be_put_together() -> None:
    """Rank 0 has nothing of that name."""

    def build(rank: int) -> dict[str, Any]:
        notes = own_and_spread(rank)["notes"]
        return {"notes": notes if rank else {"rank": 0}}

    live = {"notes": {"before": 1}}
    with pytest.raises(RestoreError, match=r"a rank's parts of notes\.spread, which cannot be put together"):
        restore(saved_by(2, build), live, lambda key, states, rank, world: states[1])
    assert live == {"notes": {"before": 1}}


def test_parts_that_torch_has_not_computed_yet(tmp_path: Path) -> None:
    """Conjugates and negatives are lazy: the bytes of the storage are not the values."""
    conjugate = torch.complex(torch.arange(4.0), torch.ones(4)).conj()
    lazy = {"conjugate": conjugate, "negative": torch.complex(torch.zeros(4), torch.arange(4.0)).conj().imag}

    def build(rank: int) -> dict[str, Any]:
        mesh = DeviceMesh("cpu", [0, 1])
        return {"t": {name: DTensor.from_local(t, mesh, [Replicate()], run_check=False) for name, t in lazy.items()}}

    live = {"t": {name: torch.zeros(4, dtype=t.dtype) for name, t in lazy.items()}}
    restore(saved_by(2, build), live)
    saved_by(2, build, open_store(tmp_path / "run"))
    for found in (live["t"], fastckpt.load(tmp_path / "run")["t"]):
        assert all(torch.equal(found[name], tensor) for name, tensor in lazy.items())


@pytest.mark.parametrize("n", [1, 2])
def test_weights_that_are_tied_here_and_were_not(n: int) -> None:
    """One of two values would be lost."""

    def build(tied: bool, *numbers: float) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied:
            model[1].weight = model[0].weight
        for layer, number in zip(model, numbers, strict=True):
            nn.init.constant_(layer.get_parameter("weight"), number)
        return model

    live = build(True, 7.0, 7.0)
    store = saved_plain([{"model": build(False, 1.0, 2.0).state_dict()}] * n)
    assert "model.0.weight and model.1.weight are one tensor here" in refused(store, {"model": live})
    assert live.get_parameter("0.weight").unique().tolist() == [7]
    restore(saved_plain([{"model": build(False, 1.0, 1.0).state_dict()}] * n), {"model": live})
    assert live.get_parameter("0.weight").unique().tolist() == [1]
