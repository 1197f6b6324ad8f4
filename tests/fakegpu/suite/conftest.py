"""The fixture `gpu`: a device under one schedule, on which nothing may be reported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from fastckpt.snapshot import side_stream
from tests.fakegpu import device
from tests.fakegpu.build import why_unavailable

_reason = why_unavailable()
if _reason is not None:
    pytest.skip(_reason, allow_module_level=True)
device.load()


class Schedule(NamedTuple):
    name: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name}{self.seed}" if self.name == "random" else self.name


SEEDS = int(os.environ.get("FAKEGPU_SEEDS", "4"))
NAMES = os.environ.get("FAKEGPU_SCHEDULES", "eager,lazy,copy_late,compute_late,starve_copies,starve_compute").split(",")
ALL = [Schedule(name) for name in NAMES]
if NAMES != ["threads"]:
    ALL += [Schedule("random", seed) for seed in range(SEEDS)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "gpu" in metafunc.fixturenames:
        metafunc.parametrize("gpu", ALL, ids=[f"gpu-{schedule}" for schedule in ALL], indirect=True)


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device. Afterwards the test fails if anything was reported that it has not taken with `reports()`."""
    schedule: Schedule = request.param
    where = torch.device("fakegpu:0")
    starve = schedule.name.startswith("starve")
    device.configure("eager" if starve else schedule.name, schedule.seed)
    device.cost()
    device.clear()
    if schedule.name == "starve_compute":
        device.starve(torch.accelerator.current_stream(where))
    if schedule.name == "starve_copies":
        made = side_stream.SideStream.__init__

        def starved(self: side_stream.SideStream, on: torch.device) -> None:
            made(self, on)
            device.starve(self.stream)

        monkeypatch.setattr(side_stream.SideStream, "__init__", starved)
    yield where
    device.starve(None)
    torch.accelerator.synchronize(0)
    torch.accelerator.synchronize(1)
    found = device.violations()
    device.clear()
    assert not found, "\n".join(found)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A process that has entered "threads" cannot leave it.
    items.sort(key=lambda item: "threads" in item.name)
