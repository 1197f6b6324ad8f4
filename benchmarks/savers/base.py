"""What every contender of stall.py must answer: how a training loop saves with it, in the way its documents say."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from benchmarks.workloads.gpt import Training

EVERY = 10  # steps from save to save


class Saver:
    """Saves a training run every EVERY steps, in the background. The loop around it measures; a saver only reports when a save was durable.

    open → (before_update, after_step) × steps → drain. All but `open` and `drain` count as time that the training loop is blocked.
    """

    name = ""
    note = ""  # one line for the table
    settings: dict[str, object] = {}  # what differs from the library's defaults, and the defaults that matter

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.durable: dict[int, dict[str, float]] = {}
        """Step → seconds from the call to durable, and when that was (time.perf_counter)."""

    def version(self) -> str:
        return ""

    def open(self, training: Training, directory: Path) -> None:
        """Before the first step; `directory` is empty. May register hooks with the optimizer."""

    def before_update(self) -> None:
        """The optimizer is about to change parameters and moments: block as long as the contender's contract asks for it."""

    def after_step(self, number: int) -> None:
        """A training step has ended; saves if the number is a multiple of EVERY."""

    def drain(self) -> None:
        """Block until all that was begun is durable."""

    def counters(self) -> dict[str, float]:
        """What the contender itself says at the end: goes into the JSON, to be compared with what was measured."""
        return {}

    def note_durable(self, step: int, called: float) -> None:
        """Any thread. called: time.perf_counter() before the call."""
        now = time.perf_counter()
        with self._lock:
            self.durable[step] = {"seconds": now - called, "at": now}


class NoSaves(Saver):
    settings = {"save": "never: what training takes by itself"}
