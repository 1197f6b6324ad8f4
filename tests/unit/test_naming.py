"""What gets a name in the directory, and what is not touched on the way there."""

from __future__ import annotations

import enum
import io
import pickle
import tracemalloc
import weakref
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.format.tensor_names import ReprKey, key_of
from fastckpt.state import capture
from fastckpt.state.naming import named_tensors
from tests.support.readers import index_of


def names(state: Any, pickle_module: Any = None) -> list[str]:
    file = io.BytesIO()
    fastckpt.save(state, file, **({"pickle_module": pickle_module} if pickle_module else {}))
    file.seek(0)
    with fastckpt.open(file) as reader:
        return [".".join(map(str, entry.name)) for entry in index_of(reader).directory.tensors]


class Explosive:
    """Looked at in no way."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


class Hiding:
    """Leaves its caches out of what is pickled."""

    calls = 0

    def __init__(self) -> None:
        self.cache: list[Any] = [Explosive()] * 3
        self.dead = weakref.proxy(Explosive())
        self.w = torch.ones(2)
        self.hidden = torch.ones(5)

    def __getstate__(self) -> dict[str, Any]:
        type(self).calls += 1
        return {"w": self.w, "more": [torch.zeros(3)]}


def test_what_getstate_leaves_out_is_not_looked_at() -> None:
    Hiding.calls = 0
    captured = capture({"d": Hiding()}, pickle, 2)
    assert [entry.name for entry in captured.tensors] == [("d", "w"), ("d", "more", 0)]
    assert Hiding.calls == 1, "its code ran more often than pickling runs it"
    assert len(captured.storages) == 2


class Cached(torch.nn.Linear):
    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "cache"}


def test_a_module_with_a_getstate_has_the_names_of_a_module() -> None:
    module = Cached(2, 2)
    module.__dict__["cache"] = Explosive()
    assert names({"m": module}) == ["m.bias", "m.weight"]


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = torch.ones(1), torch.ones(2)

    def __getstate__(self) -> Any:
        return None, {"a": self.a, "b": self.b}


@dataclass
class Rebuilt:
    """Pickled as a call, whose arguments are attributes."""

    left: torch.Tensor
    right: torch.Tensor

    def __reduce__(self) -> Any:
        return Rebuilt, (self.left, self.right)


class AsTuple:
    def __getstate__(self) -> Any:
        return (torch.ones(1), 3, torch.ones(2))

    def __setstate__(self, state: Any) -> None:
        pass


class AsTensor(AsTuple):
    def __getstate__(self) -> Any:
        return torch.ones(1)


class Output(OrderedDict[str, Any]):
    def __reduce__(self) -> Any:
        made, _, *rest = super().__reduce__()  # type: ignore[str-unpack]
        return (made, (), *rest)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Slotted(), ["x.a", "x.b"]),
        (Rebuilt(torch.ones(1), torch.ones(2)), ["x.left", "x.right"]),
        (AsTuple(), ["x.0", "x.2"]),
        (AsTensor(), ["x.0"]),
        (Output(a=torch.ones(1), b=[torch.ones(2)]), ["x.a", "x.b.0"]),
        (UserDict(a=torch.ones(1)), ["x.data.a"]),
        (SimpleNamespace(a=torch.ones(1)), ["x.a"]),
        (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1), ["x.param_groups.0.params.0"]),
    ],
)
def test_names_are_those_of_what_is_pickled(value: Any, expected: list[str]) -> None:
    assert names({"x": value}) == expected


def test_another_pickle_module_decides_by_itself() -> None:
    """It may have a reducer_override of its own: there, attributes have the names."""
    module = SimpleNamespace(Pickler=pickle.Pickler, __name__="other")
    assert names({"x": AsTuple(), "w": torch.ones(1)}, module) == ["w"]


class Key:
    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        raise AssertionError("a key was shown")

    __str__ = __repr__


class Text(str):
    def __repr__(self) -> str:
        raise AssertionError("a key was shown")

    __str__ = __repr__


class Color(enum.Enum):
    RED = 1

    def __repr__(self) -> str:
        raise AssertionError("a key was shown")


def test_keys_are_not_asked_to_show_themselves() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))]
    state = {  # type: ignore[misc]
        **{key: {"m": torch.zeros(2)} for key in parameters},
        Key(1): torch.ones(1),
        (Key(2), 1): torch.ones(1),
        Text("t"): torch.ones(1),
        Color.RED: torch.ones(1),
        2.5: torch.ones(1),
        torch.float16: torch.ones(1),
    }
    found = names(state)
    assert len(set(found)) == len(found), "two keys have one name"
    assert set(found) == {
        "<Parameter 0>.m",
        "<Parameter 1>.m",
        "<Key 2>",
        "(<Key>, 1)",
        "'t'",
        "<Color.RED>",
        "2.5",
        "torch.float16",
    }


@pytest.mark.parametrize("key", [True, None, 1.5, 2j, b"x", (1, "a"), (), (1,), ..., 1 << 70])
def test_keys_of_built_in_types_are_shown_as_ever(key: Any) -> None:
    assert key_of(key) == ReprKey(repr(key))


@pytest.mark.parametrize("numbers", [list(range(300_000)), [0.5] * 300_000, dict.fromkeys(range(300_000), 1.0)])
def test_numbers_are_passed_over(numbers: Any) -> None:
    """A loss history: an entry on the stack for each of them took 300 bytes and 600 ns."""
    tracemalloc.start()
    found = list(named_tensors({"history": numbers, "w": torch.ones(1)}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [named.name for named in found] == [("w",)]
    assert peak < 1 << 20, f"{peak} bytes"
