"""What the next save is written against: the newest checkpoint that was acknowledged or restored, and only bytes that it has."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import Checkpointer, Every, Options
from fastckpt.errors import StoreError
from fastckpt.store.memory import MemoryStore
from fastckpt.training.bases import Bases
from fastckpt.writing.bases import Base
from tests.support.bases import chunks_of, settle, share_of
from tests.support.host_training import MIB, SHORT_S


class Run:
    """A model with AdamW: six storages of 1.3 MB, three of which fill a small slab, and a bundle of small ones."""

    def __init__(self, seed: int = 0, width: int = 300) -> None:
        torch.manual_seed(seed)
        self.width = width
        self.model = torch.nn.Sequential(torch.nn.Linear(width, 1100), torch.nn.Linear(1100, width))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "rng": fastckpt.RNGState()}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self.width)).square().mean().backward()
        self.optimizer.step()


def opened(store: Any, run: Run, **settings: Any) -> Checkpointer:
    options = {"threads": 2, "connections": 1, "host_budget_bytes": 256 * MIB, **settings.pop("options", {})}
    return Checkpointer(store, run.state, **{"every": None, "spot": None, "options": Options(**options), **settings})


def bases_of(ckpt: Checkpointer) -> Bases:
    return ckpt._engine.queue.bases


def newest(ckpt: Checkpointer) -> Base:
    settle()
    base = bases_of(ckpt).newest
    assert base is not None
    return base


class Refusing(MemoryStore):
    """Refuses what it is told to."""

    refused = ""

    def put(self, key: str, data: Any) -> None:
        if self.refused and self.refused in key:
            raise StoreError(f"{key}: refused, said the test")
        super().put(key, data)


def test_an_acknowledged_save_is_the_base_of_the_next() -> None:
    store, run = MemoryStore(), Run()
    with opened(store, run) as ckpt:
        assert bases_of(ckpt).newest is None
        for step in range(1, 4):
            run.step()
            ckpt.save_now(step).wait(SHORT_S)
            base = newest(ckpt)
            assert base.parent.checkpoint.step == step
        assert share_of(base, store) == 1
        settle()
    assert bases_of(ckpt).newest is None
    assert ckpt._engine.stager.pool.held_bytes == 0, "closing gives the memory back"


@pytest.mark.parametrize("refused", ["data/", "votes/"])
def test_a_failed_save_leaves_the_base_as_it_was(refused: str) -> None:
    store, run = Refusing(), Run()
    with opened(store, run) as ckpt:
        run.step()
        ckpt.save_now(1).wait(SHORT_S)
        before = newest(ckpt)
        run.step()
        store.refused = refused
        with pytest.raises(StoreError):
            ckpt.save_now(2).wait(SHORT_S)
        with pytest.raises(StoreError):
            ckpt.wait()
        assert newest(ckpt) is before
        assert share_of(before, store) == 1
        store.refused = ""
        ckpt.save_now(3).wait(SHORT_S)
        assert newest(ckpt).parent.checkpoint.step == 3


def test_a_full_save_is_the_base_of_the_next_and_names_no_other() -> None:
    store, run = MemoryStore(), Run()
    with opened(store, run) as ckpt:
        for step, full in ((1, False), (2, True), (3, False)):
            ckpt.save_now(step, full=full).wait(SHORT_S)
            packs_of = {file.key.split("/")[1] for file in newest(ckpt).files}
            assert packs_of == {f"000001-{min(step, 2):012}-000"}, "the third has nothing new"
        with pytest.raises(TypeError, match="full is 1"):
            ckpt.save_now(4, full=1)  # type: ignore[arg-type]


def test_without_deltas_nothing_is_kept() -> None:
    run = Run()
    with opened(MemoryStore(), run, options={"deltas": False}) as ckpt:
        ckpt.save_now(1).wait(SHORT_S)
        ckpt.wait()
        assert bases_of(ckpt).newest is None
        assert ckpt._engine.stager.pool.bases.n_bytes == 0


def test_a_budget_for_one_snapshot_keeps_what_the_next_leaves(caplog: pytest.LogCaptureFixture) -> None:
    store, run = MemoryStore(), Run()
    seen: list[fastckpt.events.BaseIncomplete] = []

    def see(event: Any) -> None:
        if isinstance(event, fastckpt.events.BaseIncomplete):
            seen.append(event)

    with opened(store, run) as ckpt, caplog.at_level(logging.INFO), fastckpt.events.subscribe(see):
        pool = ckpt._engine.stager.pool
        pool.set_budget(12 * MIB)  # slabs of 4 MiB: two for a snapshot
        run.step()
        ckpt.save_now(1).wait(SHORT_S)
        ckpt.wait()
        for step in range(2, 5):
            run.step()
            ckpt.save_now(step).wait(SHORT_S)
            ckpt.wait()
            assert pool.held_bytes <= pool.budget_bytes
            assert newest(ckpt).parent.checkpoint.step == step
        assert ckpt.stats.deferred == 0
    assert [event.step for event in seen] == [2, 3, 4]
    assert [event.lacking_bytes for event in seen] == [4 * MIB] * 3
    assert "are not in memory (host_budget_bytes has no room" in caplog.text
    assert caplog.text.count("This is told once") == 1


@pytest.mark.parametrize("steps_between", [0, 3])
def test_memory_is_made_for_a_base_and_a_snapshot_and_no_third_copy(steps_between: int) -> None:
    """Also where the second save begins before a step has made its memory ahead."""
    store, run = MemoryStore(), Run()
    with opened(store, run, every=fastckpt.Every(steps=1)) as ckpt:
        engine, held = ckpt._engine, []
        for step in range(1, 5):
            run.step()
            ckpt.step(step)
            ckpt.wait()
            for _ in range(steps_between):
                ckpt._saver.prepare()
            engine.stager.stop_preparing()
            held.append(engine.stager.pool.held_bytes)
        one = sum(engine.stager._newest_sizes)
        assert max(held) <= 2 * one, (held, one)


def test_a_state_that_goes_through_in_parts_is_not_kept() -> None:
    store, run = MemoryStore(), Run(width=700)
    with opened(store, run) as ckpt:
        run.step()
        pool = ckpt._engine.stager.pool
        pool.set_budget(12 * MIB)
        for step in (1, 2):
            ckpt.save_now(step).wait(SHORT_S)
            assert newest(ckpt).memory is None
            assert share_of(newest(ckpt), store, "stored") == 1
            assert pool.bases.n_bytes == 0


def saved(store: MemoryStore, steps: int = 2) -> Run:
    run = Run()
    with opened(store, run) as ckpt:
        for step in range(1, steps + 1):
            run.step()
            ckpt.save_now(step).wait(SHORT_S)
    return run


@pytest.mark.parametrize("how", [{}, {"overlap": True}, {"atomic": True}, {"step": 1}])
def test_what_was_restored_is_a_base(how: dict[str, Any]) -> None:
    store = MemoryStore()
    saved(store)
    run = Run(seed=7)
    run.step()
    with opened(store, run) as ckpt:
        step = ckpt.restore(**how)
        ckpt.fence()
        base = newest(ckpt)
        assert base.parent.checkpoint.step == step == how.get("step", 2)
        assert share_of(base, store) == 1, "all of it lies where the objects have it"
        run.step()
        ckpt.save_now(step + 1).wait(SHORT_S)
        assert newest(ckpt).parent.checkpoint.step == step + 1


class Changing(torch.nn.Linear):
    """Takes its weight otherwise than it is given."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        with torch.no_grad():
            self.weight[3, 3] += 1


def test_bytes_that_are_not_the_checkpoints_are_not_kept() -> None:
    store = MemoryStore()
    model = Changing(600, 1000)
    with opened(store, saved_as(model)) as ckpt:
        ckpt.save_now(1).wait(SHORT_S)
    with opened(store, saved_as(model)) as ckpt:
        ckpt.restore()
        found = [(n, lent is not None) for n, _, lent in chunks_of(newest(ckpt), store)]
    assert (600 * 1000 * 4, False) in found
    assert (1000 * 4, True) in found


def saved_as(model: torch.nn.Module) -> Run:
    run = Run()
    run.state = {"model": model}
    return run


def test_a_restore_needs_no_memory_that_a_save_needs() -> None:
    store = MemoryStore()
    saved(store)
    run = Run()
    with opened(store, run) as ckpt:
        pool = ckpt._engine.stager.pool
        pool.set_budget(16 * MIB)  # a snapshot takes 8
        ckpt.restore()
        assert newest(ckpt).memory is not None
        pool.set_budget(12 * MIB)
        ckpt.restore()
        assert newest(ckpt).memory is None
        assert share_of(newest(ckpt), store, "stored") == 1


def test_readers_keep_nothing() -> None:
    store = MemoryStore()
    saved(store)
    with opened(store, Run(), read_only=True) as ckpt:
        ckpt.restore()
        settle()
        assert bases_of(ckpt).newest is None
        assert ckpt._engine.stager.pool.held_bytes == 0


def test_a_base_that_cannot_be_found_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fastckpt.training import restored_base

    store = MemoryStore()
    saved(store)

    def fail(*_: Any) -> None:
        raise MemoryError("none, said the test")

    monkeypatch.setattr(restored_base, "place_chunks", fail)
    run = Run()
    with opened(store, run) as ckpt, caplog.at_level(logging.INFO):
        assert ckpt.restore() == 2
        assert bases_of(ckpt).newest is None
        assert "the next save will be a whole one: MemoryError" in caplog.text
        run.step()
        ckpt.save_now(3).wait(SHORT_S)
        assert newest(ckpt).parent.checkpoint.step == 3


def test_saves_by_step_have_bases_too() -> None:
    store, run = MemoryStore(), Run()
    with Checkpointer(store, run.state, every=Every(steps=1), spot=None) as ckpt:
        for step in range(1, 4):
            run.step()
            ckpt.step(step)
        ckpt.wait()
        assert share_of(newest(ckpt), store) == 1
