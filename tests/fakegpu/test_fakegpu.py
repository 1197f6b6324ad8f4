"""Runs the suite on the test device, in processes of its own."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.fakegpu.build import build, why_unavailable

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "schedules.json"


def run(*arguments: str, **environment: str) -> str:
    """Run pytest on the suite, or on the files of it that are named first. What it printed."""
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    build()
    files = [] if arguments and arguments[0].startswith("tests/") else ["tests/fakegpu/suite"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, env={**os.environ, **environment}, timeout=3600
    )
    assert done.returncode == 0, f"{done.stdout[-20000:]} {done.stderr[-5000:]}"
    return done.stdout[-2000:]


LONG = ("test_bugs.py", "test_fsdp.py", "test_training.py")
SHORT = sorted({path.name for path in (ROOT / "tests/fakegpu/suite").glob("test_*.py")} - {*LONG})
# Starting a process and its device takes as long as half a short file.
GROUPS = {**{name: [name] for name in LONG}, "short files": SHORT[::2], "other short files": SHORT[1::2]}


@pytest.mark.timeout(900)
def test_the_suite_with_a_thread_for_each_stream() -> None:
    """Over 5 s: some hundred training runs, and building the device takes a quarter of a minute the first time."""
    print(run("-k", "gpu-", FAKEGPU_SCHEDULES="threads"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", GROUPS)
def test_the_suite(group: str) -> None:
    """Over 5 s: some hundred training runs."""
    files = [f"tests/fakegpu/suite/{name}" for name in GROUPS[group]]
    print(run(*files, FAKEGPU_SEEDS=os.environ.get("FAKEGPU_SEEDS", "1")))


@pytest.mark.slow
@pytest.mark.timeout(3700)
def test_on_100_random_schedules() -> None:
    """Over 5 s: a quarter of an hour. Training without bugs; that bugs are reported is shown by every kind of schedule above."""
    started = time.monotonic()
    names = "nothing_is_reported or hold_the_state or shards_are_those"
    output = run(
        "tests/fakegpu/suite/test_training.py",
        "tests/fakegpu/suite/test_fsdp.py",
        "-k",
        f"gpu- and ({names})",
        FAKEGPU_SEEDS="100",
    )
    passed = re.search(r"(\d+) passed", output)
    assert passed
    result = {
        "what": "training runs that save at every step, on the test device; nothing reported, every checkpoint whole",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "schedules": 6 + 100,
        "random seeds": "0 to 99",
        "tests passed": int(passed[1]),
        "reports": 0,
        "seconds": round(time.monotonic() - started),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
