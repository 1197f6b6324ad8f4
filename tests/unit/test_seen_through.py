"""Whether every tensor of a state has a name: not if it may be in something that is not looked into."""

from __future__ import annotations

import argparse
import datetime
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt.training.seen_through import is_seen_through

T = torch.ones(2)


@dataclass
class Config:
    value: Any = 1


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def with_attribute(value: Any) -> OrderedDict[str, int]:
    made = OrderedDict(a=1)
    made.hidden = value  # type: ignore[attr-defined]
    return made


def tensor_with_attribute() -> torch.Tensor:
    made = torch.ones(2)
    made.hidden = T  # type: ignore[attr-defined]
    return made


SEEN = {
    "plain": {"a": T, "l": [T, (T, 1, "x")], "n": None, 3: 2.0},
    "values": [np.float32(1), Path("x"), datetime.timedelta(1), torch.float32, {1, 2}, deque([1]), b"", slice],
    "attributes": [argparse.Namespace(x=1), Config(), with_attribute({"version": 1}), defaultdict(int, a=1)],
}
HIDDEN = {
    "set": {"a": {T}},
    "deque": [deque([T])],
    "key": {T: 1},
    "key's part": {(1, T): 1},
    "attribute of a dictionary": with_attribute(T),
    "attribute of a tensor": tensor_with_attribute(),
    "object": [argparse.Namespace(x=[T])],
    "of a class": [Config(T)],
    "slots": [Slotted(T)],
    "slots that may hold one": [Slotted(1)],
    "unknown": [iter([1])],
}


@pytest.mark.parametrize("kind", SEEN)
def test_seen(kind: str) -> None:
    assert is_seen_through(SEEN[kind])


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden(kind: str) -> None:
    assert not is_seen_through(HIDDEN[kind])


def test_cycles_end() -> None:
    state: dict[str, Any] = {"a": T}
    state["self"] = state
    assert is_seen_through(state)
