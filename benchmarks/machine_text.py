"""What the reports say of the machine: what it is, who else used it, and its own limits for the same bytes (probes.py)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.tables import cell

PROBES = [
    ("memcpy, one thread", "memcpy_one_thread"),
    ("memcpy, all threads", "memcpy_all_threads"),
    ("memcpy into new memory", "memcpy_into_new_memory"),
    ("disk write, no fsync", "write"),
    ("disk write and fsync", "write_fsync"),
    ("file read, from page cache", "read_warm"),
    ("file read, cold", "read_cold"),
    ("new memory, all threads", "new_memory_all_threads"),
    ("fastckpt's chunks, read from page cache, verified, decoded, all threads", "decode_all_threads"),
    ("one look at every byte", "touch"),
    ("floor of a verified warm load: the three before together", "load_floor"),
]


def machine_words(result: dict[str, Any]) -> str:
    m = result["machine"]
    return (
        f"{result['date']}. {m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 1e9:.0f} GB; Linux {m['kernel']}, "
        f"{m['filesystem']}; Python {m['python']}, torch {m['torch']}"
    )


def loads(samples: Iterable[dict[str, Any]], settings: dict[str, Any]) -> list[float]:
    """Load averages during the run; those of before and after stand in the settings."""
    return [s["load_average"] for s in samples if "load_average" in s] or [settings["load_average"]["end"][0]]


def load_words(before: float, during: list[float], busy: bool) -> str:
    """busy: more than the benchmark itself can have caused."""
    return (
        f"Load average {before:.1f} before, during the run {statistics.median(during):.1f} in the median and "
        f"{max(during):.1f} at most{'; **others used the machine: provisional**' if busy else ''}."
    )


def probe_lines(probes: list[dict[str, Any]]) -> list[str]:
    good = [p for p in probes if "error" not in p]
    if not good:
        return []
    megabytes = good[0]["bytes"] / 1e6
    lines = ["", f"The machine, with the same {megabytes:.0f} MB, best of three in each round:", ""]
    lines += ["| | s | GB/s |", "|---|---|---|"]
    for text, key in PROBES:
        seconds = [p[key] for p in good if key in p]  # results of before know fewer
        if not seconds:
            continue
        lines.append(f"| {text} | {cell(seconds, 3)} | {megabytes / 1e3 / statistics.median(seconds):.2f} |")
    return lines
