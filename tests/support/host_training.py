"""A training on host tensors that is saved at every step, and what each checkpoint of it must hold."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastckpt import Checkpointer, Every, Options
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.memory import MemoryStore

SHORT_S = 20.0  # no wait of these tests comes near it
MIB = 1 << 20


class Training:
    """Parameters, statistics, moments: `mib` MiB in all (4, 16 or 64)."""

    def __init__(self, mib: int = 4) -> None:
        torch.manual_seed(3)
        self.width = 256 * math.isqrt(mib)
        self.model = torch.nn.Sequential(*[torch.nn.Linear(self.width, self.width, bias=False) for _ in range(2)])
        self.norm = torch.nn.BatchNorm1d(self.width)
        self.optim = torch.optim.SGD([*self.model.parameters(), *self.norm.parameters()], lr=0.01, momentum=0.9)
        self.state = {"model": self.model, "norm": self.norm, "optim": self.optim}
        self.done = 0

    def step(self) -> int:
        self.backward()
        return self.update()

    def backward(self) -> None:
        """The part of a step that waits for no copy."""
        self.done += 1
        x = torch.randn(2, self.width, generator=torch.Generator().manual_seed(self.done))
        self.norm(self.model(x)).square().mean().backward()

    def update(self) -> int:
        self.optim.step()
        self.optim.zero_grad()
        return self.done

    def now(self) -> list[torch.Tensor]:
        moments = [self.optim.state[p]["momentum_buffer"] for p in self.model.parameters() if p in self.optim.state]
        tensors = [*self.model.state_dict().values(), *self.norm.state_dict().values(), *moments]
        return [tensor.clone() for tensor in tensors]


def after(steps: int, mib: int = 4) -> list[torch.Tensor]:
    training = Training(mib)
    for _ in range(steps):
        training.step()
    return training.now()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def options(**settings: Any) -> Options:
    settings = {"host_budget_bytes": 128 * MIB, "verify_snapshot": "off", **settings}
    return Options(threads=1, connections=1, compress=False, **settings)


def checkpointer(store: MemoryStore, training: Training, **settings: Any) -> Checkpointer:
    settings = {"every": Every(steps=1), "keep": None, "spot": None, "options": options(), **settings}
    return Checkpointer(store, training.state, **settings)


def committed(store: MemoryStore) -> list[int]:
    return sorted(found.step for found in Catalog(Repository(store)).history())


def check(store: MemoryStore, steps: list[int], mib: int = 4) -> None:
    """These checkpoints exist, and hold the states of their steps."""
    assert committed(store) == steps
    for step in steps:
        other = Training(mib)
        with checkpointer(store, other) as ckpt:
            assert ckpt.restore(step=step) == step
        assert same(other.now(), after(step, mib)), f"step {step}"
