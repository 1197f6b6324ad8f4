"""Table and plot of a result of long_run.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import plots, tables
from benchmarks.machine_text import machine_words

Result = dict[str, Any]
Sample = dict[str, Any]

LEVEL = 1.2
"""Requests and bytes at the end may be this much of those at the first sample that is far enough from the beginning."""
COLOURS = {
    "save": "C0",
    "retention": "C1",
    "open": "C2",
    "restore": "C3",
    "ls": "C4",
    "prune": "C5",
}


def seconds(result: Result, cost: dict[str, Any]) -> float:
    """CPU, and what the requests are charged, one after another."""
    return float(cost["cpu_s"] + cost["requests"] * result["settings"]["latency_s"])


def steady(result: Result, run: dict[str, Any]) -> list[Sample]:
    """Samples from when on as much goes as comes: a retired checkpoint's bytes go after one grace, its tombstone after another."""
    after = 2 * result["settings"]["grace_s"] / run["seconds_a_save"]
    return [sample for sample in run["samples"] if sample["saves"] > after]


def uneven(result: Result) -> list[str]:
    """Requests and bytes that are not level where they have to be."""
    found = []
    for name, run in result["runs"].items():
        samples = steady(result, run)
        for verb in COLOURS if len(samples) > 1 else ():
            for what in ("requests", "n_bytes"):
                first, last = (samples[at]["costs"][verb][what] for at in (0, -1))
                if last > LEVEL * first:
                    found.append(f"{name}: {what} of {verb} grow from {first} to {last}")
    return found


def markdown(result: Result, image: str) -> str:
    settings = result["settings"]
    lines = [
        "# What a run's age costs",
        "",
        f"{machine_words(result)}; fastckpt {result['versions']['fastckpt']}.",
        "",
        f"A `Checkpointer` saves a state of 64 KiB {settings['saves']:,} times, each save with the retention behind it (`Keep(last=3)`, "
        f"a grace of {settings['grace_s'] / 3600:.0f} h). At some saves somebody who comes fresh opens the repository to read, restores, "
        "lists (`ls`), and prunes a copy of it.",
        "",
        f"Seconds are real CPU of all threads and **a virtual {1e3 * settings['latency_s']:.0f} ms for each request, one after another, "
        "which nobody has waited for**; a LIST is a request for each "
        f"{settings['keys_a_page']:,} keys. The store's clock is moved by hand, its objects lie in another process, and the pipe to it is "
        f"in the CPU. Bytes: bodies, both ways; an entry of a LIST counts {settings['bytes_an_entry']} and its key. Of saves and retention "
        f"the median of {settings['window']} saves, of the others of three tries. Memory: VmRSS of the process that saves and reads.",
        "",
        f"![plot]({image})",
    ]
    for name, run in result["runs"].items():
        lines += ["", f"## {name[0].upper()}{name[1:]}", "", *table(result, run)]
    bad = uneven(result)
    lines += ["", *([f"* **not level**: {words}" for words in bad] or [verdict(result)]), *slopes(result)]
    return "\n".join(lines) + "\n"


def verdict(result: Result) -> str:
    return (
        f"Where tombstones come to their end, everything is level: requests and bytes at the last sample are at most {LEVEL} × those at "
        "the first one after twice the grace."
    )


def slopes(result: Result) -> list[str]:
    """What grows where nothing has come to its end yet, for each retired checkpoint that is within its grace."""
    found = []
    for name, run in result["runs"].items():
        if steady(result, run) or len(run["samples"]) < 2:
            continue
        first, last = run["samples"][0], run["samples"][-1]
        more = last["tombstones_and_commits"] - first["tombstones_and_commits"]
        words = []
        for verb in COLOURS:
            then, now = first["costs"][verb], last["costs"][verb]
            requests, n_bytes = (now[what] - then[what] for what in ("requests", "n_bytes"))
            if now["n_bytes"] > LEVEL * then["n_bytes"] or now["requests"] > LEVEL * then["requests"]:
                cpu_us = 1e6 * (now["cpu_s"] - then["cpu_s"]) / more
                words.append(
                    f"{verb} {requests / more:.3f} requests, {n_bytes / more:.0f} bytes, {cpu_us:.0f} µs of CPU"
                )
        memory = (last["memory_bytes"] - first["memory_bytes"]) / more
        found += [
            "",
            f"{name[0].upper()}{name[1:]}, nothing has come to its end. For each retired checkpoint within its grace: {'; '.join(words)}; "
            f"{memory / 1e3:.1f} kB of memory.",
        ]
    return found


def table(result: Result, run: dict[str, Any]) -> list[str]:
    samples = run["samples"]
    lines = tables.head(["requests · kB · s", *(f"{sample['saves']:,}" for sample in samples)])
    for verb in COLOURS:
        costs = [sample["costs"][verb] for sample in samples]
        cells = [f"{c['requests']} · {c['n_bytes'] / 1e3:.1f} · {seconds(result, c):.2f}" for c in costs]
        lines.append(tables.row([verb, *cells]))
    lines.append(tables.row(["memory, MB", *(f"{s['memory_bytes'] / 1e6:.0f}" for s in samples)]))
    lines.append(tables.row(["commits and tombstones there", *(str(s["tombstones_and_commits"]) for s in samples)]))
    lines.append(tables.row(["objects there", *(str(s["objects"]) for s in samples)]))
    return lines


def plot(result: Result, path: Path) -> None:
    latency_ms = 1e3 * result["settings"]["latency_s"]
    title = (
        f"What a run's age costs: {result['settings']['saves']:,} saves (solid: one every 10 minutes; dashed: one every 3 s, "
        "so that all that was retired is within its grace)"
    )
    with plots.panels(path, title, 8, sharex=True) as axes:
        drawn: list[tuple[Any, str, Callable[[dict[str, Any]], float]]] = [
            (axes[0][0], "requests", lambda cost: cost["requests"]),
            (axes[0][1], "bytes of bodies, kB", lambda cost: cost["n_bytes"] / 1e3),
            (
                axes[1][0],
                f"seconds: real CPU, and a virtual {latency_ms:.0f} ms a request",
                lambda cost: seconds(result, cost),
            ),
        ]
        for run, style in zip(result["runs"].values(), ("-", "--"), strict=True):
            x = [sample["saves"] for sample in run["samples"]]
            for axis, _, value in drawn:
                for verb, colour in COLOURS.items():
                    y = [value(sample["costs"][verb]) for sample in run["samples"]]
                    axis.plot(x, y, style, marker=".", color=colour, label=verb if style == "-" else None)
            memory = [sample["memory_bytes"] / 1e6 for sample in run["samples"]]
            axes[1][1].plot(x, memory, style, marker=".", color="C7")
        for axis, text, _ in drawn:
            axis.set_title(text, **plots.TITLE)
            axis.set_yscale("log")
        axes[1][1].set_title("memory of the process (VmRSS), MB", **plots.TITLE)
        axes[1][1].margins(y=0.2)
        axes[1][1].set_ylim(bottom=0)
        for axis in axes.flat:
            axis.set_xscale("log")
        for axis in axes[1]:
            axis.set_xlabel("saves so far")
        axes[0][0].legend(fontsize=8)
