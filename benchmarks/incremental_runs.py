"""Long runs: what restores of any of their checkpoints take against a full one's, and how large the store becomes."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.incremental_lab import Lab
from benchmarks.storage_rows import Row, row
from benchmarks.workloads import changing

GROUP = "runs"
READ_BAR, CPU_BAR, STORE_BAR, MEMORY_BAR = 1.6, 1.5, 4.5, 256 << 20
FORMS = {
    "fine-tuning": "copy",
    "pretraining-1e-3": "fp32",
    "pretraining-3e-4": "copy",
    "lora": "copy",
    "frozen": "fp32",
    "sparse": "fp32",
}
CHECKS = 20
"""Checkpoints of a run that are restored, as far as it has so many."""
SETTLED = 10
"""From this save on the store counts: all that the first saves held has been retired then."""


def count(lab: Lab) -> int:
    return len(lab.tasks)


def measure(lab: Lab) -> list[Row]:
    """Run all tasks, as many at once as the lab allows; make the rows."""
    tasks = [task for task in FORMS if task in lab.tasks]  # the longest begins
    with ThreadPoolExecutor(lab.jobs) as pool:
        found = list(pool.map(lambda task: one(lab, task), tasks))
    rows: list[Row] = []
    for task, answer in zip(tasks, found, strict=True):
        lab.keep(f"{GROUP}: {task}", "fastckpt", answer)
        rows += rows_of(task, answer)
    return rows


def one(lab: Lab, task: str) -> dict[str, Any]:
    form = FORMS[task]
    states = str(changing.cached(task, changing.PRECISIONS[form], lab.cache, lab.quick))
    work = lab.empty(f"run-{task}")
    asked = {"task": task, "form": form, "states": states, "cache": str(lab.cache), "quick": lab.quick}
    asked |= {"saves": lab.saves, "check": max(1, lab.saves // CHECKS), "work": str(work)}
    asked |= {"run_s": lab.run_s, "threads": 1 if lab.jobs > 1 else 2}
    found = lab.worker("incremental_run", asked)
    shutil.rmtree(work, ignore_errors=True)
    return found


def rows_of(task: str, found: dict[str, Any]) -> list[Row]:
    if "error" in found:
        return [row(GROUP, task, "", [], note=found["error"])]
    name, checks = f"{task}, {found['form']}", found["checks"]
    full = min(check["full"]["stored"] for check in checks)
    settled = found["saves"][min(SETTLED, len(found["saves"]) - 1) :]
    worst = [save["living_bytes"] / full for save in settled]
    most = max(save["store_bytes"] for save in settled) / full
    added = [save["bytes"] for save in found["saves"][1:]]
    return [
        ratio_row(f"{name}: a restore's stored bytes read", READ_BAR, checks, "read", "MB"),
        ratio_row(f"{name}: a restore's CPU", CPU_BAR, checks, "cpu_s", "s"),
        memory_row(name, checks),
        row(
            GROUP,
            f"{name}: store, keep=3",
            f"≤ {STORE_BAR} × one full checkpoint, past the grace; of the largest",
            [max(worst)],
            unit="×",
            bar=STORE_BAR,
            against={"one full checkpoint, MB": full / 1e6, "last": worst[-1]},
            note=f"{len(found['saves'])} saves; right after a pass, with the checkpoint that it has just retired, {most:.2f} ×; "
            f"one adds {sum(added) / len(added) / 1e6:.1f} MB on average, "
            "and a grace of n saves holds n times as much",
        ),
    ]


def ratio_row(what: str, bar: float, checks: list[dict[str, Any]], key: str, unit: str) -> Row:
    """Of the worst checkpoint."""
    ratios = [check["ours"][key] / check["full"][key] for check in checks]
    worst = max(range(len(checks)), key=ratios.__getitem__)
    scale = 1e6 if unit == "MB" else 1.0
    ours, full = checks[worst]["ours"][key] / scale, checks[worst]["full"][key] / scale
    return row(
        GROUP,
        what,
        f"≤ {bar} × a full one; of the worst of {len(checks)}",
        [max(ratios)],
        unit="×",
        bar=bar,
        against={f"it, {unit}": ours, f"full, {unit}": full, "median": sorted(ratios)[len(ratios) // 2]},
        note=f"save {checks[worst]['save']}",
    )


def memory_row(name: str, checks: list[dict[str, Any]]) -> Row:
    more = [(check["ours"]["memory"] - check["full"]["memory"]) / 1e6 for check in checks]
    return row(
        GROUP,
        f"{name}: a restore's extra memory above a full one's",
        "≤ 256 MiB more; of the worst",
        [max(more)],
        unit="MB",
        bar=MEMORY_BAR / 1e6,
        against={"full, MB": max(check["full"]["memory"] for check in checks) / 1e6},
    )
