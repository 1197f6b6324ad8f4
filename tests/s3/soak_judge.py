"""What a soak must never show, found in the journals of its processes. Pure.

An event is a dict with "t" (seconds of the machine's monotonic clock), "what", and facts:

    restored  writer, t0, parent, exact: a training process begins as `writer` (a number used once) with what it found; parent = [writer,
              step] or None for an empty repository; t0: when the restore began; exact: every bit is that of the parent's step
    begun     writer, step: a save is about to begin
    acked     writer, step: its `durable` has resolved
    read      t0, found, exact, newest: a reader got this state; newest: it asked for the newest
    none      t0: a reader was told that there is no checkpoint
    health    rss, fds, threads, pid: of a process that lives through the whole soak, between two pieces of work
    crashed   error: something other than a typed error
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

Event = Mapping[str, Any]
Place = tuple[int, int]
MOST_GROWTH_BYTES = 24 << 20
"""Of a process over the soak, medians of its first and last third: allocators do not give everything back at once."""
MOST_NEW_FILES = 4
"""Connections that are kept open for the next request."""


def problems_of(events: Iterable[Event]) -> list[str]:
    """Everything that is wrong, in words; of lost steps the first three."""
    in_order = sorted(events, key=lambda event: event["t"])
    parents: dict[int, Place | None] = {}
    begun: set[Place] = set()
    for event in in_order:
        if event["what"] == "restored":
            parents[event["writer"]] = _place(event["parent"])
        elif event["what"] == "begun":
            begun.add((event["writer"], event["step"]))
    problems = [f"a process crashed: {event['error']}" for event in in_order if event["what"] == "crashed"] + _inexact(
        in_order, begun
    )
    lost = _lost(in_order, parents)
    return problems + lost[:3] + ([f"… and {len(lost) - 3} more lost steps"] if len(lost) > 3 else [])


def _place(found: Any) -> Place | None:
    return None if found is None else (int(found[0]), int(found[1]))


def _found(event: Event) -> Place | None:
    return _place(event["parent"] if event["what"] == "restored" else event.get("found"))


def _inexact(in_order: list[Event], begun: set[Place]) -> list[str]:
    """States that are not, bit for bit, one that somebody saved."""
    problems = []
    for event in in_order:
        if event["what"] in ("restored", "read"):
            found = _found(event)
            if not event["exact"]:
                problems.append(f"a mixture or wrong bits were read: {dict(event)}")
            elif found is not None and found not in begun:
                problems.append(f"a state was read that nobody saved: {dict(event)}")
    return problems


def _lost(in_order: list[Event], parents: Mapping[int, Place | None]) -> list[str]:
    """Acknowledged steps that whoever began to read later neither found nor has behind what it found."""
    acked = [(event["t"], event["writer"], event["step"]) for event in in_order if event["what"] == "acked"]
    asked = [
        event
        for event in in_order
        if event["what"] in ("restored", "none") or (event["what"] == "read" and event["newest"])
    ]
    problems, newest, at = [], dict[int, int](), 0
    for event in sorted(asked, key=lambda event: event["t0"]):
        while at < len(acked) and acked[at][0] < event["t0"]:
            _, writer, step = acked[at]
            newest[writer] = max(step, newest.get(writer, 0))
            at += 1
        behind = chain(_found(event), parents)
        problems += [
            f"step {step} of writer {writer} was acknowledged and is not in what was found: {dict(event)}"
            for writer, step in newest.items()
            if behind.get(writer, 0) < step
        ]
    return problems


def chain(found: Place | None, parents: Mapping[int, Place | None]) -> dict[int, int]:
    """Writer → last step of it that a state continues from, itself among them."""
    behind: dict[int, int] = {}
    while found is not None:
        writer, step = found
        behind[writer] = step
        found = parents.get(writer)
    return behind


def leaks_of(events: Iterable[Event]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Problems, and figures of each process that reported its health: medians of its first third (after a tenth) and of its last."""
    problems, figures = [], {}
    by_process: dict[str, list[Event]] = {}
    for event in events:
        if event["what"] == "health":
            by_process.setdefault(event["who"], []).append(event)
    for who, all_of_it in sorted(by_process.items()):
        found = sorted(all_of_it, key=lambda event: event["t"])[len(all_of_it) // 10 :]
        third = max(1, len(found) // 3)
        first, last = found[:third], found[-third:]
        mine: dict[str, float] = {"samples": len(found)}
        for name, most in (("rss", MOST_GROWTH_BYTES), ("fds", MOST_NEW_FILES), ("threads", 0)):
            before, after = (statistics.median_low(event[name] for event in part) for part in (first, last))
            mine |= {f"{name} first": before, f"{name} last": after}
            if after - before > most:
                problems.append(f"{who} leaks {name}: {before} in its first third, {after} in its last")
        hours = (last[-1]["t"] - first[0]["t"]) / 3600
        mine["rss bytes per hour"] = round(_slope([(event["t"], event["rss"]) for event in found])) if hours > 0 else 0
        figures[who] = mine
    return problems, figures


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the regression line, per hour."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    return statistics.linear_regression([x for x, _ in points], [y for _, y in points]).slope * 3600
