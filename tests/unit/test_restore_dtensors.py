"""Parts of DTensors are restored into the DTensors that are there, or refused in words before anything changes. No collectives."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from fastckpt import Checkpointer
from fastckpt.errors import RestoreError
from fastckpt.host.torch_names import dtensor_around
from fastckpt.state.local_state import LocalState
from fastckpt.store.memory import MemoryStore
from fastckpt.training.partly import replaced
from tests.support.fake_ranks import as_rank, each_on_its_own


@pytest.fixture(autouse=True)
def rank() -> Iterator[None]:
    """Of two, the second, with a repository of its own."""
    with as_rank(1, 2), each_on_its_own():
        yield


@contextlib.contextmanager
def no_collectives() -> Iterator[None]:
    with CommDebugMode() as mode:
        yield
    assert not mode.get_total_counts()


def saved(state: dict[str, Any]) -> MemoryStore:
    store = MemoryStore()
    with no_collectives(), Checkpointer(store, state, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    return store


def restore(store: MemoryStore, state: dict[str, Any]) -> None:
    with no_collectives(), Checkpointer(store, state, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 1


def refused(store: MemoryStore, state: dict[str, Any]) -> str:
    with Checkpointer(store, state, every=None, spot=None) as ckpt, pytest.raises(RestoreError) as error:
        ckpt.restore()
    return str(error.value)


def around(local: torch.Tensor, *placements: Any, whole: tuple[int, ...] | None = None) -> Any:
    """A DTensor with this part."""
    shape = torch.Size((2 * local.shape[0], *local.shape[1:]) if whole is None else whole)
    return DTensor.from_local(
        local,
        init_device_mesh("cpu", (2,)),
        placements or [Shard(0)],
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def parts(value: Any) -> Any:
    """With this process's parts in place of DTensors, copied."""
    if isinstance(value, torch.Tensor):
        return getattr(value, "_local_tensor", value).detach().clone()
    if isinstance(value, dict):
        return {key: parts(one) for key, one in value.items()}
    return [parts(one) for one in value] if isinstance(value, (list, tuple)) else value


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(equal, one, other)) if isinstance(one, list) else bool(one == other)


def kinds(value: Any) -> Any:
    """The types of all tensors, and how they are spread."""
    if isinstance(value, torch.Tensor):
        return type(value), value.shape, value.dtype, getattr(value, "placements", None)
    return {key: kinds(one) for key, one in value.items()} if isinstance(value, dict) else None


class Net(nn.Module):
    """Uneven on two ranks, and with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 7), nn.BatchNorm1d(7)


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As backward and step do it (torch 2.6 has no backward of FSDP on a CPU)."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()


def training(seed: int, dtype: torch.dtype = torch.float32, steps: int = 1, **fsdp: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Net().to(dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **fsdp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=seed / 10, foreach=False)
    model.norm.get_buffer("running_mean").fill_(seed)
    for _ in range(steps):
        update(model, optimizer)
    return {"model": model, "optim": optimizer}


def state_of(state: dict[str, Any]) -> dict[str, Any]:
    return {name: one.state_dict() for name, one in state.items()}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_with_and_without_state_of_the_optimizer(steps: int, dtype: torch.dtype) -> None:
    first = training(1, dtype)
    second = training(2, dtype, steps)
    before = dict(second["model"].named_parameters())
    restore(saved(first), second)
    assert equal(parts(state_of(second)), parts(state_of(first)))
    assert kinds(state_of(second)) == kinds(state_of(first))
    assert all(p is before[name] for name, p in second["model"].named_parameters())
    # They go on alike, which they would not with state that is no DTensor.
    for state in (first, second):
        update(state["model"], state["optim"])
    assert equal(parts(state_of(second)), parts(state_of(first)))


class Master(torch.optim.Optimizer):
    """float32 moments of whatever parameters, rows of them that every rank has whole, and plain parts."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = torch.full_like(p, 1 / 3, dtype=torch.float32)
                row = around(torch.full(p.shape[1:], 1 / 7), Replicate(), whole=tuple(p.shape[1:]))
                self.state[p] = {"m": m, "row": row, "own": torch.full((3,), 1 / 9), "list": [m * 2, 5]}


@pytest.mark.parametrize("has_state", [False, True])
def test_any_state_of_an_optimizer(has_state: bool) -> None:
    def build(seed: int) -> dict[str, Any]:
        state = training(seed, torch.bfloat16, 0)
        return {"model": state["model"], "optim": Master([state["model"].a.weight])}

    first, second = build(1), build(2)
    first["optim"].step()
    if has_state:
        second["optim"].step()
        for one in second["optim"].state.values():
            one["m"].zero_()
    restore(saved(first), second)
    assert equal(parts(state_of(second)), parts(state_of(first)))
    assert kinds(state_of(second)) == kinds(state_of(first))


class Other:
    """An object of the user's own, which keeps DTensors."""

    def __init__(self, value: float) -> None:
        self.kept = {"ema": [around(torch.full((2, 3), value)), value]}

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state


def test_dictionaries_lists_tensors_and_objects() -> None:
    def build(value: float) -> dict[str, Any]:
        return {
            "d": {
                "w": around(torch.full((2, 3), value)),
                "p": nn.Parameter(around(torch.full((2,), value))),
                "deep": {"t": (around(torch.full((1, 2), value)), 1)},
                "s": around(torch.full((4,), value), _StridedShard(0, split_factor=2), whole=(8,)),
            },
            "l": [around(torch.full((2, 1), value)), value],
            "t": around(torch.full((5,), value)),
            "o": Other(value),
        }

    first, second = build(1.5), build(0.0)
    held = {"w": second["d"]["w"], "p": second["d"]["p"], "t": second["t"]}
    restore(saved(first), second)
    for one in (first, second):
        one["o"] = one["o"].kept
    assert equal(parts(second), parts(first))
    assert kinds(second["d"]) == kinds(first["d"])
    assert isinstance(second["l"][0], DTensor)
    assert isinstance(second["o"]["ema"][0], DTensor)
    assert second["d"]["w"] is held["w"], "who holds it sees the new values"
    assert second["d"]["p"] is held["p"]
    assert second["t"] is held["t"]
    assert second["d"]["p"].requires_grad


SAVED = "[4, 3], whole, in the checkpoint"


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (lambda: around(torch.zeros(3, 3), whole=(6, 3)), "[3, 3] at [3, 0] of [6, 3]"),
        (lambda: around(torch.zeros(2, 3), Shard(1), whole=(2, 6)), "[2, 3] at [0, 3] of [2, 6]"),
        (lambda: around(torch.zeros(2, 3), Replicate(), whole=(2, 3)), "[2, 3], whole,"),
    ],
)
def test_another_shape_is_refused_before_anything_changes(now: Callable[[], Any], words: str) -> None:
    store = saved({"d": {"w": around(torch.ones(2, 3)), "n": 1}, "t": around(torch.ones(2))})
    state = {"d": {"w": now(), "n": 0}, "t": around(torch.zeros(3))}
    found = refused(store, state)
    assert f"d.w is {words} here and {SAVED}" in found
    assert "t is [3] at [3] of [6] here and [4], whole, in the checkpoint" in found, "all are listed"
    assert "Nothing was changed" in found
    assert state["d"]["n"] == 0
    assert not parts(state["d"]["w"]).any()


@pytest.mark.parametrize(
    "now",
    [
        lambda: around(torch.zeros(2, 3), _StridedShard(0, split_factor=2), whole=(4, 3)),
        lambda: around(torch.zeros(4, 3), Replicate(), whole=(4, 3)),
        lambda: torch.zeros(4, 3),
    ],
)
def test_what_no_rank_has_saved_is_refused_before_anything_changes(now: Callable[[], Any]) -> None:
    """The other rank's part is not there."""
    store = saved({"d": {"w": around(torch.ones(2, 3)), "n": 1}})
    state = {"d": {"w": now(), "n": 0}}
    assert "no rank has saved all that this one needs of d.w. Nothing was changed" in refused(store, state)
    assert state["d"]["n"] == 0
    assert not parts(state["d"]["w"]).any()


def test_a_model_that_is_not_sharded_here() -> None:
    first, model = training(1), Net()
    state = {"model": model, "optim": torch.optim.AdamW(model.parameters())}
    assert "all that this one needs of model.a.bias, model.a.weight" in refused(saved(first), state)
    assert "needs of optim.state.0.exp_avg, " in refused(saved({"optim": first["optim"]}), {"optim": state["optim"]})


def test_a_model_that_was_not_sharded_gives_each_rank_its_part() -> None:
    torch.manual_seed(5)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    update(model, optimizer)
    first = {"model": model, "optim": optimizer}
    for steps in (0, 1):
        second = training(1, steps=steps)
        restore(saved(first), second)
        weight = second["model"].a.weight
        assert torch.equal(weight.to_local(), model.a.weight[4:])
        (state,) = [one for p, one in second["optim"].state.items() if p is weight]
        assert torch.equal(state["exp_avg"].to_local(), optimizer.state[model.a.weight]["exp_avg"][4:])
        assert torch.equal(state["step"], optimizer.state[model.a.weight]["step"])
        update(second["model"], second["optim"])


@pytest.mark.parametrize("steps", [0, 1])
def test_the_step_of_a_parameter_of_one_number_stays_plain(steps: int) -> None:
    def build(parameter: Any) -> dict[str, Any]:
        return {"optim": torch.optim.AdamW([parameter], foreach=False), "p": parameter}

    first = build(nn.Parameter(torch.tensor(2.0)))
    here = build(nn.Parameter(around(torch.tensor(1.0), Replicate(), whole=())))
    for one, n in ((first, 1), (here, steps)):
        for _ in range(n):
            one["p"].grad = torch.full_like(one["p"], 0.5)
            one["optim"].step()
    restore(saved(first), here)
    (state,) = here["optim"].state.values()
    assert type(state["step"]) is torch.Tensor
    assert state["step"] == 1
    assert isinstance(state["exp_avg"], DTensor)
    assert here["p"].to_local() == first["p"]
    here["optim"].step()


class Pair(NamedTuple):
    one: Any
    two: int


def test_all_kinds_of_containers_are_filled_with_parts() -> None:
    whole = torch.arange(8.0).view(4, 2)

    def build(tensor: Callable[[], Any]) -> dict[str, Any]:
        return {
            "d": {"deep": defaultdict(list, {"w": tensor(), 3: [tensor(), "x"]}), "t": (1, tensor())},
            "o": OrderedDict(w=tensor()),
        }

    here = build(lambda: around(torch.zeros(2, 2)))
    restore(saved(build(whole.clone)), here)
    found = [here["d"]["deep"]["w"], here["d"]["deep"][3][0], here["d"]["t"][1], here["o"]["w"]]
    assert all(torch.equal(one.to_local(), whole[2:]) for one in found)
    assert isinstance(here["d"]["deep"], defaultdict)
    made = replaced({"p": Pair(whole, 1)}, {("p", 0): whole + 1})
    assert isinstance(made["p"], Pair)
    assert torch.equal(made["p"].one, whole + 1)
    with pytest.raises(RestoreError, match=r"p.0 cannot be put together"):
        replaced({"p": SimpleNamespace(one=whole)}, {("p", 0): whole})


def test_state_that_is_spread_as_nothing_here_becomes_whole() -> None:
    class Rows(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                self.state[p] = {"row": around(torch.ones(2))}

    def build() -> Any:
        return Rows([nn.Parameter(around(torch.ones(2, 3)))], {})

    first = build()
    first.step()
    assert "needs of optim.state.0.row. " in refused(saved({"optim": first}), {"optim": build()})
    second = build()
    second.step()
    restore(saved({"optim": first}), {"optim": second})


def test_parts_that_nobody_waits_for_come_as_plain_tensors_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    state: dict[str, Any] = {"d": {}}
    restore(saved({"d": {"w": around(torch.ones(2, 3))}}), state)
    assert type(state["d"]["w"]) is torch.Tensor
    assert "of d.w, DTensors when they were saved, plain tensors are restored" in caplog.text


def test_what_is_restored_is_known_to_be_saved() -> None:
    first = training(1)
    store = saved(first)
    second = training(2)
    with Checkpointer(store, second, every=None, spot=None) as ckpt:
        ckpt.restore()
        ckpt.save_now(1)  # the same state: nothing is refused, nothing written
        ckpt.save_now(2).wait()
    third = training(3)
    with Checkpointer(store, third, every=None, spot=None, read_only=True) as ckpt:
        assert ckpt.restore() == 2
    assert equal(parts(state_of(third)), parts(state_of(first)))


def test_checkpoints_that_hold_dtensors_are_restored() -> None:
    """As they were made by one process, before this: the DTensors are in the skeleton."""
    first, second = training(1), training(2)
    first["d"], second["d"] = {"w": around(torch.ones(2, 3))}, {"w": around(torch.zeros(2, 3))}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("fastckpt.training.stateful.localised", lambda state: LocalState(state, {}))
        store = saved(first)
    restore(store, second)
    one, other = first.pop("d"), second.pop("d")
    assert equal(parts(state_of(second)), parts(state_of(first)))
    assert equal(parts(other), parts(one))
    assert kinds(other) == kinds(one)


def test_a_part_that_is_offloaded_stays_where_it_is() -> None:
    mesh = DeviceMesh("meta", [0, 1])  # any type but that of the part
    like = DTensor.from_local(torch.empty(2, device="meta"), mesh, [Shard(0)])
    made = dtensor_around(torch.ones(2, dtype=torch.bfloat16), like)
    assert made._local_tensor.device.type == "cpu"
    assert (made.dtype, made.shape, made.placements) == (torch.bfloat16, (4,), like.placements)


def test_scalars_empty_parts_and_ranks_outside_of_the_mesh() -> None:
    def build(value: float) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (2,))
        elsewhere = DeviceMesh("cpu", [0])
        nothing = torch.empty(0, 3)
        return {
            "scalar": DTensor.from_local(torch.tensor(value), mesh, [Replicate()]),
            "empty": DTensor.from_local(nothing, mesh, [Shard(0)], shape=torch.Size([1, 3]), stride=(3, 1)),
            "none": DTensor.from_local(nothing, mesh, [Replicate()]),
            "outside": DTensor.from_local(
                torch.full((2, 3), value), elsewhere, [Shard(0)], shape=torch.Size([2, 3]), stride=(3, 1)
            ),
        }

    first, second, module = build(1.5), build(0.0), nn.Module()
    for name, tensor in build(0.0).items():
        module.register_buffer(name, tensor)
    store = saved({"d": first, "m": module})
    restore(store, {"d": second, "m": module})
    assert equal(parts(second), parts(first))
    assert kinds(second) == kinds(first)
    assert parts(second["outside"]).shape == (0,)
