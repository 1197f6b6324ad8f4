"""Ranks that train on the samples of an `ElasticSampler`. Run in processes of their own (`tests.support.ranks`)."""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import fastckpt
from fastckpt import Options

LENGTH, BATCH = 26, 8
"""The last step of an epoch has two samples: fewer than ranks."""


def train(url: str | None, steps: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train this many steps: with a Checkpointer, if there is a URL, else from a state and by hand.

    Returns this rank's samples of each step, and the state at the end; with a Checkpointer, as it is restored.
    """
    net = nn.Linear(3, 1, dtype=torch.float64)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    model = nn.parallel.DistributedDataParallel(net) if torch.distributed.is_initialized() else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sampler = fastckpt.ElasticSampler(LENGTH, BATCH, seed=5)
    parts: dict[str, Any] = {"model": net, "optimizer": optimizer, "sampler": sampler}
    for name, one in parts.items() if state is not None else ():
        one.load_state_dict(state[name])  # type: ignore[index]
    data = torch.randn(LENGTH, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loader: DataLoader[Any] = DataLoader([(n, *row.split([3, 1])) for n, row in enumerate(data)], batch_sampler=sampler)
    found: list[list[int]] = []

    def step(batch: Any) -> None:
        numbers, x, y = batch
        loss = (model(x) - y).square().mean() * sampler.weight()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(numbers.tolist() if sampler.weight() else [])

    def batches() -> Any:
        while True:
            yield from loader

    if url is None:
        for _, batch in zip(range(steps), batches(), strict=False):
            step(batch)
            sampler.advance()
        return {"samples": found, "state": {name: one.state_dict() for name, one in parts.items()}}
    options = Options(threads=1, connections=2, host_budget_bytes=64 << 20)
    with fastckpt.Checkpointer(url, {**parts, "model": model}, every=None, spot=None, options=options) as ckpt:
        for number, batch in zip(range(ckpt.restore(), steps), batches(), strict=False):
            step(batch)
            ckpt.step(number + 1)
        ckpt.save_now(steps).wait(60)
        nn.init.zeros_(net.weight)
        sampler.advance()
        ckpt.restore()
    return {"samples": found, "state": {name: one.state_dict() for name, one in parts.items()}}


def train_example(script: str, url: str, steps: int) -> tuple[int, int, int]:
    """Run an example in this process, which is in a process group already.

    Returns the step that it restored, and the position of its sampler at the end: epoch, samples.
    """
    found: dict[str, Any] = {}

    class Kept(fastckpt.Checkpointer):
        def __init__(self, url: str, state: dict[str, Any], **settings: Any) -> None:
            super().__init__(url, state, **settings)
            found.update(state)

        def restore(self, *arguments: Any, **settings: Any) -> int:
            found["restored"] = super().restore(*arguments, **settings)
            return int(found["restored"])

    fastckpt.Checkpointer = Kept  # type: ignore[misc]
    torch.distributed.init_process_group = lambda *_, **__: None  # type: ignore[assignment]
    sys.argv = [script, url, "--steps", str(steps)]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    return found["restored"], found["sampler"].epoch, found["sampler"].samples
