"""bfloat16 copies of float32 masters: found in the states that people have, proved number by number, and stored as nothing."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import Checkpointer, Options, events
from fastckpt.store.memory import MemoryStore
from fastckpt.writing.casts import candidates
from tests.support.delta_runs import OPTIONS, Run
from tests.support.repositories import check_all, read
from tests.support.states import same, sealed

SIZES = (300_000, 1_200_000, 1_200_000, 500, 300_000, 70, 70)


def masters(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in SIZES]


def same_names(ws: list[torch.Tensor]) -> Any:
    return {
        "model": {f"layers.{i}.weight": w.bfloat16() for i, w in enumerate(ws)},
        "master": {f"module.layers.{i}.weight": w for i, w in enumerate(ws)},
    }


def in_optimizer(ws: list[torch.Tensor]) -> Any:
    state = {i: {"exp_avg": w * 0.1, "exp_avg_sq": w * w, "master_param": w} for i, w in enumerate(ws)}
    names = [f"z{9 - i}" for i in range(len(ws))]  # their order is not that of the optimizer
    return {
        "model": {name: w.bfloat16() for name, w in zip(names, ws, strict=True)},
        "optimizer": {"state": state, "param_groups": [{"lr": 0.1}]},
    }


def by_name(ws: list[torch.Tensor]) -> Any:
    state = {f"a.{i}": {"exp_avg": w * 0.1, "exp_avg_sq": w * w, "fp32": w} for i, w in enumerate(ws)}
    return {"model": {f"a.{i}": w.bfloat16() for i, w in enumerate(ws)}, "optimizer": {"state": state}}


def flat_lists(ws: list[torch.Tensor]) -> Any:
    return {
        "module": {f"a{i}": w.bfloat16() for i, w in enumerate(ws)},
        "optimizer": {"fp32_from_fp16": [list(ws)], "moments": [w * 0.1 for w in ws]},
    }


@pytest.mark.parametrize("form", [same_names, in_optimizer, by_name, flat_lists])
def test_copies_are_found_in_states_that_people_have(form: Any) -> None:
    run = Run(MemoryStore())
    copies = 2 * sum(SIZES)
    for step, seed in ((1, 1), (2, 2), (3, 2)):
        state = form(masters(seed))
        commit = run.save(step, state)
        assert same(read(run.job.repository.store, commit), state)
        rows = Counter(run.transforms())
        assert rows["CAST"] == 9, "two chunks of each large storage, and a row for each small one of a bundle"
        assert run.uploaded is not None
        of_copies = run.uploaded.records[run.uploaded.records["transform"] == 7]
        assert int(of_copies["raw_bytes"].sum()) == copies
    assert len(run.job.uplink.masters) == len(SIZES)
    check_all(run.job.repository.store)


def test_one_number_that_differs_is_no_copy() -> None:
    state = same_names(masters())
    copy = state["model"]["layers.1.weight"]
    copy[-1] += 1
    state["model"]["layers.3.weight"][0] = float("nan")
    run = Run(MemoryStore())
    assert same(read(run.job.repository.store, run.save(1, state)), state)
    rows = Counter(run.transforms())
    assert rows["CAST"] == 6, (
        "neither the second chunk of the changed one, nor the two of a bundle of which one is none"
    )


def test_nan_and_signs_are_those_of_the_rounding() -> None:
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, 3.4e38, 1.00390625])
    weights = odd.repeat(50_000)
    run = Run(MemoryStore())
    state = {"model": {"w": weights.bfloat16()}, "master": {"w": weights}}
    assert same(read(run.job.repository.store, run.save(1, state)), state)


def test_without_a_master_nothing_is_looked_for() -> None:
    assert candidates(sealed({"w": torch.ones(100).bfloat16(), "v": torch.ones(99)}), {}) == {}
    assert candidates(sealed({"w": torch.ones(100).half(), "v": torch.ones(100)}), {}) == {}


def test_many_candidates_are_few_for_each() -> None:
    state = {
        "model": {f"l.{i}": torch.ones(3).bfloat16() for i in range(300)},
        "optim": {"state": {i: {key: torch.ones(3) for key in ("exp_avg", "exp_avg_sq", "m")} for i in range(300)}},
    }
    form = sealed(state)
    found = candidates(form, {})
    assert len(found) == 300
    assert max(map(len, found.values())) <= 6
    names = {entry.storage: entry.name for entry in form.tensors}
    for copy, masters_ in found.items():
        assert {names[m][2] for m in masters_[:3]} == {int(str(names[copy][1])[2:])}


def test_a_checkpointer_stores_them_as_nothing() -> None:
    """Of its snapshots: the masters are peeked at while they are in its memory."""
    store, seen = MemoryStore(), list[events.Event]()
    state = same_names(masters())
    with (
        fastckpt.Checkpointer(store, {"s": state}, every=None, spot=None, options=OPTIONS) as ckpt,
        events.subscribe(seen.append),
    ):
        for step in (1, 2):
            ckpt.save_now(step).wait()
            for name, master in state["master"].items():
                master.mul_(1.001)
                state["model"][name.removeprefix("module.")].copy_(master)
    told = [event for event in seen if isinstance(event, events.DeltasUsed)]
    assert [event.raw_bytes["cast"] for event in told] == [2 * sum(SIZES)] * 2
    check_all(store)


def test_copies_that_rest_with_their_masters_carry_nothing() -> None:
    """Where digests alone tell: the copies' rows name their masters' rows in the new index."""
    run = Run(MemoryStore(), keeps=None)
    state = same_names(masters()[:3])
    run.save(1, state)
    rows = run.transforms()

    class Blind:
        """Gives no chunk but in its turn."""

        def __init__(self, source: Any) -> None:
            self._source = source

        def peek(self, number: int, scratch: Any) -> Any:
            return contextlib.nullcontext()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._source, name)

    form = sealed(state)
    for step in (2, 3):
        run.save(step, replace(form, source=Blind(form.source)))
        assert run.stored_bytes == 0
        assert Counter(run.transforms()) == Counter(rows)
    check_all(run.job.repository.store)


def test_copies_of_a_state_that_goes_through_the_budget_in_parts() -> None:
    """Its chunks come in their order alone: who asks for the copies first waits for masters that nobody has read."""
    master = torch.randn(6 << 20)
    state = {"a": {"w": master}, "b": {"w": master.bfloat16()}}
    options = Options(threads=1, connections=1, host_budget_bytes=40 << 20, max_stall_s=2.0)
    assert options.snapshot_bytes < sum(one["w"].nbytes for one in state.values())
    store = MemoryStore()
    with Checkpointer(store, {"state": state}, every=None, spot=None, options=options) as ckpt:
        commit = ckpt.save_now(1).wait()
    found = read(store, commit)["state"]
    assert torch.equal(found["a"]["w"], master)
    assert torch.equal(found["b"]["w"], state["b"]["w"])
