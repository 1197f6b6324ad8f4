"""The table of one result of benchmarks/incremental.py, and the plot of its long runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import output, plots, tables
from benchmarks.machine_text import load_words, machine_words
from benchmarks.storage_report import cells

Result = dict[str, Any]
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")

NOTES = (
    "Forms: fp32 is float32 weights with AdamW's moments; copy adds a bfloat16 copy of all weights; bf16 is bfloat16 weights and moments; "
    "weights is the copy alone. Of LoRA and the frozen backbone, most weights have no moments.",
    "pairs: of a save so many steps after a whole one, in a process that has saved before. moonclip's deltas are against its last full "
    "snapshot, which is the first state, so both have the same base. Processor seconds are those of all threads of the process, from "
    "the call until the save is durable and retention has ended; of several rounds the least, of both.",
    "*floor*: bytes that an ideal coder of single bytes needs for each tensor, alone or as a difference, whichever is less.",
)


def markdown(result: Result, image: str = "") -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = result["settings"]
    busy = max(settings["load_averages"], default=0.0) > 2 * result["machine"]["cores"]
    start = settings["load_average"]["start"][0]
    missed = [row for row in result["rows"] if row["met"] is False]
    judged = [row for row in result["rows"] if row["met"] is not None]
    lines = [
        f"# Incremental checkpoints, {result['date'][:10]}",
        "",
        f"{machine_words(result)}. {versions}.",
        f"Seed {settings['seed']}, {settings['rounds']} rounds, {settings['saves']} saves in each long run, "
        f"{settings['seconds']:.0f} s in all. "
        f"{load_words(start, settings['load_averages'] or [start], busy)}",
        f"{len(judged) - len(missed)} of {len(judged)} bars are met.",
        "",
        *([f"![bytes of each save]({image})", ""] if image and long_runs(result) else []),
        *tables.head(["row", "what", "asked", "measured", "others", "bar", "floor", "met", "note"]),
        *(tables.row(cells(row)) for row in result["rows"]),
        "",
        *(f"* {note}" for note in NOTES),
        "",
        *by_kind(result),
        "## Settings",
        "",
        *tables.settings_lines(result["contenders"]),
        "",
    ]
    return "\n".join(lines)


def by_kind(result: Result) -> list[str]:
    """What to expect of each kind of training: bytes of a save as a share of a whole one."""
    gaps = result["settings"].get("gaps", [])
    rows = []
    for what, contenders in result["samples"].items():
        group, _, task = what.partition(": ")
        found = [one["forms"] for one in contenders.get("fastckpt", []) if "forms" in one]
        for form in found[0] if group == "pairs" and found else []:
            own = [one[form] for one in found]
            full = min(first["bytes"] for one in own for first in one["first"])
            shares = [min(one["gaps"][str(gap)]["bytes"] for one in own) / full for gap in gaps]
            sizes = [f"{own[0]['raw_bytes'] / 1e6:.0f} MB", f"{full / 1e6:.1f} MB"]
            rows.append(tables.row([task, form, *sizes, *(f"{100 * share:.3g} %" for share in shares)]))
    if not rows:
        return []
    head = tables.head(["training", "form", "raw", "whole checkpoint", *(f"{gap} steps later" for gap in gaps)])
    return ["## By kind of training: bytes of a save, of a whole checkpoint", "", *head, *rows, ""]


def write(path: Path) -> list[Path]:
    return output.write_beside(path, markdown, plot)


def plot(result: Result, path: Path) -> None:
    """Bytes of each save of the long runs, as shares of a whole checkpoint; the store; and what restores read and take."""
    runs = long_runs(result)
    title = (
        f"{result['settings']['saves']} saves in a row, one after each step of training: shares of one whole checkpoint"
    )
    with plots.panels(path, title, 8) as axes:
        for (task, run), colour in zip(runs.items(), COLOURS, strict=False):
            full = min(check["full"]["stored"] for check in run["checks"])
            label = f"{task}, {run['form']}"
            numbers = range(1, len(run["saves"]) + 1)
            axes[0, 0].plot(
                numbers, [s["bytes"] / full for s in run["saves"]], color=colour, label=label, linewidth=0.9
            )
            axes[0, 1].plot(numbers, [s["store_bytes"] / full for s in run["saves"]], color=colour, linewidth=0.9)
            for axis, key in ((axes[1, 0], "read"), (axes[1, 1], "cpu_s")):
                ratios = [check["ours"][key] / check["full"][key] for check in run["checks"]]
                axis.plot([check["save"] for check in run["checks"]], ratios, color=colour, marker=".", linewidth=0.9)
        for axis, bar in ((axes[0, 1], 4.5), (axes[1, 0], 1.6), (axes[1, 1], 1.5)):
            axis.axhline(bar, color="black", linewidth=0.8, linestyle=":")
        names = ("bytes that a save adds", "the store, keep=3, past the grace", "a restore's bytes", "a restore's CPU")
        for axis, name in zip(axes.flat, names, strict=True):
            axis.set_title(name, **plots.TITLE)
            axis.set_ylim(bottom=0)
        if runs:
            axes[0, 0].legend(fontsize=7, frameon=False)


def long_runs(result: Result) -> dict[str, Any]:
    """Of each task, as far as it was measured."""
    found = {}
    for what, contenders in result["samples"].items():
        group, _, task = what.partition(": ")
        for one in contenders.get("fastckpt", []) if group == "runs" else []:
            if "saves" in one:
                found[task] = one
    return found
