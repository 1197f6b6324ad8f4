"""What run.py and stall.py have in common: who takes part and in which order, the trained state, the worker, the machine's own limits."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks import CACHE, ROOT
from benchmarks.processes import in_process
from benchmarks.workloads import gpt


def names_of(text: str, known: Collection[str]) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def rotated(names: list[str], number: int) -> list[str]:
    """The order of a round: each starts with another one."""
    first = number % max(len(names), 1)
    return names[first:] + names[:first]


def ensure_state(size: str) -> Path:
    path = CACHE / f"gpt-{size}-seed{gpt.SEED}-steps{gpt.SIZES[size].steps}.pt"
    if not path.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.workloads.gpt", size, str(path)], cwd=ROOT, check=True)
    return path


def worker(mode: str, name: str, state: Path, directory: Path, check: bool = False) -> dict[str, Any]:
    arguments = [mode, name, str(state), str(directory), "check" if check else "-"]
    return in_process("benchmarks.worker", arguments, directory.parent / "result.json")


def probe(state: Path, work: Path) -> dict[str, Any]:
    directory = work / "probe"
    directory.mkdir(parents=True, exist_ok=True)
    result = worker("probe", "-", state, directory)
    shutil.rmtree(directory, ignore_errors=True)
    return result
