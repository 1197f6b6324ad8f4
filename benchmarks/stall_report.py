"""Table and plot of one result of stall.py: ``python benchmarks/stall_report.py FILE.json`` writes FILE.md and FILE.png."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import output, plots, tables
from benchmarks.machine_text import load_words, loads, machine_words, probe_lines
from benchmarks.tables import cell

Sample = dict[str, Any]
Result = dict[str, Any]

OURS = "fastckpt"
RIVALS = {
    "moonclip": ("moonclip", "moonclip-lean"),
    "dcp.async_save": ("dcp",),
    "dcp.async_save with async staging": ("dcp-staging",),
}
BLOCKED_BAR, EXTRA_BAR, MEMORY_BAR = 1 / 4, 1 / 2, 64 << 20


# --- what the samples say ---


def good(samples: list[Sample]) -> list[Sample]:
    return [s for s in samples if "error" not in s]


def blocked(sample: Sample) -> list[float]:
    """Of each save."""
    return [s["call"] + s["fence"] for s in sample["saves"]]


def loops(result: Result, name: str) -> list[Sample]:
    entry = result["contenders"].get(name, {})
    return good(entry.get("loop", []))


def all_blocked(result: Result, name: str) -> list[float]:
    return [seconds for sample in loops(result, name) for seconds in blocked(sample)]


def extra(result: Result, name: str) -> list[float]:
    """Of each round: seconds a save adds to the loop, against the same round's loop without saves."""
    without = {sample["round"]: sample["total"] for sample in loops(result, "none")}
    return [
        (sample["total"] - without[sample["round"]]) / len(sample["saves"])
        for sample in loops(result, name)
        if sample["round"] in without and sample["saves"]
    ]


def extra_inside(result: Result, name: str) -> list[float]:
    """The same against the steps of the same process during which nothing was saved; not of rounds with fewer than five of these."""
    return [
        (sample["total"] - len(sample["steps"]) * statistics.median(sample["quiet_steps"])) / len(sample["saves"])
        for sample in loops(result, name)
        if sample["saves"] and len(sample["quiet_steps"]) >= 5
    ]


def extra_cpu(result: Result, name: str) -> list[float]:
    without = {sample["round"]: sample["cpu"] for sample in loops(result, "none")}
    return [
        (sample["cpu"] - without[sample["round"]]) / len(sample["saves"])
        for sample in loops(result, name)
        if sample["round"] in without and sample["saves"]
    ]


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


# --- the bars ---


def best_rival(result: Result, rows: tuple[str, ...], of: Any) -> tuple[str, float] | None:
    found = [(name, statistics.median(values)) for name in rows if (values := of(result, name))]
    return min(found, key=lambda pair: pair[1]) if found else None


def bar_lines(result: Result) -> list[str]:
    lines = ["", *tables.head(["bar", "fastckpt", "against", "ratio", "met"])]
    for what, of, bar in (
        ("seconds blocked by a save", all_blocked, BLOCKED_BAR),
        ("extra time of a save", extra, EXTRA_BAR),
        ("extra time of a save, within a process", extra_inside, EXTRA_BAR),
    ):
        ours = median(of(result, OURS))
        for rival, rows in RIVALS.items():
            best = best_rival(result, rows, of)
            if ours is None or best is None:
                lines.append(f"| {what}: ≤ {bar:g} of {rival} | | | | not measured |")
                continue
            name, theirs = best
            if theirs <= 0:
                verdict, ratio = "undecided: lost in the noise", ""
            else:
                verdict, ratio = "yes" if ours <= bar * theirs else "**no**", f"{ours / theirs:.2f}"
            lines.append(f"| {what}: ≤ {bar:g} of {rival} | {ours:.3f} | {theirs:.3f} ({name}) | {ratio} | {verdict} |")
    for sample in good(result["contenders"].get(OURS, {}).get("memory", [])):
        if sample["budget"]:
            over = sample["peak"] - sample["budget"]
            share = sample["budget"] / result["settings"]["state_bytes"]
            verdict = "yes" if over <= MEMORY_BAR else "**no**"
            limit = f"{(sample['budget'] + MEMORY_BAR) / 1e6:.0f} MB"
            what = f"peak memory at a budget of {share:.2g} × state: ≤ budget + 64 MiB"
            lines.append(f"| {what} | {sample['peak'] / 1e6:.0f} MB | {limit} | | {verdict} |")
    return lines


# --- the text ---


def intro(result: Result) -> list[str]:
    m, s = result["machine"], result["settings"]
    samples = [x for entry in result["contenders"].values() for x in [*entry["loop"], *entry["memory"]]]
    before, during = s["load_average"]["start"][0], loads(samples, s)
    # The load that a sample begins with is that of the sample before: two threads of training, and what saves.
    busy = max(during) > 2 * m["cores"] or before > 0.5
    steps = [step["wall"] for sample in loops(result, "none") for step in sample["steps"]]
    batch, context = s["batch"]
    return [
        f"{machine_words(result)}, {s['threads']} threads. {load_words(before, during, busy)}",
        "",
        f"Workload {s['workload']}, AdamW, seed {s['seed']}, {s['state_bytes'] / 1e6:.0f} MB of state after {s['trained_steps']} real "
        f"steps; batches of {batch} × {context} tokens: a step without saves takes {cell(steps, 2)} s. "
        f"{s['steps']} steps a loop, a save at every {s['every']}th, seven steps after the last save; before that four steps and a save "
        f"that do not count (the column 'first save'). {s['rounds']} rounds; in each, every contender's loop in a process of its own, "
        "round-robin, one more place rotated in each round.",
        "",
        "Medians (smallest–largest). Blocked: what the training thread spends in the call, and between the first and the last hook "
        "before the optimizer's step, where each contender waits for what its contract asks for; of each save, until the next "
        "one. Extra time: the loop's seconds less those of the same round's loop without saves, for one save; what was still under way "
        "when the loop ended is not in it. Within a process: less as many times the median of the steps of the same process that "
        f"begin and end while nothing is saved, {s['quiet_after_s']:g} s after durable or later. Extra CPU: of all threads of the process, "
        "waiting threads of OpenMP included. Memory: VmHWM (reset through clear_refs) above VmRSS before the first save, over "
        f"{s['memory_saves']} saves in a process that does not train (activations are not what a save costs) but changes every value "
        "between them, each durable before the next; buffers that stay from save to save are counted. MB = 10^6 bytes.",
    ]


def row(result: Result, name: str) -> list[str]:
    entry, samples = result["contenders"][name], loops(result, name)
    if not samples:
        errors = [x["error"] for x in [entry, *entry["loop"]] if "error" in x]
        return [name, entry.get("version", ""), *[""] * (len(HEAD) - 3), (errors or ["no sample"])[0].replace("|", "/")]
    saved = [s for sample in samples for s in sample["saves"]]
    peaks = [s["peak"] / 1e6 for s in good(entry["memory"]) if not s["budget"]]
    return [
        name,
        entry["version"],
        cell([sample["total"] for sample in samples], 1),
        cell(all_blocked(result, name), 3),
        cell([s["call"] for s in saved], 3),
        cell([s["fence"] for s in saved], 3),
        cell(extra(result, name), 2),
        cell(extra_inside(result, name), 2),
        cell(extra_cpu(result, name), 2),
        cell([s["durable"] for s in saved], 2),
        cell([sample["first_save"]["blocked"] for sample in samples], 3) if saved else "",
        cell([sample["bytes"] / 1e6 for sample in samples], 0) if saved else "",
        cell(peaks, 0),
        entry["note"],
    ]


HEAD = [
    "contender",
    "version",
    "loop s",
    "blocked s",
    "in the call",
    "before the update",
    "extra s",
    "extra s, within a process",
    "extra CPU s",
    "durable s",
    "first save: blocked s",
    "MB at the end",
    "peak +MB RAM",
    "",
]


def memory_lines(result: Result) -> list[str]:
    lines = ["", "Peak memory with a budget, and what a save costs then (no training beside it):", ""]
    lines += tables.head(["contender", "budget MB", "peak MB", "above the budget, MiB", "blocked s", "durable s"])
    for name, entry in result["contenders"].items():
        for s in good(entry["memory"]):
            waits = [call + fence for call, fence in zip(s["calls"], s["fences"], strict=True)]
            budget, over = (
                ("none", "")
                if not s["budget"]
                else (
                    f"{s['budget'] / 1e6:.0f}",
                    f"{(s['peak'] - s['budget']) / (1 << 20):.0f}",
                )
            )
            peak, times = f"{s['peak'] / 1e6:.0f}", [cell(waits, 2), cell(s["durable"], 2)]
            lines.append(tables.row([name, budget, peak, over, *times]))
    return lines


def markdown(result: Result, image: str) -> str:
    lines = ["# What saving costs a training loop", "", *intro(result), "", f"![plot]({image})", *bar_lines(result), ""]
    lines += ["Against the better one of moonclip's two settings. The loops; all else is for one save:", ""]
    lines += tables.head(HEAD)
    lines += [tables.row(row(result, name)) for name in result["contenders"]]
    lines += memory_lines(result)
    lines += probe_lines(result["probes"])
    lines += ["", "A private copy of the state costs one memcpy at least, on the thread that trains or beside it.", ""]
    lines += ["## Settings", "", *tables.settings_lines(result["contenders"])]
    return "\n".join(lines) + "\n"


# --- the plot ---

COLOURS = {
    "none": "#888888",
    "fastckpt": "#c44e52",
    "fastckpt-full": "#d07a7d",
    "fastckpt-raw": "#dd9a9c",
    "moonclip": "#4c78a8",
    "moonclip-lean": "#9db8d4",
    "dcp": "#59a14f",
    "dcp-staging": "#a8d19f",
}


def bars(axis: Any, rows: dict[str, list[float]], title: str) -> None:
    names = [name for name in rows if rows[name]]
    for place, name in enumerate(names):
        values = rows[name]
        middle = statistics.median(values)
        axis.barh(place, middle, 0.7, color=COLOURS[name])
        axis.plot([min(values), max(values)], [place, place], color="#444444", linewidth=1)
        axis.annotate(f"{middle:.3f}", (max(middle, *values), place), **plots.VALUE)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set_title(title, **plots.TITLE)


def memory_panel(axis: Any, result: Result) -> None:
    state = result["settings"]["state_bytes"]
    labels: list[str] = []
    for name, entry in result["contenders"].items():
        for s in good(entry["memory"]):
            place = len(labels)
            labels.append(f"{name}, {s['budget'] / state:.2g}× budget" if s["budget"] else name)
            axis.barh(place, s["peak"] / 1e6, 0.7, color=COLOURS[name])
            if s["budget"]:
                axis.plot([s["budget"] / 1e6] * 2, [place - 0.45, place + 0.45], color="black", linewidth=1.5)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_title("peak extra memory, MB (line: the budget)", **plots.TITLE)


def steps_panel(axis: Any, result: Result) -> None:
    """Each step's median over the rounds."""
    for name in result["contenders"]:
        samples = loops(result, name)
        if samples:
            by_step = zip(*([step["wall"] for step in sample["steps"]] for sample in samples), strict=True)
            numbers = [step["step"] for step in samples[0]["steps"]]
            axis.plot(numbers, [statistics.median(w) for w in by_step], color=COLOURS[name], label=name, linewidth=1.2)
    axis.set_ylim(bottom=0)
    axis.set_title("a step with its save, seconds; saves at 20, 30, …", **plots.TITLE)
    axis.legend(fontsize=7, frameon=False, ncols=2)


def plot(result: Result, path: Path) -> None:
    s, names = result["settings"], [name for name in result["contenders"] if name != "none"]
    title = (
        f"{s['workload']}, {s['state_bytes'] / 1e6:.0f} MB, {result['machine']['cores']} cores, {s['rounds']} rounds: medians, "
        "smallest to largest"
    )
    with plots.panels(path, title, 8) as axes:
        bars(
            axes[0, 0],
            {name: all_blocked(result, name) for name in names},
            "training thread blocked by a save, seconds",
        )
        bars(
            axes[0, 1], {name: extra(result, name) for name in names}, "extra time of a save against no saves, seconds"
        )
        steps_panel(axes[1, 0], result)
        memory_panel(axes[1, 1], result)


def write(path: Path) -> list[Path]:
    return output.write_beside(path, markdown, plot)


if __name__ == "__main__":
    print(write(Path(sys.argv[1]))[0].read_text())
