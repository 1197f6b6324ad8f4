"""The tests for a CUDA device (tests/gpu), tried without one: on the test device, and where there is no device at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.fakegpu.build import build, why_unavailable

ROOT = Path(__file__).parents[2]
ON_TEST_DEVICE = {
    "FASTCKPT_GPU_TESTS_ON": "fakegpu",
    "FASTCKPT_GPU_SNAPSHOTS": "10",
    "FASTCKPT_GPU_STATE_MB": "2",
    "FASTCKPT_GPU_SEED": "1",
}
# Every test function runs, with some of its parameters.
FEW = "not adamw and not sgd and not closure and not lbfgs and not two_opt and not 64-ring and not pageable-20 and not pageable-400"


def run(*command: str, status: int = 0, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTCKPT_GPU")}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        env={**clean, **environment},
        timeout=280,
    )
    print(done.stdout[-20000:], done.stderr[-5000:])
    assert done.returncode == status
    return done.stdout


@pytest.fixture
def test_device() -> None:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    build()


@pytest.mark.usefixtures("test_device")
def test_the_suite_passes_on_the_test_device() -> None:
    """Over 5 s: some sixty training runs."""
    said = run("pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu", "-k", FEW, **ON_TEST_DEVICE)
    assert "failed" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_every_test_is_skipped_and_says_why() -> None:
    """Over 5 s: starting torch again, twice."""
    said = run("pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu")
    assert "passed" not in said
    assert "there is no CUDA device to test on" in said
    assert "Nothing was run: there is no CUDA device to test on" in run("tests.gpu.first_run", status=2)


@pytest.mark.usefixtures("test_device")
def test_the_checklist_goes_on_after_a_step_that_fails_and_writes_its_result(tmp_path: Path) -> None:
    """Over 5 s: starting torch again, three times."""
    environment = {**ON_TEST_DEVICE, "TMPDIR": str(tmp_path)}
    environment["FASTCKPT_GPU_SNAPSHOTS"] = "none"  # step 2 cannot even be collected
    out = tmp_path / "out"
    run("tests.gpu.first_run", "--quick", "--steps", "2,6,8", "--out", str(out), status=1, **environment)
    (path,) = out.glob("*.json")
    result = json.loads(path.read_text())
    assert result["rehearsal"]
    assert result["versions"]["torch"] == torch.__version__
    steps = {one["step"]: one for one in result["steps"]}
    assert {number: one["outcome"] for number, one in steps.items()} == {
        2: "failed",
        6: "recorded",
        8: "skipped",
    }
    assert steps[8]["why"]
    assert "invalid literal for int" in steps[2]["log"]
    assert str(ROOT) not in path.read_text()
    assert steps[6]["recorded"][0]["value"]["dcp.save"]["right"]
    assert "| 6 | what torch's own async_save stores | **recorded** |" in path.with_suffix(".md").read_text()


@pytest.mark.usefixtures("test_device")
def test_a_step_that_comes_when_the_time_is_over_is_skipped(tmp_path: Path) -> None:
    """Over 5 s: starting torch again, twice."""
    environment = {**ON_TEST_DEVICE, "TMPDIR": str(tmp_path)}
    run("tests.gpu.first_run", "--minutes", "0.01", "--out", str(tmp_path), **environment)
    (path,) = tmp_path.glob("20*.json")
    steps = json.loads(path.read_text())["steps"]
    assert {(one["outcome"], one["why"]) for one in steps[:6]} == {("skipped", "no time was left")}
