"""The table of one result of benchmarks/storage.py."""

from __future__ import annotations

from typing import Any

from benchmarks import tables
from benchmarks.machine_text import load_words, machine_words

Result = dict[str, Any]
WORDS = {True: "yes", False: "**no**", None: ""}

NOTES = (
    "s3, local: what a contender makes before it restores (clients, managers; the Checkpointer) is not counted, but named for the "
    "Checkpointer, whose restore verifies each byte, and fills a model and an optimizer that live. Rivals at S3 give new tensors, "
    "unverified; no `load_state_dict` is counted for them. In each round the server is fresh; obstore moves what the Checkpointer "
    "has stored in it, from memory.",
    "local: all files are in the page cache (warm) or dropped from it (cold: posix_fadvise; the host of a virtual disk may hold "
    "them). Each byte of a new state is read once before the clock stops, since a mapped file has not been read until then.",
    "cpu: processor seconds of all threads of the client, of the second of two saves; the null server is a process of its own. Encode "
    "alone: the codec's calls for the same chunks.",
    "links: network namespaces with HTB and a delay of packets; bytes are those of bodies that the server has counted.",
    "lock: another process looks some ten thousand times a second whether the interpreter's lock is held (benchmarks/storage_lock.py).",
    "sharded: definitions are those of benchmarks/resharding_loads.py.",
)


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def cells(row: dict[str, Any]) -> list[str]:
    value = number(row["measured"])
    low, high = number(row["smallest"]), number(row["largest"])
    spread = f" ({low}–{high})" if low != high else ""
    measured = f"{value}{spread} {row['unit']}" if value else row["note"] or "not measured"
    others = ", ".join(f"{name} {number(other)}" for name, other in row["against"].items())
    bar = f"{number(row['bar'])} {row['unit']}" if row["bar"] is not None else ""
    floor = f"{number(row['floor'])} {row['unit']}" if row["floor"] is not None else ""
    note = row["note"] if value else ""
    found = [row["group"], row["what"], row["asked"], measured, others, bar, floor, WORDS[row["met"]], note]
    return [text.replace("|", "/").replace("\n", " ") for text in found]


def markdown(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = result["settings"]
    busy = max(settings["load_averages"], default=0.0) > 2 * result["machine"]["cores"]
    start = settings["load_average"]["start"][0]
    lines = [
        f"# Storage, {result['date'][:10]}",
        "",
        f"{machine_words(result)}; kernels {result['machine']['kernels']}. {versions}.",
        f"Workload gpt-{settings['size']}, {settings['state_bytes'] / 1e6:.0f} MB, {settings['rounds']} rounds, "
        f"{settings['seconds']:.0f} s in all. {load_words(start, settings['load_averages'] or [start], busy)}",
        "",
        "Medians (smallest–largest). Contenders take turns; each measurement is made in a process of its own, after a rehearsal with a "
        "few bytes. *Bar*: the largest value that is asked for, made from the other figures of the same run. *Floor*: what the same work "
        "cannot do without. MB = 10^6 bytes.",
        "",
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
