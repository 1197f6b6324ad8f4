"""Runs the suite on the test device, in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakegpu.build import build, why_unavailable

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> None:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    build()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/fakegpu/suite", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, env={**os.environ, **environment}, timeout=1500
    )
    print(done.stdout[-20000:], done.stderr[-5000:])
    assert done.returncode == 0


def test_on_deterministic_schedules() -> None:
    """Over 5 s: some hundred training runs, and building the device takes a quarter of a minute the first time."""
    run()


def test_with_a_thread_for_each_stream() -> None:
    """Over 5 s: starting torch again."""
    run("-k", "gpu-", FAKEGPU_SCHEDULES="threads")


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_on_100_random_schedules() -> None:
    run("-k", "gpu-", FAKEGPU_SEEDS="100")
