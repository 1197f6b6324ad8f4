"""Rows of the effort controller: saves to a null server of a given rate, with the controller and with each fixed effort, in turns."""

from __future__ import annotations

import dataclasses

import fastckpt
from benchmarks.storage_contenders import OURS
from benchmarks.storage_lab import Lab, null
from benchmarks.storage_rows import Row, against_best, missing

RATES = (0.2e9, 1e9, 4e9)  # bits a second
CONTROLLER, FIXED = "auto", ("none", "fast", "normal", "high")
HALF = "21m"
SHARE = 0.95
"""Of the best fixed choice's speed."""


def count(lab: Lab) -> int:
    return 0 if why_not() else sum(_rounds(lab, rate) for rate in RATES) * (len(FIXED) + 1)


def why_not() -> str:
    known = any(field.name == "effort" for field in dataclasses.fields(fastckpt.Options))
    return "" if known else "this version has no effort controller: effort normal always"


def _is_slow(rate: float) -> bool:
    """At the slowest rate a save of the whole state takes a quarter of a minute, and hardly varies: one round with half of it will do."""
    return rate < 1e9


def _rounds(lab: Lab, rate: float) -> int:
    return 1 if _is_slow(rate) else lab.rounds


def measure(lab: Lab) -> list[Row]:
    asked = f"≥ {SHARE:.0%} of the best fixed effort"
    if why_not():
        return [missing("effort", "effort controller", asked, why_not())]
    found = []
    for rate in RATES:
        size = HALF if _is_slow(rate) and not lab.quick else lab.size
        into = f"effort, {rate / 1e9:g} Gbit/s"
        for number in range(_rounds(lab, rate)):
            names = (CONTROLLER, *FIXED)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                with null(bytes_per_s=rate / 8) as (at, _):
                    # What the controller learns, it learns in the first of two saves; memory is made there, too.
                    sample = lab.worker(
                        OURS[0],
                        "save",
                        f"s3://{at.bucket}/run",
                        at=at,
                        size=size,
                        variables={"FASTCKPT_EFFORT": name},
                        repeats=2,
                    )
                lab.keep(into, name, sample, described=False)
        own, rivals = lab.of(into, CONTROLLER), {name: lab.of(into, name) for name in FIXED}
        words = f"effort controller, save at {rate / 1e9:g} Gbit/s"
        found.append(against_best("effort", words, asked, own, rivals, 1 / SHARE))
    return found
