"""What deltas add to what saving costs a training loop: the loops and the memory of bench-stall, with and without deltas in turns."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import runner
from benchmarks.incremental_lab import Lab
from benchmarks.stall import Bench
from benchmarks.storage_rows import Row, row

GROUP = "stall"
BAR = 1.1
WITH, WITHOUT, NONE = "fastckpt", "fastckpt-full", "none"
STEPS = 30
SHARES = (0.0, 2.0, 1.0, 0.25)
"""Of the state, as a budget; 0: the default."""


def count(lab: Lab) -> int:
    return 3 * lab.rounds + 2 * len(SHARES)


def measure(lab: Lab) -> list[Row]:
    """Loops of all rounds, then memory."""
    bench = Bench("4m" if lab.quick else lab.stall_size, 20 if lab.quick else STEPS, lab.empty("stall"))
    state_bytes = bench.describe(WITH)["state_bytes"]
    loops: dict[str, list[dict[str, Any]]] = {WITH: [], WITHOUT: [], NONE: []}
    for number in range(lab.rounds):
        for name in runner.rotated(list(loops), number):
            found = bench.loop(name)
            lab.keep(f"{GROUP}: loop", name, found)
            loops[name] += [found] if "error" not in found else []
    rows = loop_rows(loops) if all(loops.values()) else []
    for share in SHARES:
        budget = int(share * state_bytes)
        peaks = {}
        for name in (WITH, WITHOUT):
            found = bench.memory(name, budget)
            lab.keep(f"{GROUP}: memory, budget {share:g} × the state", name, found)
            if "error" not in found:
                peaks[name] = found["peak"] / 1e6
        rows.append(memory_row(share, state_bytes, peaks))
    return rows


def blocked(sample: dict[str, Any]) -> float:
    """Seconds of a save for which training was kept."""
    return statistics.mean(save["call"] + save["fence"] for save in sample["saves"])


def loop_rows(loops: dict[str, list[dict[str, Any]]]) -> list[Row]:
    figures: dict[str, Any] = {
        "stall of a save": lambda sample: 1e3 * blocked(sample),
        "step": lambda sample: 1e3 * sample["total"] / len(sample["steps"]),
        "CPU of a step": lambda sample: 1e3 * sample["cpu"] / len(sample["steps"]),
        "durable after": lambda sample: 1e3 * statistics.mean(save["durable"] for save in sample["saves"]),
    }
    rows = []
    for what, figure in figures.items():
        judged = what in ("stall of a save", "step")
        without = min(map(figure, loops[WITHOUT]))
        against = {"without deltas": without}
        if what in ("step", "CPU of a step"):
            against["no saves"] = min(map(figure, loops[NONE]))
        rows.append(
            row(
                GROUP,
                what,
                f"≤ {BAR} × without deltas; the least of all rounds" if judged else "",
                [min(map(figure, loops[WITH]))],
                unit="ms",
                bar=BAR * without if judged else None,
                against=against,
            )
        )
    return rows


def memory_row(share: float, state_bytes: int, peaks: dict[str, float]) -> Row:
    words = f"budget {share:g} × the state" if share else "the default budget"
    return row(
        GROUP,
        f"peak memory, {words}",
        f"≤ {BAR} × without deltas",
        [peaks[WITH]] if WITH in peaks else [],
        unit="MB",
        bar=BAR * peaks[WITHOUT] if WITHOUT in peaks else None,
        # A save that finds differences has two states in memory: the new one, and the one that it differs from.
        floor=None if share or WITHOUT not in peaks else peaks[WITHOUT] + state_bytes / 1e6,
        against={"without deltas": peaks.get(WITHOUT, float("nan")), "state": state_bytes / 1e6},
    )
