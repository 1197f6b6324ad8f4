"""Saves to targets: which of two was last, and a gate before a save's last step."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch

import fastckpt

linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def step_in(f: Any) -> int:
    return int(fastckpt.load(f)["step"])


def state(step: int) -> dict[str, Any]:
    return {"step": step, "w": torch.full((100,), float(step))}


class Gate:
    """Holds up the first save that reaches a sink's commit until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.first = True

    def wait(self) -> None:
        first, self.first = self.first, False
        if first:
            self.reached.set()
            assert self.open.wait(60)
