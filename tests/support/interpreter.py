"""Scripts that run in a Python of their own to its very end, and what they save."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]

USUAL = """
    import atexit, os, sys, threading, weakref
    def own(n):
        return {"n": torch.tensor(n), "t": torch.arange(n, n + 3_000_000)}  # 24 MB: threads, the direct writer, six packs
"""
CALLS = """
    def calls(prefix="", spot="auto"):
        fastckpt.save(own(1), prefix + "a")
        fastckpt.save_async(own(2), prefix + "b")
        state = own(1)
        ckpt = fastckpt.Checkpointer(prefix + "run", {"s": state}, every=None, spot=spot)
        ckpt.save_now(1)
        state["n"] += 1
        state["t"] += 1
        ckpt.save_now(2)
        assert torch.equal(fastckpt.load(prefix + "a")["t"], own(1)["t"])
"""
"""For `USUAL`: all ways to save, and a load, at paths or URLs with a prefix."""

IMPORT = """
    import torch, fastckpt
"""


def run(folder: Path, *parts: str, code: int = 0, **environment: str) -> str:
    """Run a script, given in parts, to its end, in a folder. What it said on stderr."""
    script = "\n".join(map(textwrap.dedent, parts))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,  # no run comes near it, but one that hangs
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stderr


def is_own(found: dict[str, torch.Tensor], n: int) -> bool:
    return found["n"].item() == n and torch.equal(found["t"], torch.arange(n, n + 3_000_000))
