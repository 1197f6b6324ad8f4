"""The benchmark of incremental checkpoints: its states, its arithmetic, and its rows. No speeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import incremental_pairs, incremental_promise, incremental_report, incremental_runs
from benchmarks import incremental_states as states
from benchmarks.incremental_run import Clocked
from benchmarks.workloads import changing
from fastckpt.store.memory import MemoryStore


def run(precision: str) -> changing.Run:
    return changing.Run(changing.SparseEmbeddings(quick=True), precision)


def test_a_step_changes_some_rows_of_a_sparse_run_and_its_copy_is_its_masters_rounded() -> None:
    one = run("mixed")
    before = {n: t.clone() for n, t in one.masters.items()}
    one.step()
    state = one.state("copy")
    changed = (state["master"]["contexts.weight"] != before["contexts.weight"]).any(1)
    assert 0 < int(changed.sum()) < len(changed)
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, state["master"][name].bfloat16())
    assert set(one.state("fp32")) == {"model", "optimizer"}


def test_a_run_goes_on_from_what_another_has_left() -> None:
    first = run("mixed")
    first.step()
    second = run("mixed")
    second.resume(first.all(), 1)
    assert second.number == 1
    assert states.changed_bytes(second.state("fp32"), first.state("fp32")) == 0
    second.step()
    assert states.changed_bytes(second.state("fp32"), first.state("fp32")) > 0


def test_change_leaves_alone_what_is_the_same() -> None:
    live: dict[str, Any] = {"model": {"a": torch.zeros(4), "b": torch.zeros(4)}, "n": 1}
    version = live["model"]["b"]._version
    states.change(live, {"model": {"a": torch.ones(4), "b": torch.zeros(4)}, "n": 2})
    assert live["model"]["a"].sum() == 4
    assert live["n"] == 2
    assert live["model"]["b"]._version == version


def test_bytes_that_a_save_adds_are_those_of_new_files_and_of_those_that_grew() -> None:
    before = {"a.pack": 5, "marker": 3}
    after = {"a.pack": 5, "b.pack": 7, "marker": 4, "commits/1": 2}
    assert states.added(before, after) == {"bytes": 10, "index": 3}


def test_difference_is_that_of_the_codec() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=1000).astype("<f4").view("<u4"), rng.normal(size=1000).astype("<f4").view("<u4")
    from fastckpt.kernels import reference
    from fastckpt.kernels.transform import Transform

    found = incremental_promise.difference(x, y)
    out = np.empty(4000, np.uint8)
    reference.split(x.view(np.uint8), y.view(np.uint8), Transform.SUB, 4, 0, out)
    planes = found.view(np.uint8).reshape(-1, 4).T[::-1]
    assert sorted(map(bytes, planes)) == sorted(map(bytes, out.reshape(4, 1000)))
    assert incremental_promise.entropy(np.zeros(1000, "<u4")) == 0


def test_a_store_with_a_clock_dates_what_is_written() -> None:
    store = Clocked(MemoryStore())
    store.put("a", b"1")
    store.pass_time(60)
    store.put_if_absent("b", b"2")
    assert store.head("b").modified_s - store.head("a").modified_s == 60
    assert [info.modified_s for info in store.list("")] == [store.head("a").modified_s, store.head("b").modified_s]


@pytest.mark.parametrize(("task", "form", "kind"), [("fine-tuning", "copy", "copy"), ("lora", "fp32", None)])
def test_which_bar_holds(task: str, form: str, kind: str | None) -> None:
    assert incremental_pairs.kind(task, form) == kind


def test_rows_of_a_long_run_judge_the_worst_checkpoint() -> None:
    check = {"read": 100.0, "cpu_s": 1.0, "memory": 1e6, "stored": 100.0}
    worse = {**check, "read": 170.0}
    found = {
        "form": "fp32",
        "saves": [
            {"bytes": 50, "store_bytes": 320, "living_bytes": 300},
            {"bytes": 40, "store_bytes": 480, "living_bytes": 460},
        ],
        "checks": [{"save": 1, "ours": check, "full": check}, {"save": 2, "ours": worse, "full": check}],
    }
    rows = incremental_runs.rows_of("lora", found)
    assert [row["met"] for row in rows] == [False, True, True, False]
    assert rows[0]["note"] == "save 2"


def test_the_report_counts_the_bars(tmp_path: Path) -> None:
    rows = incremental_runs.rows_of("lora", {"error": "no end"})
    machine = {
        "cpu": "x",
        "cores": 2,
        "memory_bytes": 1e9,
        "kernel": "6",
        "filesystem": "ext4",
        "python": "3",
        "torch": "2",
    }
    settings = {
        "seed": 1,
        "rounds": 1,
        "saves": 2,
        "seconds": 1.0,
        "load_averages": [],
        "load_average": {"start": [0.0]},
    }
    result = {"date": "2026-11-28T00:00", "machine": machine, "versions": {}, "settings": settings}
    text = incremental_report.markdown({**result, "rows": rows, "contenders": {}, "samples": {}})
    assert "0 of 0 bars are met" in text
