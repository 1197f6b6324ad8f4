"""Table and plot of one result file: ``python benchmarks/report.py FILE.json`` writes FILE.md and FILE.png."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def complete(entry: dict[str, Any]) -> list[Sample]:
    modes = ("save", "warm", "cold")
    return [s for s in entry["samples"] if all(m in s and "error" not in s[m] for m in modes)]


def cell(values: list[float | None], decimals: int) -> str:
    """Median, and below it the range if it shows at this precision."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    middle, low, high = (f"{v:.{decimals}f}" for v in (statistics.median(known), min(known), max(known)))
    return middle if low == high else f"{middle} ({low}–{high})"


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
    loads = sorted(part["load_average"] for part in samples if "load_average" in part) or [s["load_average"]["end"][0]]
    begin, middle, most = s["load_average"]["start"][0], statistics.median(loads), loads[-1]
    return [
        f"{result['date']}. {m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 1e9:.0f} GB; Linux {m['kernel']}, "
        f"{m['filesystem']}; Python {m['python']}, torch {m['torch']}. Workload {s['workload']} after {s['steps']} "
        f"real training steps, seed {s['seed']}; {s['rounds']} rounds. "
        f"Load average {begin:.1f} before, during the run {middle:.1f} in the median and {most:.1f} at most"
        f"{'; **others used the machine: provisional**' if middle > m['cores'] or most > 2 * m['cores'] else ''}.",
        "",
        f"Medians (smallest–largest). Order: {s['order']}. Memory: {s['memory']}; pages of mapped "
        f"files count. Load: {s['load']}. "
        f"Cold: {s['cold']}. Stall: the caller is blocked; 'again' is a second save in the same process. "
        "MB = 10^6 bytes.",
    ]


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


def residency(result: dict[str, Any]) -> str:
    cold = [s["cold"]["resident_before"] for e in result["contenders"].values() for s in complete(e)]
    cold += [p["resident_before_cold"] for p in result["probes"] if "resident_before_cold" in p]
    return f"Share of a file still in the page cache before a cold load, at most: {max(cold):.1%}." if cold else ""


def markdown(result: dict[str, Any], image: str) -> str:
    head = ["contender", "version", *(name for name, _, _ in COLUMNS), "after the load"]
    lines = ["# Save and load", "", *machine_lines(result), "", f"![plot]({image})", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, entry in result["contenders"].items():
        samples = complete(entry) if "error" not in entry else []
        if samples:
            cells = [cell([pick(s) for s in samples], decimals) for _, pick, decimals in COLUMNS]
            note = remarks(entry)
        else:
            errors = [p["error"] for s in entry["samples"] for p in s.values() if "error" in p]
            cells = [""] * len(COLUMNS)
            note = entry.get("error") or entry.get("unavailable") or (errors or ["no sample"])[0]
            note += f" ({entry['note']})" if entry.get("note") else ""
        lines.append(f"| {' | '.join([name, entry.get('version', ''), *cells, note.replace('|', '/')])} |")
    lines += ["", residency(result), *probe_lines(result["probes"]), "", "## Settings", ""]
    for name, entry in result["contenders"].items():
        for key, value in entry.get("settings", {}).items():
            lines.append(f"* {name}, {key}: `{value}`")
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {name: complete(entry) for name, entry in result["contenders"].items() if complete(entry)}
    names = list(rows)
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 1.8 + 0.75 * max(len(names), 1)), sharey=True)
    for axis, (title, bars) in zip(axes.flat, PANELS, strict=True):
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
                text = f"{m:.0f}" if "MB" in title else f"{m:.2f}"
                axis.annotate(text, (m + high, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
        axis.set_title(title, fontsize=10, loc="left")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
        if len(bars) > 1:
            axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.1)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    s = result["settings"]
    cores = result["machine"]["cores"]
    figure.suptitle(f"{s['workload']}, {cores} cores, {s['rounds']} rounds: medians, smallest to largest")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(path: Path) -> Path:
    """Writes the table and the plot beside the JSON; returns the table's path."""
    result = json.loads(path.read_text())
    image, text = path.with_suffix(".png"), path.with_suffix(".md")
    plot(result, image)
    text.write_text(markdown(result, image.name))
    return text


if __name__ == "__main__":
    print(write(Path(sys.argv[1])).read_text())
