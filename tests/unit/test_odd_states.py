"""Optimizers and tensors unlike torch's own: what cannot be fenced is copied first, what cannot be saved is refused by its name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastckpt import Checkpointer, Every, Options
from fastckpt.errors import SaveError
from fastckpt.snapshot import FencedTensors
from tests.support.stores import HeldStore

SHORT_S = 20.0
OPTIONS = Options(threads=1, connections=1, compress=False)


def open_on(store: HeldStore, state: dict[str, Any], **settings: Any) -> Checkpointer:
    return Checkpointer(store, state, **{"every": Every(steps=1), "spot": None, "options": OPTIONS, **settings})


class Counting(torch.optim.SGD):
    """As MADGRAD: values in its state under names, which are no parameters' own."""

    def __init__(self, params: Iterator[torch.nn.Parameter], make: Callable[[], Any]) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.make = make

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.state["k"] = self.make()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "value",
    [
        3,
        0.5,
        None,
        "warm",
        torch.tensor([7]),
        [torch.ones(3), 2],
        {"factors": [torch.ones(2)], "n": 1},
        (torch.ones(1),),
    ],
    ids=lambda value: type(value).__name__,
)
def test_state_of_an_optimizer_under_a_name_is_saved(value: Any) -> None:
    store = HeldStore()
    model = torch.nn.Linear(2, 2)
    optimizer = Counting(model.parameters(), lambda: value)
    with open_on(store, {"m": model, "o": optimizer}) as ckpt:
        for step in (1, 2, 3):
            train(model, optimizer)
            ckpt.step(step)
            ckpt.wait()
    other = Counting(torch.nn.Linear(2, 2).parameters(), lambda: None)
    with open_on(store, {"m": torch.nn.Linear(2, 2), "o": other}) as ckpt:
        assert ckpt.restore() == 3
    found = other.state["k"]
    assert type(found) is type(value)
    assert torch.equal(found, value) if isinstance(value, torch.Tensor) else str(found) == str(value)


def test_what_lies_in_a_state_under_a_name_or_in_a_list_is_copied_first() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = Counting(model.parameters(), lambda: torch.ones(3))
    train(model, optimizer)
    first = next(iter(model.parameters()))
    optimizer.state[first]["history"] = [torch.ones(4)]
    fenced = FencedTensors([optimizer]).addresses
    assert first.untyped_storage().data_ptr() in fenced
    assert optimizer.state[first]["momentum_buffer"].untyped_storage().data_ptr() in fenced
    assert optimizer.state["k"].untyped_storage().data_ptr() not in fenced
    assert optimizer.state[first]["history"][0].untyped_storage().data_ptr() not in fenced


class Wrapper(torch.optim.Optimizer):
    """As those of frameworks: an Optimizer by its class, which never called `Optimizer.__init__`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Passing(Wrapper):
    """Its hooks are those of what it wraps, which calls them with itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)


class Refusing(Wrapper):
    """Not even parameters until it is prepared."""

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        raise RuntimeError("prepare() comes first")


@pytest.mark.parametrize(("kind", "trusted"), [(Wrapper, False), (Passing, True), (Refusing, False)])
def test_wrappers_of_optimizers_are_saved(kind: type[Wrapper], trusted: bool) -> None:
    """Without a hook nothing may be left to it: the state is copied before `step` returns."""
    store = HeldStore()
    model = torch.nn.Linear(2, 2)
    optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    with open_on(store, {"m": model, "o": optimizer}) as ckpt:
        for step in (1, 2, 3):
            train(model, optimizer)
            assert ckpt._engine.fence.hooks is not None
            assert ckpt._engine.fence.hooks.can_be_trusted is trusted
            store.open.clear()
            ckpt.step(step)
            if not trusted:
                for parameter in model.parameters():
                    parameter.data.fill_(step)
            store.open.set()
            ckpt.wait()
            if not trusted and step == 2:
                weight = model.weight.detach().clone()
    other = torch.nn.Linear(2, 2)
    with open_on(store, {"m": other, "o": kind(torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))}) as ckpt:
        assert ckpt.restore() == 3
    if trusted:
        assert torch.equal(other.weight, model.weight)
    else:
        assert torch.all(other.weight < weight), "the write after the save is not in it"


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.empty(3, device="meta"),
    "parameter on meta": lambda: torch.nn.Parameter(torch.empty(3, device="meta")),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "nested, jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse, compressed": lambda: torch.eye(3).to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|CSR tensor).*:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning"
)  # torch 2.11, once a process
@pytest.mark.parametrize("name", ODD)
def test_tensors_of_every_layout_are_saved_again_and_again(name: str) -> None:
    store, value = HeldStore(), ODD[name]()
    state = {"v": value, "t": torch.ones(2)}
    model = torch.nn.Linear(2, 2)
    model.odd = value
    if isinstance(value, torch.nn.Parameter):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    else:
        optimizer = torch.optim.SGD([model.weight], lr=0.1)
    with open_on(store, {"s": state, "o": optimizer}) as ckpt:
        for step in (1, 2, 3):
            optimizer.step()
            state["t"] += 1
            ckpt.step(step)
            ckpt.wait()
    found: dict[str, Any] = {}
    with open_on(store, {"s": found, "o": optimizer}) as ckpt:
        assert ckpt.restore() == 3
    assert found["v"].layout == value.layout
    assert found["v"].is_nested == value.is_nested
    assert found["v"].device == value.device
    assert found["t"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (threading.Lock, "lock"),
        (lambda: (n for n in range(3)), "generator"),
        (lambda: lambda: 1, "function"),
        (lambda: torch.eye(3).to_mkldnn(), "Tensor"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_the_first_save_by_its_name(make: Callable[[], Any], kind: str) -> None:
    state: dict[str, Any] = {"loader": {"workers": [1, {"held": make()}]}, "t": torch.ones(2)}
    with open_on(HeldStore(), {"s": state}) as ckpt:
        with pytest.raises(SaveError, match=rf"s\.loader\.workers\.1\.held \(\S*{kind}\) cannot be saved") as caught:
            ckpt.step(1)
        assert caught.value.__cause__ is not None
        state["loader"]["workers"][1]["held"] = None
        ckpt.save_now(1).wait(SHORT_S)
        state["loader"]["workers"][1]["held"] = make()
        with pytest.raises(SaveError, match="held"):
            ckpt.save_now(2)
