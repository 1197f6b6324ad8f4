"""A frozen backbone on the test device: what a second save copies to the host.

python -m benchmarks.incremental_device ABOUT '{"folder": …, "width": …}' OUT
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any

import torch
from torch import nn

import fastckpt
from benchmarks.incremental_lab import Lab
from benchmarks.processes import answer
from benchmarks.storage_rows import Row, row
from fastckpt import events

GROUP = "device"
BAR = 1.05
LAYERS, TRAINED = 12, 2


def count(lab: Lab) -> int:
    return 1


def measure(lab: Lab) -> list[Row]:
    """The line of the table."""
    asked = {"folder": str(lab.empty("device")), "width": 256 if lab.quick else 1024}
    found = lab.worker("incremental_device", asked)
    lab.keep(f"{GROUP}: frozen backbone", "fastckpt", found)
    what = "frozen backbone on the test device: copied to the host by a second save"
    if "error" in found:
        return [row(GROUP, what, "", [], note=found["error"])]
    return [
        row(
            GROUP,
            what,
            f"≤ {BAR} × the bytes that changed",
            [found["copied"] / 1e6],
            unit="MB",
            bar=BAR * found["changed"] / 1e6,
            against={"first save": found["first"] / 1e6, "changed": found["changed"] / 1e6},
            note="of stretches that the snapshot copies; fingerprints, 16 bytes of each chunk, are not among them",
        )
    ]


class Copied:
    """Adds up what snapshots copy from the device."""

    def __init__(self) -> None:
        self.n_bytes = 0

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.PieceStaged) and event.device != "cpu":
            self.n_bytes += event.raw_bytes

    def take(self) -> int:
        found, self.n_bytes = self.n_bytes, 0
        return found


def second_save(given: dict[str, Any]) -> dict[str, Any]:
    """Train the last layers of a model on the device; save before and after a step."""
    device = import_module("tests.fakegpu.device")
    device.load()
    device.configure("lazy", races=False, poison=False, trap=False)
    torch.manual_seed(0)
    width = given["width"]
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS))).to("fakegpu")
    trained = list(model[-TRAINED:].parameters())
    for parameter in model[:-TRAINED].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    copied, x = Copied(), torch.randn(8, width).to("fakegpu")

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    state = {"model": model, "optimizer": optimizer}
    step()
    with events.subscribe(copied), fastckpt.Checkpointer(given["folder"], state, every=None, spot=None) as checkpointer:
        checkpointer.restore()
        counts = []
        for number in (1, 2):
            checkpointer.save_now(number).wait()
            checkpointer.fence()
            counts.append(copied.take())
            step()
    moments = [t for one in optimizer.state.values() for t in one.values() if t.device.type != "cpu"]
    changed = sum(t.nbytes for t in (*trained, *moments))
    return {"first": counts[0], "copied": counts[1], "changed": changed}


def main(about: str, text: str, out: str) -> None:
    """about: for messages; text: what is asked, as JSON."""
    before = os.getloadavg()[0]
    answer(second_save(json.loads(text)), before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
