"""The table of one result of benchmarks/incremental.py, and the plot of its long runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import output, tables
from benchmarks.machine_text import load_words, machine_words
from benchmarks.storage_report import cells

Result = dict[str, Any]
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")

NOTES = (
    "Forms: fp32 is float32 weights with AdamW's moments; copy adds a bfloat16 copy of all weights; bf16 is bfloat16 weights and moments; "
    "weights is the copy alone. Of LoRA and the frozen backbone, most weights have no moments.",
    "pairs: of a save so many steps after another one, in a new repository. moonclip's deltas are against its last full snapshot, "
    "which is the first state, so both have the same base. Processor seconds are those of all threads of the process, from the call "
    "until the save is durable and retention has ended; of several rounds the least, of both.",
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
        *([f"![bytes of each save]({image})", ""] if image and result.get("runs") else []),
        *tables.head(["row", "what", "asked", "measured", "others", "bar", "floor", "met", "note"]),
        *(tables.row(cells(row)) for row in result["rows"]),
        "",
        *(f"* {note}" for note in NOTES),
        "",
        "## Settings",
        "",
        *tables.settings_lines(result["contenders"]),
        "",
    ]
    return "\n".join(lines)


def write(path: Path) -> list[Path]:
    return output.write_beside(path, markdown, plot)


def plot(result: Result, path: Path) -> None:
    """Bytes of each save of the long runs."""
