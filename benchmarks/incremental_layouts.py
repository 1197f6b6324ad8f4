"""Deltas across another layout (FSDP2 on four ranks, then on three) and a rewind: the first save after it, against one without it."""

from __future__ import annotations

import shutil
from typing import Any

from benchmarks.incremental_lab import Lab
from benchmarks.storage_rows import Row, row

GROUP = "layouts"
BAR = 1.15
BEGIN = {"ranks": 4, "do": ["restore", "save 10", "save 20"]}
CASES: dict[str, dict[str, Any]] = {
    "FSDP2 × 4 → × 4": {"ranks": 4, "do": ["restore", "save 30", "save 40"]},
    "FSDP2 × 4 → × 3": {"ranks": 3, "do": ["restore", "save 30", "save 40"]},
    "rewind on FSDP2 × 4": {"ranks": 4, "do": ["restore", "restore 10", "save 15", "save 25"]},
}
"""What another job does with what `BEGIN` has left."""


def count(lab: Lab) -> int:
    return 2 * (1 + len(CASES))


def measure(lab: Lab) -> list[Row]:
    """Each case with deltas and without; all from the same beginning."""
    found: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for deltas in (True, False):
        begun = lab.empty("layouts-begun")
        given = {"size": "tiny" if lab.quick else "21m", "steps": 1, "deltas": deltas}
        words = "with deltas" if deltas else "in full"
        start = lab.worker("incremental_ranks", {**given, **BEGIN, "folder": str(begun)})
        lab.keep(f"{GROUP}: begin", words, start)
        found["none", deltas] = start.get("saves", [])
        for name, case in CASES.items():
            folder = lab.work / "layouts"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(begun, folder)
            one = lab.worker("incremental_ranks", {**given, **case, "folder": str(folder)})
            lab.keep(f"{GROUP}: {name}", words, one)
            found[name, deltas] = one.get("saves", [])
            shutil.rmtree(folder)
        shutil.rmtree(begun)
    return [line for name in CASES for line in rows_of(name, found)]


def rows_of(name: str, found: dict[tuple[str, bool], list[dict[str, Any]]]) -> list[Row]:
    """Of one case: the first save after it against the second save of the beginning, which had its base in memory."""
    usual, after, full = found["none", True][1:], found[name, True], found[name, False]
    if not usual or not after or not full:
        return [row(GROUP, name, "", [], note="a job has failed")]
    whole = found["none", False][1]["bytes"] / 1e6
    return [
        row(
            GROUP,
            f"{name}: bytes of the first save after it",
            f"≤ {BAR} × a delta save before it",
            [after[0]["bytes"] / 1e6],
            unit="MB",
            bar=BAR * usual[0]["bytes"] / 1e6,
            against={"before": usual[0]["bytes"] / 1e6, "the next": after[1]["bytes"] / 1e6, "in full": whole},
        ),
        row(
            GROUP,
            f"{name}: stall of the first save after it",
            f"≤ {BAR} × without deltas",
            [after[0]["stall"]],
            bar=BAR * full[0]["stall"],
            against={"without": full[0]["stall"]},
            note="rank 0: the call and the fence, seconds on the wall",
        ),
    ]
