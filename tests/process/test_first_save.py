"""The end of a process while memory for its first save is made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_end_of_a_process_does_not_wait_for_it(tmp_path: Path) -> None:
    """Ten slabs of a second each are wanted; the process ends after the one that is being made."""
    code = """
import time, torch, fastckpt
from fastckpt.snapshot.pool import SlabPool
from fastckpt.snapshot.slab_maker import SlabMaker
take = SlabPool.take
SlabPool.take = lambda *arguments: (time.sleep(1), take(*arguments), print("made", flush=True))[1]
maker = SlabMaker(SlabPool(1 << 30), [4096] * 60, False)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("made") <= 2
