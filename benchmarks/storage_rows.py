"""The rows of benchmarks/storage.py: what was asked, what was measured, and the floor where there is one. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Samples = Sequence[Mapping[str, Any]]
"""Answers of workers, of one thing in several rounds; those with "error" are no figures."""


def figures(samples: Samples, key: str = "seconds") -> list[float]:
    return [float(one[key]) for one in samples if "error" not in one and key in one]


def middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def in_seconds(samples: Samples, key: str = "seconds") -> str:
    """The median, to be read."""
    value = middle(figures(samples, key))
    return "not measured" if value is None else f"{value:.3f} s"


def errors(samples: Samples) -> str:
    """The first error, in words."""
    return next((str(one["error"]) for one in samples if "error" in one), "not measured")


def row(
    group: str,
    what: str,
    asked: str,
    measured: Sequence[float],
    *,
    unit: str = "s",
    bar: float | None = None,
    against: Mapping[str, float] | None = None,
    floor: float | None = None,
    floor_factor: float | None = None,
    note: str = "",
) -> Row:
    """One line of the table.

    Args:
        group: of `--only`.
        what: is measured.
        asked: the bar, in words.
        measured: of each round.
        unit: of `measured`, `bar` and `floor`.
        bar: the largest value that is asked for; None: none is.
        against: name → value that the bar was made from.
        floor: what the same work cannot do without, from the same run.
        floor_factor: floor × this is good enough, too.
        note: what else the reader must know.
    """
    value = middle(measured)
    limits = [limit for limit in (bar, floor * floor_factor if floor and floor_factor else None) if limit is not None]
    met = None if value is None or not limits else value <= max(limits)
    if bar is None and met is False:
        met = None  # the floor alone decides nothing: a rival's figure might have been the larger limit
    return {
        "group": group,
        "what": what,
        "asked": asked,
        "unit": unit,
        "measured": value,
        "smallest": min(measured, default=None),
        "largest": max(measured, default=None),
        "bar": bar,
        "ratio": value / bar if value is not None and bar else None,
        "against": dict(against or {}),
        "floor": floor,
        "met": met,
        "note": note,
    }


def missing(group: str, what: str, asked: str, why: str) -> Row:
    """A line for what could not be measured, and why."""
    return row(group, what, asked, [], note=why)


def against_best(
    group: str,
    what: str,
    asked: str,
    own: Samples,
    rivals: Mapping[str, Samples],
    factor: float,
    *,
    key: str = "seconds",
    **more: Any,
) -> Row:
    """A line whose bar is the best rival's median × factor. Rivals without a figure are named in the note."""
    found = {name: value for name, samples in rivals.items() if (value := middle(figures(samples, key))) is not None}
    absent = [f"{name}: {errors(samples)}" for name, samples in rivals.items() if name not in found]
    if not figures(own, key):
        return missing(group, what, asked, errors(own))
    bar = min(found.values()) * factor if found else None
    note = "; ".join([*([more.pop("note")] if more.get("note") else []), *absent])
    return row(group, what, asked, figures(own, key), bar=bar, against=found, note=note, **more)
