"""A training whose weights are swapped for an evaluation."""

from __future__ import annotations

from typing import Any

import torch

from fastckpt import Checkpointer, Options
from fastckpt.store.memory import MemoryStore
from tests.support.repositories import history

SHORT_S = 20.0
MIB = 1 << 20
OPTIONS = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 * MIB, max_stall_s=SHORT_S)


class Job:
    """A training whose weights are swapped for an evaluation, as libraries of averaged weights do it: through `.data`."""

    def __init__(self, n_layers: int = 8, width: int = 600) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(n_layers)])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.state = {"model": self.model, "optimizer": self.optimizer}
        self._kept: list[torch.Tensor] = []

    def step(self) -> dict[str, torch.Tensor]:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def swap(self) -> None:
        self._kept = [parameter.data.clone() for parameter in self.model.parameters()]
        for parameter in self.model.parameters():
            parameter.data.fill_(7.0)

    def swap_back(self) -> None:
        for parameter, kept in zip(self.model.parameters(), self._kept, strict=True):
            parameter.data.copy_(kept)


def open_on(store: MemoryStore, state: dict[str, Any], *, proven: bool = True, **settings: Any) -> Checkpointer:
    """proven: as after a save whose interval was quiet. Copies are left to the optimizer's step from the first save on."""
    ckpt = Checkpointer(store, state, **{"every": None, "keep": None, "spot": None, "options": OPTIONS, **settings})
    ckpt._engine.fence._proven = proven
    return ckpt


def committed(store: MemoryStore) -> list[int]:
    return sorted(found.step for found in history(store))
