"""Training runs that save at every step, and what their checkpoints hold."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastckpt.options import Options
from fastckpt.reading.object_loader import load_object
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import open_vote
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.memory import MemoryStore
from fastckpt.training.checkpointer import Checkpointer, Every
from tests.fakegpu import device

OPTIONS = Options(threads=2, connections=2, host_budget_bytes=256 << 20)


def reports() -> list[str]:
    """What was reported so far, once everything has run; it is forgotten then."""
    device.starve(None)
    for index in range(2):
        torch.accelerator.synchronize(index)
    found = device.violations()
    device.clear()
    return found


def host(value: Any) -> Any:
    """A copy of a state, in host memory, of now."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: host(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [host(one) for one in value]
    return value


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def load(store: Store, step: int) -> Any:
    """What the checkpoint of a step holds."""
    choice = Catalog(Repository(store)).choose(step)
    assert choice is not None, f"there is no step {step}"
    return load_object(
        open_vote(store, choice.commit.vote(0)),
        OPTIONS,
        2,
        map_location="cpu",
        pickle_module=pickle,
        weights_only=True,
        load_args={},
    )


@dataclass
class Saved:
    """A run's checkpoints, and the states that they should hold."""

    store: MemoryStore = field(default_factory=MemoryStore)
    states: dict[int, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Every one, tensor by tensor."""
        for step, state in self.states.items():
            assert equal(state, load(self.store, step)), f"step {step}"


def train(
    state: dict[str, Any],
    one_step: Callable[[int], None],
    *,
    steps: int = 4,
    options: Options = OPTIONS,
    checkpointer: type[Checkpointer] = Checkpointer,
    compare: bool = True,
    after_save: Callable[[int], None] = lambda step: None,
) -> Saved:
    """`steps` steps with a save after each; the copies run while the next is computed. compare: with states taken by synchronising."""
    saved = Saved()
    with checkpointer(saved.store, state, every=Every(steps=1), keep=None, spot=None, options=options) as ckpt:
        for step in range(1, steps + 1):
            one_step(step)
            if compare:
                saved.states[step] = {
                    name: host(one.state_dict() if hasattr(one, "state_dict") else one) for name, one in state.items()
                }
            ckpt.save_now(step)
            ckpt.step(step)
            after_save(step)
        one_step(steps + 1)  # the last save has its fence, too
    return saved
