"""Whole checkpoints against moonclip's: bytes and processor seconds of a save 1, 10, 50 and 100 steps after the one that it refers to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.incremental_lab import Lab
from benchmarks.storage_rows import Row, row

GROUP = "pairs"
RIVAL = "moonclip"
BARS = {"pre-training": (0.97, 0.94), "fine-tuning": (0.93, 0.905), "copy": (0.87, 0.85)}
"""Of bytes against the rival: one step apart, and ten or more."""
CPU_BAR, PROMISE_BAR, WEIGHTS_BAR, FEW_BAR, COPY_BAR = 1 / 3, 1.02, 0.70, 1.05, 0.001
FEW = ("lora", "frozen")
"""Tasks of which most stays as it was."""


def count(lab: Lab) -> int:
    return len(lab.tasks) * (len(CONTENDERS) * lab.rounds + 1)


CONTENDERS = ("fastckpt", RIVAL, "torch.save")


def measure(lab: Lab) -> list[Row]:
    """Run all contenders in turns, and the promises of `fastckpt analyze`; make the rows."""
    rows: list[Row] = []
    for task in lab.tasks:
        folders = lab.states(task)
        asked = {"task": task, "forms": list(folders), "gaps": lab.gaps, "states": folders}
        for number in range(lab.rounds):
            for name in rotated(CONTENDERS, number):
                work = lab.empty(f"pairs-{name}")
                found = lab.worker("incremental_worker", {**asked, "contender": name, "work": str(work)}, name == RIVAL)
                lab.keep(f"{GROUP}: {task}", name, found)
                shutil.rmtree(work, ignore_errors=True)
        lab.keep(f"{GROUP}: {task}", "analyze", lab.worker("incremental_promise", asked))
        for form in folders:
            rows += rows_of(task, form, lab.gaps, Samples(lab, task, form))
        if "fp32" in folders and "copy" in folders and task.startswith("pretraining"):
            rows += working_copy_row(task, Samples(lab, task, "fp32"), Samples(lab, task, "copy"))
    return rows


def rotated(names: Sequence[str], number: int) -> Iterator[str]:
    first = number % len(names)
    return iter((*names[first:], *names[:first]))


class Samples:
    """What all contenders have answered about one form of one task's states."""

    def __init__(self, lab: Lab, task: str, form: str) -> None:
        self._answers = lab.samples[f"{GROUP}: {task}"]
        self._form = form

    def forms(self, name: str) -> list[dict[str, Any]]:
        return [one["forms"][self._form] for one in self._answers.get(name, []) if "forms" in one]

    def values(self, name: str, gap: int, key: str) -> list[float]:
        """Of each round."""
        return [float(form["gaps"][str(gap)][key]) for form in self.forms(name)]

    def least(self, name: str, gap: int, key: str) -> float | None:
        return min(self.values(name, gap, key), default=None)

    def full(self, key: str) -> float | None:
        """Of a save without a base."""
        return min((float(first[key]) for form in self.forms("fastckpt") for first in form["first"]), default=None)

    def errors(self) -> str:
        return "; ".join(str(one["error"]) for found in self._answers.values() for one in found if "error" in one)


def kind(task: str, form: str) -> str | None:
    """Which bar on bytes holds."""
    if task not in ("pretraining-1e-3", "pretraining-3e-4", "fine-tuning") or form in ("bf16", "weights"):
        return None
    return "copy" if form == "copy" else "fine-tuning" if task == "fine-tuning" else "pre-training"


def rows_of(task: str, form: str, gaps: Sequence[int], samples: Samples) -> list[Row]:
    """The lines of one form of one task's states."""
    rows = []
    for gap in gaps:
        name, ours = f"{task}, {form}, {gap} apart", samples.values("fastckpt", gap, "bytes")
        if not ours:
            rows.append(row(GROUP, name, "", [], note=samples.errors()))
            continue
        rows.append(against_rival(name, kind(task, form), gap, samples))
        rows.append(cpu_row(name, kind(task, form), gap, samples))
        promise = samples.least("analyze", gap, "promised")
        if promise is not None:
            asked = f"≤ {PROMISE_BAR} × what `fastckpt analyze` promised"
            packs = mb([n - (samples.least("fastckpt", gap, "index") or 0) for n in ours])  # it tells of tensors alone
            rows.append(
                row(GROUP, f"{name}: bytes in packs", asked, packs, unit="MB", bar=PROMISE_BAR * promise / 1e6,
                    against={"analyze": promise / 1e6})
            )  # fmt: skip
        rows += few_row(name, task, gap, samples) + weights_row(name, form, gap, samples)
    return rows


def mb(values: Sequence[float]) -> list[float]:
    return [value / 1e6 for value in values]


def against_rival(name: str, kind_: str | None, gap: int, samples: Samples) -> Row:
    rival, full = samples.least(RIVAL, gap, "bytes"), samples.full("bytes")
    factor = None if kind_ is None else BARS[kind_][0 if gap == 1 else 1]
    raw, whole = samples.forms("fastckpt")[0]["raw_bytes"], samples.least("torch.save", gap, "bytes")
    others = {RIVAL: rival, "in full": full, "torch.save": whole, "raw": raw}
    return row(
        GROUP,
        f"{name}: bytes added",
        "" if factor is None else f"≤ {factor} × {RIVAL}",
        mb(samples.values("fastckpt", gap, "bytes")),
        unit="MB",
        bar=factor * rival / 1e6 if factor and rival else None,
        against={other: value / 1e6 for other, value in others.items() if value is not None},
        floor=samples.least("analyze", gap, "entropy_mb"),
        note=f"{samples.least('fastckpt', gap, 'bytes') / rival:.3f} × {RIVAL}" if rival else "",  # type: ignore[operator]
    )


def cpu_row(name: str, kind_: str | None, gap: int, samples: Samples) -> Row:
    """Processor seconds of the save; of several rounds the least: others on the machine only add to it."""
    rival, ours = samples.least(RIVAL, gap, "cpu_s"), samples.values("fastckpt", gap, "cpu_s")
    others = {RIVAL: rival, "in full": samples.full("cpu_s"), "torch.save": samples.least("torch.save", gap, "cpu_s")}
    return row(
        GROUP,
        f"{name}: CPU",
        f"≤ ⅓ × {RIVAL}" if kind_ else "",
        [min(ours)],
        bar=CPU_BAR * rival if kind_ and rival else None,
        against={other: value for other, value in others.items() if value is not None},
        note=f"{min(ours) / rival:.2f} × {RIVAL}; rounds {', '.join(f'{one:.3f}' for one in ours)}" if rival else "",
    )


def few_row(name: str, task: str, gap: int, samples: Samples) -> list[Row]:
    """Where most stays as it was: what changed, and the index."""
    changed = samples.least("analyze", gap, "changed")
    if task not in FEW or changed is None:
        return []
    index = samples.least("fastckpt", gap, "index") or 0
    return [
        row(
            GROUP,
            f"{name}: second checkpoint",
            f"≤ {FEW_BAR} × (bytes that changed + index as stored)",
            mb(samples.values("fastckpt", gap, "bytes")),
            unit="MB",
            bar=FEW_BAR * (changed + index) / 1e6,
            against={"changed": changed / 1e6, "index": index / 1e6},
        )
    ]


def working_copy_row(task: str, alone: Samples, both: Samples) -> list[Row]:
    """What bfloat16 copies of float32 masters add to a whole save, of their own size. Of states without zero rows: these are stored
    differently from time to time."""
    with_copy, without = both.full("bytes"), alone.full("bytes")
    if with_copy is None or without is None:
        return []
    size = both.forms("fastckpt")[0]["raw_bytes"] - alone.forms("fastckpt")[0]["raw_bytes"]
    indexes = (both.full("index") or 0) - (alone.full("index") or 0)
    return [
        row(
            GROUP,
            f"{task}: bfloat16 copies of masters, in packs",
            f"≤ {100 * COPY_BAR:.1f} % of their size",
            [100 * max(0.0, with_copy - without - indexes) / size],
            unit="%",
            bar=100 * COPY_BAR,
            against={"their size, MB": size / 1e6, "more index, MB": indexes / 1e6},
        )
    ]


def weights_row(name: str, form: str, gap: int, samples: Samples) -> list[Row]:
    """bfloat16 weights alone against XOR and zstd -1."""
    xor = samples.least("analyze", gap, "xor_zstd") if form == "weights" and gap == 50 else None
    if xor is None:
        return []
    return [
        row(
            GROUP,
            f"{name}: weights in bf16",
            f"≤ {WEIGHTS_BAR} × XOR and zstd -1",
            mb(samples.values("fastckpt", gap, "bytes")),
            unit="MB",
            bar=WEIGHTS_BAR * xor / 1e6,
            against={"XOR and zstd -1": xor / 1e6},
        )
    ]
