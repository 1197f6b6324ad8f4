"""What saved ranks had each for itself is found, and of ranks whose pickles are alike to the byte none is unpickled for it."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt.format.repository_records import Commit
from fastckpt.reading import alike
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.store.memory import MemoryStore
from fastckpt.training import differing
from tests.support.repositories import OPTIONS, begin, save_ranks

WORLD = 4
N_ELEMENTS = 10_000


def state(note: Any = 1, array: int = 0) -> dict[str, Any]:
    return {
        "model": {"w": torch.arange(6.0)},
        "own": {"note": note, "tensor": torch.tensor(note)},
        "array": {"place": np.full(N_ELEMENTS, array)},
    }


def found(states: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], int]:
    """What differs, and how many states were unpickled."""
    store = MemoryStore()
    begin(store, WORLD)
    commit: Commit = save_ranks(store, 1, 1, states)
    right, calls = alike.values_of, []

    def values_of(*given: Any, **settings: Any) -> Any:
        calls.append(given)
        return right(*given, **settings)

    monkeypatch.setattr(differing, "values_of", values_of)
    targets = dict.fromkeys(states[0])
    look = differing.Differing(targets, (), SavedRanks(store, commit), OPTIONS, weights_only=False)
    return look.find(range(WORLD)), len(calls)


def without_array(**given: Any) -> dict[str, Any]:
    return {key: value for key, value in state(**given).items() if key != "array"}


def test_equal_pickles_are_not_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found([without_array() for _ in range(WORLD)], monkeypatch) == ({}, 0)


def test_a_rank_with_another_value_is_unpickled_and_rank_0_once(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [without_array(note=rank if rank > 1 else 1) for rank in range(WORLD)]
    unlike, n_unpickled = found(states, monkeypatch)
    assert list(unlike) == ["own"]
    assert "of rank 2 is not that of rank 0" in unlike["own"]
    assert n_unpickled == 3


def test_equal_pickles_with_other_bytes_outside_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [state(array=int(rank == 3)) for rank in range(WORLD)]
    assert list(found(arrays, monkeypatch)[0]) == ["array"]
    nameless = [{"array": deque(one["array"].values())} for one in arrays]
    assert list(found(nameless, monkeypatch)[0]) == ["array"]
    tensors = [without_array() for _ in range(WORLD)]
    tensors[2]["own"]["tensor"] = torch.tensor(7)
    assert found(tensors, monkeypatch) == ({"own": "own.tensor of rank 2 is not that of rank 0"}, 0)
