"""A checkpoint of another model: everything that does not fit in one message; `strict=False` as torch's modules understand it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastckpt import Checkpointer
from fastckpt.errors import RestoreError
from fastckpt.store.memory import MemoryStore


def saved(state: dict[str, Any]) -> MemoryStore:
    store = MemoryStore()
    with Checkpointer(store, state, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    return store


def restore(store: MemoryStore, state: dict[str, Any], **how: Any) -> None:
    with Checkpointer(store, state, every=None, spot=None) as ckpt:
        assert ckpt.restore(**how) == 1


class Wide(nn.Module):
    def __init__(self, n: int, prefix: str = "w", size: int = 2) -> None:
        super().__init__()
        for number in range(n):
            self.register_parameter(f"{prefix}{number}", nn.Parameter(torch.full((size,), float(number + size))))


def test_all_names_are_in_one_message() -> None:
    store = saved({"model": Wide(30), "other": Wide(4, "same", 3), "extra": torch.ones(2)})
    with pytest.raises(RestoreError) as error:
        restore(store, {"model": Wide(25, "v"), "other": Wide(4, "same", 5), "novel": torch.ones(2)})
    found = str(error.value)
    for number in range(25):
        assert f"model.v{number} is not in the checkpoint" in found
    for number in range(30):
        assert f"model.w{number} of the checkpoint has no place here" in found
    for number in range(4):
        assert f"other.same{number} is [5] here and [3] in the checkpoint" in found
    assert "'extra' of the checkpoint has no place here" in found
    assert "'novel' is not in the checkpoint" in found
    assert found.endswith("restore another step")


def test_what_is_not_strict(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    store = saved({"model": model, "ema": torch.ones(2)})
    other = nn.Sequential(nn.Linear(3, 3))
    other.register_parameter("head", nn.Parameter(torch.full((4,), 9.0)))
    state: dict[str, Any] = {"model": other, "rate": torch.tensor(3.0)}
    with pytest.raises(RestoreError, match=r"strict=False"):
        restore(store, state)
    assert not torch.equal(other.get_parameter("0.weight"), model.get_parameter("0.weight"))
    restore(store, state, strict=False)
    assert torch.equal(other.get_parameter("0.weight"), model.get_parameter("0.weight"))
    assert torch.equal(other.get_parameter("head"), torch.full((4,), 9.0))
    assert state["rate"] == 3
    (told,) = [record.message for record in caplog.records]
    for words in ("model.head is not", "model.1.weight of", "model.1.bias of", "'rate' is not", "'ema' of"):
        assert words in told


def test_another_shape_is_refused_without_strict_too() -> None:
    store = saved({"model": nn.Linear(3, 3)})
    model = nn.Linear(3, 4)
    before = model.weight.clone()
    with pytest.raises(RestoreError, match=r"model.weight is \[4, 3\] here and \[3, 3\]"):
        restore(store, {"model": model}, strict=False)
    assert torch.equal(model.weight, before)


def test_a_module_with_a_load_of_its_own_is_not_told_of_strict() -> None:
    class Own(nn.Linear):
        def load_state_dict(self, state: Any) -> Any:  # type: ignore[override]
            return super().load_state_dict(state)

    first, second = Own(2, 2), Own(2, 2)
    restore(saved({"model": first}), {"model": second})
    assert torch.equal(first.weight, second.weight)
