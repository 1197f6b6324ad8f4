"""A job that is saved now and then while something goes wrong, and what it must come to."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch

import fastckpt
from fastckpt.options import Options
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.training.checkpointer import Checkpointer
from tests.fakegpu.suite.models import Job, inputs
from tests.fakegpu.suite.tools import Saved, equal, host, reports
from tests.support.stores import HeldStore

SHORT_S = 20.0  # no wait of these tests comes near it
UNVERIFIED = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 << 20, verify_snapshot="off")
VERIFIED = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 << 20, verify_snapshot="always")
RING = Options(
    threads=1, connections=1, compress=False, host_budget_bytes=24 << 20, verify_snapshot="off", max_stall_s=SHORT_S
)
"""Two slabs of 4 MiB for snapshots, and as much for packs."""


def small(where: torch.device) -> Job:
    """2 MB with its momentum: a storage that is a chunk of its own, and some that are copied together."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 520), torch.nn.GELU(), torch.nn.Linear(520, 520)).to(where)
    optim = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def step(number: int) -> None:
        model(inputs(number, 16, 32).to(where)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


def wide(where: torch.device) -> Job:
    """29 MB with its moments, and some small ones that are copied together."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(2)]).to(where)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> None:
        model(inputs(number, 2, 1100).to(where)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


class Run:
    """A job that is saved now and then, and what it must come to."""

    def __init__(self, where: torch.device, make: Callable[[torch.device], Job] = small, **settings: Any) -> None:
        self.where, self.make = where, make
        self.job = make(where)
        self.store = HeldStore()
        settings = {"every": None, "keep": None, "spot": None, "options": UNVERIFIED, **settings}
        self.ckpt = Checkpointer(self.store, self.job.state, **settings)
        self.done = 0

    def step(self) -> int:
        """One of training. Its number."""
        self.job.step(self.done + 1)
        self.done += 1
        return self.done

    def save(self) -> fastckpt.CommitHandle:
        """Of the last step, whose optimizers have called their hooks: it is left to the next one's."""
        handle = self.ckpt.save_now(self.done)
        self.ckpt.step(self.done)
        return handle

    def train_and_save(self) -> fastckpt.CommitHandle:
        self.step()
        return self.save()

    def committed(self) -> list[int]:
        return sorted(found.step for found in Catalog(Repository(self.store)).history())

    def check(self, *expected: int, apart_from: tuple[int, ...] = ()) -> None:
        """Train on, save once more, close; then look. expected: steps that have a checkpoint, and no others but the last one.
        apart_from: those that may have one.
        """
        self.store.open.set()
        self.train_and_save().wait(SHORT_S)
        last = self.done
        self.step()
        self.ckpt.wait(SHORT_S)
        assert self.ckpt.stats.snapshot_bytes == 0, "slabs were lost"
        self.ckpt.close()
        now = {name: host(one.state_dict()) for name, one in self.job.state.items()}
        found = self.committed()
        assert set(found) - {*apart_from} == {*expected, last} - {*apart_from}
        undisturbed = self.make(self.where)
        saved = Saved(self.store)
        for number in range(1, self.done + 1):
            undisturbed.step(number)
            if number in found:
                saved.states[number] = {name: host(one.state_dict()) for name, one in undisturbed.state.items()}
        saved.check()
        compare(now, {name: host(one.state_dict()) for name, one in undisturbed.state.items()})
        assert not reports()


def compare(a: Any, b: Any) -> None:
    assert equal(a, b), "training was changed"


def interrupt() -> None:
    """As the user does."""
    signal.raise_signal(signal.SIGINT)
