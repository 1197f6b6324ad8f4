"""fastckpt.Checkpointer on a local directory, as users have it: every= and nothing else."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import fastckpt
from benchmarks.savers.base import EVERY, Saver
from benchmarks.workloads.gpt import Training


class Fastckpt(Saver):
    settings = {
        "save": f"Checkpointer(directory, state, every=Every(steps={EVERY})), all else its default: compressed, keep the "
        "last 3, snapshots verified once (the warm-up save)",
        "contract": "its own hook before the optimizer's step waits for what is left of the copy",
    }
    compress = True
    deltas = True

    def __init__(self, budget_bytes: int = 0) -> None:
        super().__init__()
        self.options = dataclasses.replace(fastckpt.Options.from_env(), compress=self.compress, deltas=self.deltas)
        if budget_bytes:
            self.options = dataclasses.replace(self.options, host_budget_bytes=budget_bytes)

    def version(self) -> str:
        return str(fastckpt.__version__)

    def open(self, training: Training, directory: Path) -> None:
        state = {
            "model": training.model,
            "optimizer": training.optimizer,
            "scheduler": training.scheduler,
            "progress": training.progress,
            "rng": fastckpt.RNGState(),
        }
        self._subscription = fastckpt.events.subscribe(self._see)
        self._subscription.__enter__()
        every = fastckpt.Every(steps=EVERY)
        self.checkpointer = fastckpt.Checkpointer(directory, state, every=every, options=self.options)

    def after_step(self, number: int) -> None:
        self.checkpointer.step(number)

    def drain(self) -> None:
        self.checkpointer.wait()

    def _see(self, event: fastckpt.events.Event) -> None:
        if isinstance(event, fastckpt.events.CheckpointDurable):
            self.note_durable(event.step, time.perf_counter() - event.seconds)

    def counters(self) -> dict[str, float]:
        stats = self.checkpointer.stats
        return {"stall_s": stats.stall_s, "saves": stats.saves, "deferred": stats.deferred}


class FastckptRaw(Fastckpt):
    settings = {**Fastckpt.settings, "options": "Options(compress=False)"}
    compress = False


class FastckptFull(Fastckpt):
    settings = {**Fastckpt.settings, "options": "Options(deltas=False)"}
    deltas = False
