"""The loads of benchmarks/resharding.py, small: all contenders put the same values in place, and bytes are counted. No speeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ROOT, resharding_loads, resharding_ranks
from tests.distributed import programs
from tests.support.ranks import LIMIT_S, run_ranks

pytestmark = pytest.mark.skipif(not programs.TRAINS_FSDP2, reason="this torch cannot train FSDP2 on a CPU")


def run(function: Any, settings: dict[str, Any]) -> list[Any]:
    return run_ranks(2, function, settings)


def test_loads_of_two_ranks(tmp_path: Path) -> None:
    """Four processes that import torch's parallelism: some 5 s."""
    settings = {"folder": str(tmp_path), "size": "tiny", "steps": 1, "rounds": 1, "kind": "TP", "absent": "not asked"}
    run(resharding_ranks.save, settings)
    answers = run(resharding_ranks.load, settings)
    rows = {row["by"]: row for row in resharding_loads.rows_of("TP × 2", answers, 0.84)}
    assert list(rows) == ["fastckpt", "dcp", "torch_checkpointing", "floor"]
    ours, floor = rows["fastckpt"], rows["floor"]
    assert rows["torch_checkpointing"]["seconds"] == "not asked"
    assert floor["read, MB"] == floor["needed, stored, MB"] == ours["needed, stored, MB"]
    assert ours["needed, raw, MB"] == floor["needed, raw, MB"] == rows["dcp"]["needed, raw, MB"]
    assert float(ours["needed, stored, MB"]) < float(ours["needed, raw, MB"])
    # The indexes of a state of 1.8 MB are a twentieth of it.
    assert 1.0 <= float(ours["read, MB"]) / float(ours["needed, stored, MB"]) < 1.2


@pytest.mark.slow
def test_the_benchmark_itself(tmp_path: Path) -> None:
    """Its own processes, and the votes of 16 ranks: some 15 s."""
    command = [sys.executable, "benchmarks/resharding.py", "--quick", "--folder", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "| TP × 2 | fastckpt |" in done.stdout
