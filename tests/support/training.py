"""A small training that uses all that a checkpoint holds."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from fastckpt import Checkpointer, Every, Options, RNGState
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.memory import MemoryStore

SHORT_S = 20.0  # no wait of these tests comes near it


class Training:
    """A small real training: dropout, batch norm, AdamW, a schedule, all generators."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(20, 300),
            torch.nn.BatchNorm1d(300),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(300, 5),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 100)
        self.state = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "rng": RNGState()}

    def step(self) -> float:
        x = torch.randn(16, 20) * random.random() + float(np.random.rand())
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def losses(n: int) -> list[float]:
    training = Training()
    return [training.step() for _ in range(n)]


def checkpointer(store: MemoryStore, training: Training | None = None, **settings: Any) -> Checkpointer:
    settings = {"every": Every(steps=1), "spot": None, "options": Options(threads=1, connections=1), **settings}
    return Checkpointer(store, (training or Training()).state, **settings)


def living(store: MemoryStore) -> list[int]:
    return [c.step for c in Catalog(Repository(store)).history()]
