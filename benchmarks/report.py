"""Table and plot of one result file: ``python benchmarks/report.py FILE.json`` writes FILE.md and FILE.png."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import output, plots, tables
from benchmarks.machine_text import load_words, loads, machine_words, probe_lines

Sample = dict[str, Any]
Pick = Callable[[Sample], float | None]

COLUMNS: list[tuple[str, Pick, int]] = [  # heading, value, decimals
    ("stall s", lambda s: s["save"]["stall"], 3),
    ("stall again s", lambda s: s["save"].get("again", {}).get("stall"), 3),
    ("durable s", lambda s: s["save"]["durable"], 2),
    ("MB", lambda s: s["save"]["bytes"] / 1e6, 1),
    ("load warm s", lambda s: s["warm"]["seconds"], 2),
    ("load cold s", lambda s: s["cold"]["seconds"], 2),
    ("save +MB RAM", lambda s: s["save"]["memory"] / 1e6, 0),
    ("load +MB RAM", lambda s: s["warm"]["memory"] / 1e6, 0),
    ("save CPU s", lambda s: s["save"]["cpu"], 2),
]


def complete(entry: dict[str, Any]) -> list[Sample]:
    modes = ("save", "warm", "cold")
    return [s for s in entry["samples"] if all(m in s and "error" not in s[m] for m in modes)]


def remarks(entry: dict[str, Any]) -> str:
    """What the comparison found, then the contender's own note."""
    checked = [s["warm"]["differences"] for s in complete(entry) if "differences" in s["warm"]]
    same = "identical tensors" if entry["tensors_only"] else "identical"
    words = ["; ".join(checked[0]) or same if checked else "not compared"]
    isolated = [s["isolation"] for s in complete(entry) if "isolation" in s]
    for result in isolated:
        late = result.get("error") or "; ".join(d for d in result["differences"] if d.startswith("WRONG"))
        words += [f"changed during the save: {late}"] if late else []
    return "; ".join([*words, entry["note"]] if entry["note"] else words)


def machine_lines(result: dict[str, Any]) -> list[str]:
    m, s = result["machine"], result["settings"]
    samples = [part for e in result["contenders"].values() for sample in e["samples"] for part in sample.values()]
    during = loads(samples, s)
    busy = statistics.median(during) > m["cores"] or max(during) > 2 * m["cores"]
    return [
        f"{machine_words(result)}. Workload {s['workload']} after {s['steps']} "
        f"real training steps, seed {s['seed']}; {s['rounds']} rounds. "
        f"{load_words(s['load_average']['start'][0], during, busy)}",
        "",
        f"Medians (smallest–largest). Order: {s['order']}. Memory: {s['memory']}; pages of mapped "
        f"files count. Load: {s['load']}. "
        f"Cold: {s['cold']}. Stall: the caller is blocked; 'again' is a second save in the same process. "
        "MB = 10^6 bytes.",
    ]


def residency(result: dict[str, Any]) -> str:
    cold = [s["cold"]["resident_before"] for e in result["contenders"].values() for s in complete(e)]
    cold += [p["resident_before_cold"] for p in result["probes"] if "resident_before_cold" in p]
    return f"Share of a file still in the page cache before a cold load, at most: {max(cold):.1%}." if cold else ""


def markdown(result: dict[str, Any], image: str) -> str:
    head = ["contender", "version", *(name for name, _, _ in COLUMNS), "after the load"]
    lines = ["# Save and load", "", *machine_lines(result), "", f"![plot]({image})", ""]
    lines += tables.head(head)
    for name, entry in result["contenders"].items():
        samples = complete(entry) if "error" not in entry else []
        if samples:
            cells = [tables.cell([pick(s) for s in samples], decimals) for _, pick, decimals in COLUMNS]
            note = remarks(entry)
        else:
            errors = [p["error"] for s in entry["samples"] for p in s.values() if "error" in p]
            cells = [""] * len(COLUMNS)
            note = entry.get("error") or entry.get("unavailable") or (errors or ["no sample"])[0]
            note += f" ({entry['note']})" if entry.get("note") else ""
        lines.append(tables.row([name, entry.get("version", ""), *cells, note.replace("|", "/")]))
    lines += ["", residency(result), *probe_lines(result["probes"]), "", "## Settings", ""]
    lines += tables.settings_lines(result["contenders"])
    return "\n".join(lines) + "\n"


PANELS: list[tuple[str, list[tuple[str, str, Pick]]]] = [
    (
        "save, seconds",
        [
            ("stall", "#d98c5f", lambda s: s["save"]["stall"]),
            ("durable", "#4c78a8", lambda s: s["save"]["durable"]),
        ],
    ),
    (
        "load with every byte read, seconds",
        [
            ("warm", "#d98c5f", lambda s: s["warm"]["seconds"]),
            ("cold", "#4c78a8", lambda s: s["cold"]["seconds"]),
        ],
    ),
    ("file, MB", [("size", "#4c78a8", lambda s: s["save"]["bytes"] / 1e6)]),
    (
        "peak extra memory, MB",
        [
            ("save", "#d98c5f", lambda s: s["save"]["memory"] / 1e6),
            ("load", "#4c78a8", lambda s: s["warm"]["memory"] / 1e6),
        ],
    ),
]


def plot(result: dict[str, Any], path: Path) -> None:
    rows = {name: complete(entry) for name, entry in result["contenders"].items() if complete(entry)}
    names = list(rows)
    s = result["settings"]
    title = f"{s['workload']}, {result['machine']['cores']} cores, {s['rounds']} rounds: medians, smallest to largest"
    with plots.panels(path, title, 1.8 + 0.75 * max(len(names), 1), sharey=True) as axes:
        for axis, (heading, bars) in zip(axes.flat, PANELS, strict=True):
            height = 0.8 / len(bars)
            for k, (label, colour, pick) in enumerate(bars):
                places = [i + (k - (len(bars) - 1) / 2) * height for i in range(len(names))]
                values = [[v for v in map(pick, rows[name]) if v is not None] for name in names]
                middle = [statistics.median(v) for v in values]
                below = [m - min(v) for m, v in zip(middle, values, strict=True)]
                above = [max(v) - m for m, v in zip(middle, values, strict=True)]
                whiskers = {"xerr": [below, above], "capsize": 2, "ecolor": "#444444"}
                axis.barh(places, middle, height, color=colour, label=label, **whiskers)
                for place, m, high in zip(places, middle, above, strict=True):
                    text = f"{m:.0f}" if "MB" in heading else f"{m:.2f}"
                    axis.annotate(text, (m + high, place), **plots.VALUE)
            axis.set_title(heading, **plots.TITLE)
            axis.margins(x=0.12)
            if len(bars) > 1:
                axis.legend(
                    fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.1
                )
        axes[0, 0].set_yticks(range(len(names)), names)
        axes[0, 0].invert_yaxis()


def write(path: Path) -> list[Path]:
    return output.write_beside(path, markdown, plot)


if __name__ == "__main__":
    print(write(Path(sys.argv[1]))[0].read_text())
