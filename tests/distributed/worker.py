"""What torchrun starts in these tests: a script with a Checkpointer that says where it is, and may be slowed down.

python worker.py SCRIPT ARGUMENTS…

Variables: PAUSE_S after each step, 0; NEVER_COMES: a rank that makes no Checkpointer; SILENT_S: after which a rank is taken for dead, 4.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from typing import Any

import fastckpt
from fastckpt.ranks import pulse

RANK = os.environ.get("RANK", "0")
pulse.SILENT_S = float(os.environ.get("SILENT_S", "4"))


def say(words: str) -> None:
    print(f"[rank {RANK}] {words}\n", end="", flush=True)


class Told(fastckpt.Checkpointer):
    def __init__(self, *arguments: Any, **settings: Any) -> None:
        if os.environ.get("NEVER_COMES") == RANK:
            say("stays away")
            threading.Event().wait()  # until torchrun ends it
        super().__init__(*arguments, **settings)

    def restore(self, *arguments: Any, **settings: Any) -> int:
        step = super().restore(*arguments, **settings)
        say(f"restored {step}")
        return step

    def step(self, step: int, **settings: Any) -> bool:
        ended = super().step(step, **settings)
        durable = self.stats.durable_step
        say(f"step {step} durable {durable}")
        if ended:
            say(f"left at {step} with {self.exit_code}")
        time.sleep(float(os.environ.get("PAUSE_S", "0")))
        return ended


fastckpt.Checkpointer = Told  # type: ignore[misc]
say(f"pid {os.getpid()}")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
