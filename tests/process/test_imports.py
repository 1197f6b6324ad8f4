"""A cheap import."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("command", ["prune --keep-last 1 --dry-run", "prefetch --to x", "mirror --last 1"])
def test_commands_that_move_bytes_alone_start_without_torch(command: str, tmp_path: Path) -> None:
    """A boot script calls them while other programs wait for the machine: torch alone takes a second."""
    words = [*command.split(), *(["a"] if command.startswith("mirror") else []), "a"]
    program = f"""
import sys
sys.argv = ["/usr/bin/fastckpt", *{words!r}]
from fastckpt.cli import main
main()
print("torch" in sys.modules, "boto3" in sys.modules)
import fastckpt  # what a pickle of a stranger may ask for, with --trust-pickle
print(fastckpt.Checkpointer.__name__, fastckpt.errors.CheckpointError.__name__, hasattr(fastckpt, "nothing"), "torch" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True, text=True, env=environment
    )
    assert done.stdout.splitlines()[-2:] == ["False False", "Checkpointer CheckpointError False True"]


def test_as_a_module_it_is_the_command_line_too(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fastckpt", "ls", "a"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert "No such file" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "fastckpt.repository.catalog" in imported
    assert "torch" not in imported


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
