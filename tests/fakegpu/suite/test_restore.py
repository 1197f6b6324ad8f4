"""Where `restore` puts tensors: on the device where the live ones are, or where they were, and generators on the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastckpt import RNGState
from tests.fakegpu import device
from tests.fakegpu.suite.tools import reports
from tests.support.repositories import restore_once as restore
from tests.support.repositories import saved_once as saved

GPU = torch.device("fakegpu:0")
OTHER = torch.device("fakegpu:1")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    device.configure("eager")
    device.clear()
    yield
    assert not reports()


class Average:
    def __init__(self, where: torch.device | None) -> None:
        self.shadow = {} if where is None else {"w": torch.ones(3, device=where)}

    def state_dict(self) -> Any:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: Any) -> None:
        self.shadow = state["shadow"]


def containers(where: torch.device | None) -> dict[str, Any]:
    def one() -> torch.Tensor:
        return torch.ones(3, device=where)

    if where is None:
        return {"d": {}, "l": [], "e": Average(None)}
    return {"d": {"avg": one(), "deep": [one()], "rng": torch.get_rng_state()}, "l": [one()], "e": Average(where)}


def places(state: dict[str, Any]) -> set[torch.device]:
    return {t.device for t in (state["d"]["avg"], state["d"]["deep"][0], state["l"][0], state["e"].shadow["w"])}


@pytest.mark.parametrize(
    ("was", "live", "expected"),
    [(GPU, GPU, GPU), (GPU, OTHER, OTHER), (GPU, CPU, CPU), (CPU, GPU, GPU), (GPU, None, GPU), (CPU, None, CPU)],
)
@pytest.mark.parametrize("default", [CPU, OTHER])
def test_containers_and_objects(
    was: torch.device, live: torch.device | None, expected: torch.device, default: torch.device
) -> None:
    store, state = saved(containers(was)), containers(live)
    with default:
        restore(store, state)
    assert places(state) == {expected}
    assert state["d"]["avg"].tolist() == [1, 1, 1]
    assert state["d"]["rng"].device == CPU
    torch.set_rng_state(state["d"]["rng"])


def test_a_device_that_is_not_here_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, state = saved(containers(GPU)), containers(None)
    of_torch = torch.serialization.default_restore_location

    def without_a_device(storage: Any, location: str) -> Any:
        if location != "cpu":
            raise RuntimeError(f"{location} is not here")
        return of_torch(storage, location)

    monkeypatch.setattr(torch.serialization, "default_restore_location", without_a_device)
    restore(store, state)
    assert places(state) == {CPU}
    (record,) = caplog.records
    assert (
        "tensors of fakegpu:0, which this machine does not have, are restored to the CPU: d.avg, d.deep.0, e.shadow.w"
        in (record.getMessage())
    )


def test_views_of_one_memory_stay_views_on_the_device() -> None:
    base = torch.arange(6.0, device=GPU)
    state: dict[str, Any] = {"d": {}}
    restore(saved({"d": {"base": base, "view": base[2:4]}}), state)
    base, view = state["d"]["base"], state["d"]["view"]
    assert base.device == view.device == GPU
    base.zero_()
    assert view.tolist() == [0, 0]


def test_modules_and_generators_go_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithExtra(torch.nn.Linear):
        extra = torch.zeros(2, device=GPU)

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    def state() -> dict[str, Any]:
        return {"m": WithExtra(3, 3).to(GPU), "rng": RNGState()}

    first, second = state(), state()
    store = saved(first)
    given: list[Any] = []
    take = torch.nn.Module.load_state_dict

    class Watching(WithExtra):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
            given.append({key: value.device.type for key, value in state_dict.items()})
            super()._load_from_state_dict(state_dict, prefix, *rest)

    second["m"] = Watching(3, 3).to(GPU)
    assert type(second["m"]).load_state_dict is take
    restore(store, second)
    assert given == [{"weight": "cpu", "bias": "cpu", "_extra_state": "fakegpu"}]
    assert torch.equal(second["m"].weight.cpu(), first["m"].weight.cpu())
    assert second["m"].extra.device == GPU


class Offloading(torch.optim.Optimizer):
    """Keeps one moment beside its parameter, and one on the host."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": torch.tensor(0.5, device=GPU)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            here = torch.ones(p.shape, device=p.device)
            self.state[p] = {"here": here, "host": here.cpu(), "step": torch.ones((), device=p.device)}
        self.state["shared"] = {"k": torch.ones(1, device=GPU)}


@pytest.mark.parametrize("with_model", [True, False])
def test_optimizers_keep_what_they_keep_on_the_host(with_model: bool) -> None:
    def state(where: torch.device) -> tuple[torch.nn.Module, dict[str, Any]]:
        model = torch.nn.Linear(3, 3).to(where).to(torch.bfloat16)
        optimizer = Offloading(model.parameters())
        return model, {"o": optimizer, **({"m": model} if with_model else {})}

    _, first = state(GPU)
    first["o"].step()
    store = saved(first)
    for where in (GPU, OTHER):
        model, second = state(where)
        restore(store, second)
        one = second["o"].state[model.weight]
        assert [one[key].device for key in ("here", "host", "step")] == [where, CPU, where]
        assert {tensor.dtype for tensor in one.values()} == {torch.float32}
        assert second["o"].param_groups[0]["lr"].device == GPU
        assert second["o"].state["shared"]["k"].device == GPU
    model, second = state(CPU)
    restore(store, second)
    assert {tensor.device for tensor in second["o"].state[model.weight].values()} == {CPU}


def test_a_run_of_the_host_goes_on_on_a_device() -> None:
    def state(where: torch.device) -> dict[str, Any]:
        model = torch.nn.Linear(3, 3).to(where)
        return {"m": model, "o": torch.optim.AdamW(model.parameters())}

    first, second = state(CPU), state(GPU)
    first["m"](torch.ones(1, 3)).sum().backward()
    first["o"].step()
    restore(saved(first), second)
    one = second["o"].state[second["m"].weight]
    assert [one[key].device for key in ("exp_avg", "exp_avg_sq", "step")] == [GPU, GPU, CPU]


def test_generators_under_a_default_device() -> None:
    with GPU:
        generators = RNGState()
        state = generators.state_dict()
        generators.load_state_dict(state)
        restore(saved({"rng": generators}), {"rng": RNGState()})
    assert state["python"]["words"].device == state["numpy"]["words"].device == state["torch"].device == CPU
