"""What `restore` puts into objects: the same element types, the same memory where others hold it, and a word where that cannot be."""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastckpt
from fastckpt import Checkpointer
from fastckpt.errors import PartialRestoreError, RestoreError
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.sources import FileObjectSource
from fastckpt.repository.commit import open_vote
from fastckpt.store.memory import MemoryStore
from fastckpt.training import stateful
from fastckpt.training.changes import changes
from fastckpt.training.placement import plan_placement
from tests.support.repositories import load
from tests.support.repositories import restore_once as restore
from tests.support.repositories import saved_once as saved


def words(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


# -- optimizers --------------------------------------------------------------------------------------------------------


class Master(torch.optim.Optimizer):
    """Keeps float32 moments, byte codes, text and numbers, whatever its parameters are."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(m=torch.zeros(p.shape), codes=torch.zeros(p.numel(), dtype=torch.uint8), kind="rms")
                    state.update(nested={"list": [torch.zeros(2), 3], "pair": (torch.zeros(2), "x")}, n=0, empty={})
                state["m"].mul_(0.9).add_(p.grad.float())
                state["codes"] += 200
                state["nested"]["list"][0] += 1 / 3
                state["nested"]["pair"][0].sub_(1 / 3)
                state["n"] += 1
                p.add_(state["m"], alpha=-group["lr"])


def build(optimizer: Callable[..., Any], dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4).to(dtype)
    return {"m": model, "o": optimizer(model.parameters())}


def train(state: dict[str, Any], steps: int) -> None:
    for number in range(steps):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(number))
        state["m"](x.to(state["m"].weight.dtype)).float().pow(2).sum().backward()
        state["o"].step()
        state["o"].zero_grad()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "master": Master,
    "adafactor": torch.optim.Adafactor,
    "nadam": torch.optim.NAdam,
    "asgd": torch.optim.ASGD,
    "adamw": torch.optim.AdamW,
    "rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_comes_back_exactly(name: str, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (build(OPTIMIZERS[name], torch.bfloat16) for _ in range(2))
    train(first, 3)
    restore(saved(first), second)
    assert equal(first["o"].state_dict(), second["o"].state_dict())
    train(first, 2)
    train(second, 2)
    assert equal(first["o"].state_dict(), second["o"].state_dict())
    assert equal(first["m"].state_dict(), second["m"].state_dict())
    assert not caplog.records


def test_hooks_and_overrides_that_change_on_purpose_have_the_last_word() -> None:
    class Halving(Master):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            for one in self.state.values():
                one["m"] = one["m"].half()

    def to_double(optimizer: Any) -> None:
        for one in optimizer.state.values():
            one["codes"] = one["codes"].double()

    first, second = build(Master, torch.bfloat16), build(Halving, torch.bfloat16)
    train(first, 1)
    second["o"].register_load_state_dict_post_hook(to_double)
    second["o"].register_load_state_dict_pre_hook(
        lambda _, state: {**state, "param_groups": [{**state["param_groups"][0], "lr": 7.0}]}
    )
    restore(saved(first), second)
    (_, one) = list(second["o"].state.values())
    assert (one["m"].dtype, one["codes"].dtype) == (torch.float16, torch.float64)
    assert one["codes"].tolist() == [200] * 4
    assert second["o"].param_groups[0]["lr"] == 7.0
    assert len(second["o"]._optimizer_load_state_dict_post_hooks) == 1, "ours are gone"


def test_a_parameter_of_another_type_is_named_and_its_state_follows(caplog: pytest.LogCaptureFixture) -> None:
    first, second = build(Master, torch.bfloat16), build(Master, torch.float16)
    train(first, 1)
    restore(saved(first), second)
    state = next(iter(second["o"].state.values()))
    assert state["m"].dtype == torch.float16
    assert (state["codes"].dtype, state["codes"].tolist()) == (torch.uint8, [200] * 16), "codes are no numbers to round"
    assert "m.weight was saved as bfloat16 and is float16 here: its floating-point state follows it" in words(caplog)
    assert "'m' is not what was saved: m.weight: bfloat16 became float16" in words(caplog)


def test_an_optimizer_that_wraps_another_without_being_one(caplog: pytest.LogCaptureFixture) -> None:
    class Wrapper(torch.optim.Optimizer):
        """As accelerate's: torch's __init__ is never called."""

        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)
        state = property(lambda self: self.optimizer.state)

        def state_dict(self) -> Any:
            return self.optimizer.state_dict()

        def load_state_dict(self, state_dict: Any) -> None:
            self.optimizer.load_state_dict(state_dict)

    first, second = (build(Master, torch.bfloat16) for _ in range(2))
    train(first, 2)
    store = saved(first)
    with Checkpointer(store, first, every=None, spot=None) as ckpt:
        ckpt.restore()
        assert ckpt.restored is not None
        reader = open_vote(store, ckpt.restored.vote(0))
        wrapped = {"m": second["m"], "o": Wrapper(second["o"])}
        stateful.apply(wrapped, load(reader), "x", plan_placement(wrapped, reader.directory, "x"))
    assert equal(first["o"].state_dict(), second["o"].state_dict())
    assert not caplog.records


def test_an_optimizer_of_its_own_kind_is_compared(caplog: pytest.LogCaptureFixture) -> None:
    class Own(Master):
        def load_state_dict(self, state_dict: Any) -> None:
            for p, one in zip(self.param_groups[0]["params"], state_dict["state"].values(), strict=True):
                self.state[p] = {**one, "m": one["m"].half()}

    first, second = build(Master, torch.float32), build(Own, torch.float32)
    train(first, 1)
    restore(saved(first), second)
    assert "'o' is not what was saved: state.0.m: float32 became float16" in words(caplog)


# -- other objects -----------------------------------------------------------------------------------------------------


class Average:
    def __init__(self, dtype: torch.dtype, value: float = 0.0) -> None:
        self.shadow = {"w": torch.full((3,), value, dtype=dtype)}
        self.n = 1

    def state_dict(self) -> Any:
        return {"shadow": self.shadow, "n": self.n}

    def load_state_dict(self, state: Any) -> None:
        self.n = state["n"]
        for name, tensor in state["shadow"].items():
            self.shadow[name].copy_(tensor)


def test_an_object_that_rounds_what_it_is_given_is_named(caplog: pytest.LogCaptureFixture) -> None:
    store = saved({"e": Average(torch.float32, 1 / 3)})
    restore(store, {"e": Average(torch.float32)})
    assert not caplog.records
    restore(store, {"e": Average(torch.bfloat16)})
    assert "'e' is not what was saved: shadow.w: float32 became bfloat16" in words(caplog)


def test_an_object_that_changes_values_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Scaling(Average):
        def load_state_dict(self, state: Any) -> None:
            super().load_state_dict(state)
            self.shadow["w"] *= 2
            self.n += 1

    restore(saved({"e": Average(torch.float32, 1.0)}), {"e": Scaling(torch.float32)})
    assert "shadow.w: other values; n: 1 became 2" in words(caplog)


def test_sources_of_data_and_generators_are_not_asked() -> None:
    class Loader:
        asked = 0

        def state_dict(self) -> Any:
            self.asked += 1
            return {"generator": torch.get_rng_state(), "order": torch.arange(3)}

        def load_state_dict(self, state: Any) -> None:
            assert not self.asked

        def __iter__(self) -> Any:
            raise AssertionError

    loader = Loader()
    restore(saved({"l": Loader()}), {"l": loader})
    assert loader.asked == 0


def test_changes() -> None:
    nan = torch.tensor([math.nan, 1.0])
    assert not list(changes({"a": nan, "n": math.nan, "s": [1, "x"]}, {"a": nan.clone(), "n": math.nan, "s": (1, "x")}))
    assert list(changes([torch.zeros(2), 1], [torch.zeros(3), 1.5])) == ["0: shape [2] became [3]", "1: 1 became 1.5"]
    assert list(changes(nan, torch.tensor([1.0, math.nan]))) == ["(the object itself): other values"]
    assert not list(changes(torch.eye(2).to_sparse(), torch.eye(2).to_sparse()))


# -- objects without memory --------------------------------------------------------------------------------------------


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_a_module_on_the_meta_device_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    store, kept = saved({"d": {"x": 1}, "m": module}), {"x": 0}
    with pytest.raises(
        RestoreError, match=r"(?s)device 'meta'.*m\.0\.weight\n.*m\.1\.running_mean\n.*to_empty"
    ) as caught:
        restore(store, {"d": kept, "m": on_meta()})
    assert not isinstance(caught.value, PartialRestoreError)
    assert kept == {"x": 0}
    module = on_meta().to_empty(device="cpu")  # type: ignore[assignment]
    restore(store, {"d": kept, "m": module})
    assert torch.equal(module[1].running_mean, torch.zeros(2))  # type: ignore[arg-type]


def test_a_module_that_assigns_is_restored_from_the_meta_device() -> None:
    class Assigning(nn.Linear):
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = True) -> Any:
            return super().load_state_dict(state_dict, strict, assign)

    class Pretending(nn.Linear):
        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            return None

    module = nn.Linear(2, 2)
    store = saved({"m": module})
    with torch.device("meta"):
        assigning, pretending = Assigning(2, 2), Pretending(2, 2)
    restore(store, {"m": assigning})
    assert torch.equal(assigning.weight, module.weight)
    with pytest.raises(PartialRestoreError, match=r"m\.weight, m\.bias: still without memory"):
        restore(store, {"m": pretending})


def test_tensors_and_optimizers_on_the_meta_device_are_refused() -> None:
    state = build(torch.optim.AdamW, torch.float32)
    train(state, 1)
    store = saved({"o": state["o"], "w": torch.ones(2)})
    with pytest.raises(RestoreError, match=r"(?s)\n  the parameters of 'o'\n  w\n"):
        restore(store, {"o": torch.optim.AdamW(on_meta().parameters()), "w": torch.ones(2, device="meta")})


def test_an_object_that_copies_into_nothing_is_found_out() -> None:
    with torch.device("meta"):
        average = Average(torch.float32)
    with pytest.raises(PartialRestoreError, match=r"'e'.*shadow\.w: still without memory"):
        restore(saved({"e": Average(torch.float32)}), {"e": average})


def test_what_was_saved_from_the_meta_device_has_nothing_to_lose() -> None:
    file = io.BytesIO()
    fastckpt.save({"m": on_meta().state_dict()}, file)
    file.seek(0)
    directory = Reader.open(FileObjectSource(file), alone=True).directory
    assert set(plan_placement({"m": on_meta()}, directory, "x").places) <= {"meta", "cpu"}


# -- dictionaries and lists --------------------------------------------------------------------------------------------


def test_dictionaries_lists_and_tensors_inside_are_the_same_ones() -> None:
    def state(value: float) -> dict[str, Any]:
        return {
            "ema": {"w": torch.full((3,), value), "t": torch.full((2, 3), value).t(), "deep": {"l": [{"n": value}]}},
            "ordered": OrderedDict(a=torch.full((1,), value)),
            "count": value,
        }

    live = state(0.0)
    live["ema"]["gone"] = 1
    ema, w, t = live["ema"], live["ema"]["w"], live["ema"]["t"]
    inner, ordered = live["ema"]["deep"]["l"][0], live["ordered"]
    restore(saved({"s": state(5.0), "l": [[1], {"x": 2}]}), {"s": live, "l": (top := [[0], {"x": 0}])})
    assert equal(live, state(5.0))
    assert list(live) == list(state(5.0))
    assert live["ema"] is ema
    assert ema["w"] is w
    assert ema["t"] is t
    assert w.tolist() == [5.0] * 3
    assert ema["deep"]["l"][0] is inner
    assert live["ordered"] is ordered
    assert top == [[1], {"x": 2}]


def test_what_does_not_fit_is_replaced() -> None:
    wide = torch.zeros(1).expand(3)
    live: dict[str, Any] = {"s": torch.zeros(2), "d": torch.zeros(3, dtype=torch.int64), "g": torch.zeros(3), "e": wide}
    live |= {"r": torch.zeros(3, requires_grad=True), "k": {"x": 1}, "view": torch.zeros(9)[:3], "v": 1}
    before = dict(live)
    values = {"s": torch.ones(3), "d": torch.ones(3), "g": torch.ones(3, requires_grad=True), "e": torch.arange(3.0)}
    values |= {"r": torch.ones(3), "k": [1], "view": torch.ones(3), "v": torch.ones(1)}  # type: ignore[dict-item]
    restore(saved({"x": values}), {"x": live})
    assert equal(live, values)
    assert live["g"].requires_grad
    assert not live["r"].requires_grad
    assert all(live[key] is not before[key] for key in live)
    assert before["view"].tolist() == before["e"].tolist() == [0, 0, 0], "the rest of their memory is somebody's"


def test_ties_stay_and_what_was_apart_is_not_written_through_them() -> None:
    module = nn.Linear(3, 3)
    tied = {"m": module, "d": {"w": module.weight, "l": [module.weight]}}
    store = saved(tied)
    other = nn.Linear(3, 3)
    live = {"m": other, "d": {"w": other.weight, "l": [other.weight]}}
    restore(store, live)
    assert torch.equal(other.weight, module.weight)
    assert live["d"]["w"] is live["d"]["l"][0] is other.weight
    best = {"m": module, "best": {key: tensor + 1 for key, tensor in module.state_dict().items()}}
    store = saved(best)
    other = nn.Linear(3, 3)
    live = {"m": other, "best": dict(other.state_dict())}  # not copies: what a program has before its first best
    restore(store, live)
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(live["best"]["weight"], module.weight + 1)


def test_a_tensor_in_a_list_is_not_written_to() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    live = [a, b]
    restore(saved({"l": [b, a]}), {"l": live})
    assert (live[0].tolist(), live[1].tolist()) == ([1, 1], [0, 0])
    assert (a.tolist(), b.tolist()) == ([0, 0], [1, 1])


def test_shared_containers_and_cycles() -> None:
    one = {"n": 1}
    value: dict[str, Any] = {"deep": {"a": one, "b": one, "c": {"n": 2}}}
    value["deep"]["self"] = value["deep"]
    shared = {"n": 0}
    live: dict[str, Any] = {"deep": {"a": {"n": 0}, "b": shared, "c": shared}}
    deep = live["deep"]
    restore(saved({"d": value}), {"d": live})
    assert live["deep"] is deep
    assert deep["self"] is deep
    assert deep["a"] is deep["b"]
    assert (deep["a"], deep["c"]) == ({"n": 1}, {"n": 2})


def test_deep_ones_are_replaced_below() -> None:
    def nested(depth: int, leaf: int) -> Any:
        return leaf if not depth else [nested(depth - 1, leaf)]

    live = [nested(200, 0)]
    restore(saved({"l": [nested(200, 7)]}), {"l": live})
    assert live == [nested(200, 7)]


def test_an_expanded_tensor_takes_its_state() -> None:
    store = MemoryStore()
    with Checkpointer(store, {"t": torch.full((1, 3), 2.0).expand(4, 3)}, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    base = torch.zeros(1, 3)
    with Checkpointer(store, {"t": base.expand(4, 3)}, spot=None) as ckpt:
        assert ckpt.restore() == 1
    assert base.tolist() == [[2.0, 2.0, 2.0]]


def test_an_expanded_tensor_does_not_take_what_it_cannot_hold() -> None:
    store = MemoryStore()
    with Checkpointer(store, {"t": torch.arange(4.0)}, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    with (
        Checkpointer(store, {"t": torch.zeros(1).expand(4)}, spot=None) as ckpt,
        pytest.raises(PartialRestoreError, match="is expanded here"),
    ):
        ckpt.restore()


@pytest.mark.parametrize("atomic", [False, True])
def test_a_buffer_of_one_row_for_all_is_restored(atomic: bool) -> None:
    """torch itself writes no tensor whose elements share memory."""

    def made(row: torch.Tensor) -> torch.nn.Module:
        module = torch.nn.Linear(2, 2)
        module.register_buffer("mask", row.expand(3, 5))
        return module

    saved, live, store = made(torch.randn(5)), made(torch.zeros(5)), MemoryStore()
    with Checkpointer(store, {"model": saved}, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    with Checkpointer(store, {"model": live}, spot=None) as ckpt:
        assert ckpt.restore(atomic=atomic) == 1
    torch.testing.assert_close(live.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert live.mask.stride() == (0, 1)
