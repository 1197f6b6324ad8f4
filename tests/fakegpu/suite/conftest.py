"""The fixture `gpu`: a device under one schedule, on which nothing may be reported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.fakegpu import device
from tests.fakegpu.build import why_unavailable
from tests.fakegpu.suite.schedules import ALL, Schedule
from tests.fakegpu.suite.tools import reports

_reason = why_unavailable()
if _reason is not None:
    pytest.skip(_reason, allow_module_level=True)
device.load()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = any(
        mark.args[0] == "gpu" for mark in metafunc.definition.iter_markers("parametrize")
    )  # see `schedules.on`
    if "gpu" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("gpu", ALL, ids=[f"gpu-{schedule}" for schedule in ALL], indirect=True)


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device. Afterwards the test fails if anything was reported that it has not taken with `reports()`."""
    schedule: Schedule = request.param
    schedule.enter(monkeypatch)
    yield torch.device("fakegpu:0")
    found = reports()
    assert not found, "\n".join(found)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A process that has entered "threads" cannot leave it.
    items.sort(key=lambda item: "threads" in item.name)


@pytest.fixture
def late() -> Iterator[torch.device]:
    """As `gpu`, under one schedule, in which copies come as late as they may: for tests that are not about the order of streams."""
    device.configure("copy_late")
    device.cost()
    device.clear()
    yield torch.device("fakegpu:0")
    found = reports()
    assert not found, "\n".join(found)
