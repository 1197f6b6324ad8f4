"""Wrappers of modules have no part in the names of a checkpoint: a run may put one on, or take it off, between save and restore."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fastckpt.errors import RestoreError, SaveError
from fastckpt.store.memory import MemoryStore
from fastckpt.training import stateful
from fastckpt.training.live_state import LiveState
from tests.support.fake_ranks import as_rank, each_on_its_own
from tests.support.repositories import restore_once as restore
from tests.support.repositories import saved_once as saved


@pytest.fixture(autouse=True)
def rank() -> Iterator[None]:
    """DistributedDataParallel wants a process group."""
    with as_rank(0, 2), each_on_its_own():
        yield


class Model(nn.Module):
    """With a layer that is called as a wrapper calls its module, and a tied one."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
        super().__init__()
        self.module = wrap(nn.Linear(2, 2))
        self.layers = nn.Sequential(wrap(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))), nn.Linear(3, 2))
        self.again = self.module


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def ddp(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "plain": Model,
    "compiled": lambda: compiled(Model()),
    "ddp": lambda: ddp(Model()),
    "data parallel": lambda: nn.DataParallel(Model()),
    "ddp of compiled": lambda: ddp(compiled(Model())),
    "compiled ddp": lambda: compiled(ddp(Model())),
    "compiled layers": lambda: Model(compiled),
    "compiled twice": lambda: compiled(ddp(Model(compiled))),
}


def numbered(build: Callable[[], nn.Module], start: int) -> dict[str, Any]:
    model = build()
    with torch.no_grad():
        for number, tensor in enumerate(itertools.chain(model.parameters(), model.buffers())):
            tensor.fill_(start + number)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return {"m": model, "o": optimizer}


def content(state: dict[str, Any]) -> list[torch.Tensor]:
    tensors = [*state["m"].parameters(), *state["m"].buffers()]
    return [*tensors, *(one["momentum_buffer"] for one in state["o"].state.values())]


PLAIN_NAMES = [("m", key) for key in Model().state_dict()]


@pytest.mark.parametrize("name", WRAPPED)
def test_the_names_are_those_of_the_inside(name: str) -> None:
    state = numbered(WRAPPED[name], 1)
    captured = LiveState(state, sampled=False).look()[0]
    assert [entry.name for entry in captured.tensors if entry.name[0] == "m"] == PLAIN_NAMES
    found = stateful.state_of(state).state["m"]
    assert list(vars(found)["_metadata"]) == list(vars(Model().state_dict())["_metadata"])


@pytest.mark.parametrize("then", WRAPPED)
@pytest.mark.parametrize("now", WRAPPED)
def test_wrappers_may_come_and_go(then: str, now: str) -> None:
    first, second = numbered(WRAPPED[then], 1), numbered(WRAPPED[now], 100)
    memory = [tensor.data_ptr() for tensor in second["m"].parameters()]
    restore(saved(first), second)
    assert all(map(torch.equal, content(first), content(second)))
    assert [tensor.data_ptr() for tensor in second["m"].parameters()] == memory


@pytest.mark.parametrize("name", WRAPPED)
def test_older_checkpoints_have_the_wrappers_own_names(name: str, caplog: pytest.LogCaptureFixture) -> None:
    first, second = numbered(WRAPPED[name], 1), numbered(WRAPPED[name], 100)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stateful, "names_inside", lambda module: None)
        store = saved(first)
    restore(store, second)
    assert all(map(torch.equal, content(first), content(second)))
    assert not caplog.records


def test_where_nothing_is_wrapped_nothing_is_copied() -> None:
    state = Model().state_dict()

    class Given(Model):
        def state_dict(self, *_: Any, **__: Any) -> Any:
            return state

    assert stateful.state_of({"m": Given()}).state["m"] is state


def test_one_name_for_two_tensors_is_an_error() -> None:
    class Beside(nn.DataParallel[nn.Module]):
        def __init__(self, module: nn.Module) -> None:
            super().__init__(module)
            self.weight = nn.Parameter(torch.zeros(1))

    with pytest.raises(SaveError, match=r"'m' has two tensors of each of these names.*: weight\."):
        saved({"m": Beside(nn.Linear(1, 1))})


def test_hooks_see_the_names_that_the_module_has() -> None:
    seen: list[list[str]] = []
    models = [compiled(nn.Linear(2, 2)) for _ in range(2)]
    models[0].register_state_dict_post_hook(lambda module, state, prefix, meta: seen.append(list(state)))
    models[1].register_load_state_dict_pre_hook(lambda module, state, *_: seen.append(list(state)))
    restore(saved({"m": models[0]}), {"m": models[1]})
    assert seen
    assert seen == [["_orig_mod.weight", "_orig_mod.bias"]] * len(seen)


def test_what_does_not_fit_is_told_before_anything_changes() -> None:
    state = {"m": compiled(nn.Sequential(nn.Linear(2, 2), nn.Linear(5, 1)))}
    before = [tensor.clone() for tensor in state["m"].parameters()]
    store: MemoryStore = saved({"m": nn.Sequential(nn.Linear(2, 2), nn.Linear(4, 1))})
    with pytest.raises(RestoreError, match=r"m\.1\.weight is \[1, 5\] here and \[1, 4\] in the checkpoint"):
        restore(store, state)
    assert all(map(torch.equal, before, state["m"].parameters()))


def test_a_state_dict_of_the_users_own_stays_as_it_is() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.DataParallel(nn.Linear(1, 1))
            self.given: Any = None

        def state_dict(self, *_: Any, **__: Any) -> Any:
            return {"step": 3, 7: self.inner.module.weight.detach()}

        def load_state_dict(self, state: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
            self.given = state

    first, second = Own(), Own()
    restore(saved({"m": first}), {"m": second})
    assert second.given["step"] == 3
    assert torch.equal(second.given[7], first.inner.module.weight)
