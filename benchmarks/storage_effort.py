"""Rows, and the worker, of the effort controller: saves to a null server of a given rate, with the controller and with each fixed effort.

A fixed effort is forced from outside, for the benchmark alone: a user has the controller, or no compression at all.

    python -m benchmarks.storage_effort ABOUT '{"place": …, "state": PATH, "effort": "FAST"}' OUT
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any

from benchmarks.processes import answer
from benchmarks.storage_lab import Lab, null
from benchmarks.storage_rows import Row, against_best, missing

RATES = (0.2e9, 1e9, 4e9)  # bits a second
FIXED = ("NONE", "FAST", "NORMAL", "HIGH")
CONTROLLER = "controller"
SHARE = 0.95
"""Of the best fixed choice's speed."""
WHERE, SEAT = "fastckpt.writing.effort", "fastckpt.writing.uplink"


def count(lab: Lab) -> int:
    return 0 if why_not() else sum(_rounds(lab, rate) for rate in RATES) * (len(FIXED) + 1)


def why_not() -> str:
    found = all(importlib.util.find_spec(name) for name in (WHERE, SEAT))
    return "" if found else "this version has no effort controller: effort NORMAL always"


def _rounds(lab: Lab, rate: float) -> int:
    """A save at the slowest rate takes a quarter of a minute, and hardly varies."""
    return 1 if rate < 1e9 else lab.rounds


def measure(lab: Lab) -> list[Row]:
    asked = f"≥ {SHARE:.0%} of the best fixed effort"
    if why_not():
        return [missing("effort", "effort controller", asked, why_not())]
    found = []
    for rate in RATES:
        into = f"effort, {rate / 1e9:g} Gbit/s"
        for number in range(_rounds(lab, rate)):
            names = (CONTROLLER, *FIXED)
            names = names[number % len(names) :] + names[: number % len(names)]
            for name in names:
                with null(bytes_per_s=rate / 8) as (at, _):
                    place = {"root": f"s3://{at.bucket}/run", "size": lab.size, "endpoint": at.url}
                    given = {"place": place, "state": str(lab.state()), "effort": name}
                    lab.keep(into, name, lab.process("benchmarks.storage_effort", f"effort {name}", given, at=at))
        own, rivals = lab.of(into, CONTROLLER), {name: lab.of(into, name) for name in FIXED}
        words = f"effort controller, save at {rate / 1e9:g} Gbit/s"
        found.append(against_best("effort", words, asked, own, rivals, 1 / SHARE))
    return found


def force(effort: str) -> None:
    """Let all saves of this process encode with this effort."""
    from fastckpt.codec import Effort
    from fastckpt.writing.uplink import Uplink

    if not hasattr(Uplink, "effort"):
        raise RuntimeError(f"{SEAT}.Uplink has no effort: the benchmark does not know how to fix it")
    Uplink.effort = property(lambda _: Effort[effort])  # type: ignore[assignment]


def main(_: str, text: str, out: str) -> None:
    import torch

    from benchmarks import measure as clocks
    from benchmarks.storage_contenders import make
    from benchmarks.storage_contenders.base import Place

    before = os.getloadavg()[0]
    given: dict[str, Any] = json.loads(text)
    if given["effort"] != CONTROLLER:
        force(given["effort"])
    contender = make("Checkpointer")
    contender.prepare(Place(**given["place"]), torch.load(given["state"]))
    contender.save()  # what the controller learns, it learns here, and memory is made
    span = clocks.Span()
    contender.save()
    result = {"seconds": span.seconds(), "cpu": span.cpu()}
    contender.close()
    answer(result, before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
