"""Fixtures of the tests on a CUDA device. Without one, every test is skipped, and says why.

FASTCKPT_GPU_SEED      where the random delays begin; printed by each test
FASTCKPT_GPU_RECORD    a file: what is measured, one JSON object a line
FASTCKPT_GPU_TESTS_ON  fakegpu: try the suite itself on the test device of tests/fakegpu
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.machines import CHOICE, FAKE, Machine, open_machine, why_unavailable

RUN_SEED = int(os.environ.get("FASTCKPT_GPU_SEED") or random.SystemRandom().getrandbits(32))
Record = Callable[[str, Any], None]


@pytest.fixture(scope="session")
def opened_machine() -> Machine:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    return open_machine()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Another one for each test; the same ones in a run with the same FASTCKPT_GPU_SEED."""
    return random.Random(f"{RUN_SEED} {request.node.name}").getrandbits(32)


@pytest.fixture(autouse=True)
def machine(opened_machine: Machine, seed: int) -> Iterator[Machine]:
    """What is tested. Afterwards the test fails if the device reports anything that it has not taken with `problems()`."""
    print(f"FASTCKPT_GPU_SEED={RUN_SEED} (this test's: {seed})")
    opened_machine.begin(seed)
    yield opened_machine
    found = opened_machine.problems()
    assert not found, "\n".join(found)


@pytest.fixture
def gpu(machine: Machine) -> torch.device:
    return machine.device


@pytest.fixture
def cuda(machine: Machine) -> torch.device:
    """For tests of what is CUDA's alone."""
    if os.environ.get(CHOICE) == FAKE:
        pytest.skip("this is about CUDA itself, and the suite runs on the test device")
    return machine.device


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Keep a figure, or a finding: nothing is asserted about it."""

    def write(name: str, value: Any) -> None:
        line = json.dumps({"test": request.node.name, "name": name, "value": value})
        print(line)
        path = os.environ.get("FASTCKPT_GPU_RECORD")
        if path:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    return write
