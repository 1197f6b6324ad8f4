"""A cheap import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fastckpt

PACKAGE = Path(fastckpt.__file__).parent
HEAVY = {"boto3", "botocore", "matplotlib", "numba", "obstore", "sympy", "torch.distributed.tensor"}


def test_heavy_dependencies_are_imported_only_when_used() -> None:
    program = "import sys, torch; before = {*sys.modules}; import fastckpt; print(*sorted({*sys.modules} - before))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, check=True, text=True
    )
    assert not HEAVY & {*done.stdout.split()}


def test_a_big_endian_machine_is_refused_before_anything_heavy_is_imported() -> None:
    program = "import sys; sys.byteorder = 'big'\ntry: import fastckpt\nexcept ImportError as e: print('torch' in sys.modules, e)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, check=True, text=True
    )
    assert done.stdout == "False fastckpt runs on little-endian machines only, and this one is big-endian\n"


def test_nothing_is_built_on_a_big_endian_machine(tmp_path: Path) -> None:
    setup = PACKAGE.parent / "setup.py"
    if not setup.exists():
        pytest.skip("an installed package has no setup.py")
    program = f"import runpy, sys; sys.byteorder = 'big'; sys.argv = ['setup.py', '--version']; runpy.run_path({str(setup)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=False, text=True)
    assert done.returncode == 1
    assert "little-endian machines only" in done.stderr
