"""A cheap import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fastckpt

PACKAGE = Path(fastckpt.__file__).parent
HEAVY = {"boto3", "botocore", "matplotlib", "numba", "obstore", "sympy", "torch.distributed.tensor"}


def test_heavy_dependencies_are_imported_only_when_used() -> None:
    program = "import sys, torch; before = {*sys.modules}; import fastckpt; print(*sorted({*sys.modules} - before))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, check=True, text=True
    )
    assert not HEAVY & {*done.stdout.split()}
