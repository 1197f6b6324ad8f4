"""`Checkpointer.step` counts optimizer steps in the samplers of its state: what is saved as step n has the samples of step n behind it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from fastckpt import Checkpointer, ElasticSampler, Every, Options, RestoreError, SaveError
from fastckpt.training.positions import Positions
from fastckpt.training.sample_order import SampleOrder
from tests.support.stores import HeldStore
from tests.support.training import SHORT_S

LENGTH, BATCH, EPOCH = 50, 8, 7


class Run:
    """A model that counts how often it was trained with each sample."""

    def __init__(self, length: int = LENGTH, **settings: Any) -> None:
        self.seen = torch.zeros(length, dtype=torch.int64)
        self.sampler = ElasticSampler(length, BATCH, **settings)
        self.loader: DataLoader[torch.Tensor] = DataLoader(torch.arange(length), batch_sampler=self.sampler)  # type: ignore[arg-type]
        self.state: dict[str, Any] = {"seen": self.seen, "sampler": self.sampler}
        self.batches = iter(self.loader)

    def train(self) -> None:
        """One step; draws the next epoch's batches when this one's are done."""
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        self.seen[batch] += 1

    def begin(self) -> None:
        """As after a restore: batches are drawn from where the run is."""
        self.batches = iter(self.loader)


def checkpointer(store: HeldStore, run: Run, **settings: Any) -> Checkpointer:
    settings = {"every": Every(steps=1), "spot": None, "options": Options(threads=1, connections=1), **settings}
    return Checkpointer(store, run.state, **settings)


def expected(steps: int) -> torch.Tensor:
    """How often each sample was seen after so many steps."""
    seen = torch.zeros(LENGTH, dtype=torch.int64)
    for epoch in range(steps // EPOCH + 1):
        n = min(LENGTH, max(0, steps - epoch * EPOCH) * BATCH)
        seen[SampleOrder(LENGTH, shuffle=True, seed=0, epoch=epoch).samples(0, n)] += 1
    return seen


@pytest.mark.parametrize("stops", [(3, 5), (7, 9), (6, 14), (1, 15)])
def test_every_restored_step_has_its_samples_behind_it(store: HeldStore, stops: tuple[int, ...]) -> None:
    """Each job draws batches beyond what it has told, and is left; the next one begins from its last step."""
    done = 0
    for stop in (*stops, 20):
        run = Run()
        with checkpointer(store, run) as ckpt:
            assert ckpt.restore() == done
            assert torch.equal(run.seen, expected(done))
            run.begin()
            for step in range(done, stop):
                run.train()
                ckpt.step(step + 1)
            ckpt.save_now(stop).wait(SHORT_S)
            next(run.batches, None)  # the step that is never told
            done = stop
    assert torch.equal(run.seen, expected(20))


def test_the_state_that_is_saved_is_that_after_the_step(store: HeldStore) -> None:
    run = Run()
    with checkpointer(store, run) as ckpt:
        for step in (1, 2):
            run.train()
            assert run.sampler.samples == (step - 1) * BATCH
            ckpt.step(step)
            assert run.sampler.samples == step * BATCH
            ckpt.wait(SHORT_S)
        assert ckpt.restore(step=1) == 1
        assert (run.sampler.samples, run.sampler.total) == (BATCH, BATCH)
        assert torch.equal(run.seen, expected(1))
        run.begin()
        for step in range(2, 12):
            run.train()
            ckpt.step(step)
    assert torch.equal(run.seen, expected(11))


def test_a_number_counts_once(store: HeldStore) -> None:
    run = Run()
    with checkpointer(store, run, every=None) as ckpt:
        ckpt.step(0)  # before the first step
        run.train()
        ckpt.step(1)
        ckpt.step(1)
        ckpt.save_now(1).wait(SHORT_S)
        ckpt.save_now(1).wait(SHORT_S)
    assert run.sampler.samples == BATCH
    with checkpointer(store, run, every=None) as ckpt:
        assert ckpt.restore() == 1
        ckpt.save_now(1).wait(SHORT_S)
        assert run.sampler.samples == BATCH


def test_a_loop_may_tell_several_steps_at_once(store: HeldStore) -> None:
    run = Run()
    with checkpointer(store, run, every=None) as ckpt:
        for step in range(1, 7):
            run.train()
            if step % 3 == 0:
                ckpt.save_now(step).wait(SHORT_S)
                assert run.sampler.samples == step * BATCH


def test_a_call_that_raised_is_made_up_for(store: HeldStore) -> None:
    """The error of a background save comes before anything is counted; the next number counts both steps."""
    run = Run()
    with checkpointer(store, run, every=None) as ckpt:
        run.train()
        ckpt.step(1)
        run.train()
        with pytest.raises(TypeError, match="metrics"):
            ckpt.step(2, metrics={"loss": "high"})  # type: ignore[dict-item]
        assert run.sampler.samples == BATCH
        run.train()
        ckpt.step(3)
        assert run.sampler.samples == 3 * BATCH


def test_a_loader_of_another_sampler_is_found_at_the_first_step(
    store: HeldStore, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    with checkpointer(store, run) as ckpt:
        with pytest.raises(
            SaveError, match=r"'sampler' has dealt out 0 steps.*and 1 are to be counted.*Nothing was counted"
        ):
            ckpt.step(1)
        assert run.sampler.samples == 0
    assert not ckpt.stats.saves
    assert "the first number" not in caplog.text


def test_an_iteration_of_before_the_restore_is_found(store: HeldStore) -> None:
    """A loader that has drawn ahead gives its old batches without asking the sampler again."""
    run = Run()
    with checkpointer(store, run) as ckpt:
        for step in (1, 2):
            run.train()
            ckpt.step(step)
            ckpt.wait(SHORT_S)
        ckpt.restore(step=1)
        with pytest.raises(SaveError, match=r"begin a new iter\(loader\) after each restore"):
            ckpt.step(2)


def test_steps_that_were_advanced_by_hand_are_not_counted_again(store: HeldStore) -> None:
    run = Run()
    with checkpointer(store, run) as ckpt:
        for step in (1, 2, 3):
            run.train()
            run.sampler.advance()
            ckpt.step(step)
            assert run.sampler.samples == step * BATCH
        run.sampler.advance(2)
        with pytest.raises(SaveError, match="and -1 are to be counted"):
            ckpt.step(4)


def test_a_sampler_of_some_steps_is_left_to_the_loop(store: HeldStore) -> None:
    run = Run()
    other = ElasticSampler(30, 3, automatic=False)
    run.state["other"] = other
    with checkpointer(store, run) as ckpt:
        for step in range(1, 5):
            run.train()
            if step % 2:
                other.advance()
            ckpt.step(step)
            ckpt.wait(SHORT_S)
    assert (run.sampler.samples, other.samples) == (4 * BATCH, 6)
    again = Run()
    again.state["other"] = ElasticSampler(30, 3, automatic=False)
    with checkpointer(store, again) as ckpt:
        assert ckpt.restore() == 4
        assert again.state["other"].samples == 6
        again.state["other"].advance()
        with pytest.raises(SaveError, match="the state has changed since"):
            ckpt.save_now(4)


def test_numbers_that_do_not_begin_at_one(store: HeldStore, caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    with checkpointer(store, run) as ckpt:
        for step in (1001, 1002):
            run.train()
            with caplog.at_level(logging.WARNING, "fastckpt"):
                ckpt.step(step)
            ckpt.wait(SHORT_S)
    assert [record.getMessage()[:41] for record in caplog.records] == ["step 1001 is the first number that is tol"]
    assert run.sampler.samples == 2 * BATCH
    again = Run()
    with checkpointer(store, again) as ckpt:
        assert ckpt.restore() == 1002
        again.begin()
        again.train()
        ckpt.step(1003)
    assert again.sampler.samples == 3 * BATCH


def test_a_checkpoint_of_another_order_is_refused_before_anything_changes(store: HeldStore) -> None:
    run = Run()
    with checkpointer(store, run) as ckpt:
        run.train()
        ckpt.step(1)
    other = Run(seed=1)
    with checkpointer(store, other) as ckpt, pytest.raises(RestoreError, match="sampler: seed was 0 when it was saved"):
        ckpt.restore()
    assert not other.seen.any()


def test_samplers_that_ranks_share_are_told_with_all_their_settings() -> None:
    targets = {"a": ElasticSampler(9, 4, rank=1, world=2), "b": ElasticSampler(9, 4, rank=0, world=1), "c": [1]}
    words = "a: ElasticSampler(9, batch_size=4, shuffle=True, seed=0, tail='uneven', micro_batches=1)"
    assert Positions(targets).shared == [words]
