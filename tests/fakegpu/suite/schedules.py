"""The schedules that the suite runs under, and how a process enters one: that of the tests, or one of the ranks that a test starts."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch

from fastckpt.snapshot.side_stream import SideStream
from tests.fakegpu import device


class Schedule(NamedTuple):
    """One of the device's, or starve_compute or starve_copies: everything eagerly but these streams, which run only what is waited for."""

    name: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name}{self.seed}" if self.name == "random" else self.name

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On "fakegpu:0", with the usual costs and no reports. By monkeypatch, as streams of copies are starved when they are made."""
        device.configure("eager" if self.name.startswith("starve") else self.name, self.seed)
        device.cost()
        device.clear()
        if self.name == "starve_compute":
            device.starve(torch.accelerator.current_stream(torch.device("fakegpu:0")))
        if self.name == "starve_copies":
            made = SideStream.__init__

            def starved(side: SideStream, on: torch.device) -> None:
                made(side, on)
                device.starve(side.stream)

            monkeypatch.setattr(SideStream, "__init__", starved)


SEEDS = int(os.environ.get("FAKEGPU_SEEDS", "4"))
NAMES = os.environ.get("FAKEGPU_SCHEDULES", "eager,lazy,copy_late,compute_late,starve_copies,starve_compute").split(",")
ALL = [Schedule(name) for name in NAMES]
if NAMES != ["threads"]:
    ALL += [Schedule("random", seed) for seed in range(SEEDS)]


def on(*names: str) -> pytest.MarkDecorator:
    """For a test whose outcome the other schedules hardly change: the fixture `gpu` under these alone, as far as the suite has them."""
    chosen = [schedule for schedule in ALL if schedule.name in ("threads", *names)]
    return pytest.mark.parametrize("gpu", chosen, ids=[f"gpu-{schedule}" for schedule in chosen], indirect=True)
