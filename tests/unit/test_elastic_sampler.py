"""The samples of an epoch come once each to the steps that count, whatever the ranks, restores and loaders in between."""

from __future__ import annotations

import io
import itertools
import logging
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastckpt import CheckpointError, ElasticSampler, RestoreError
from fastckpt.training.sample_order import SampleOrder


class Job:
    """All ranks of one start of a job, which take their steps together."""

    def __init__(self, world: int, state: dict[str, Any] | None, **settings: Any) -> None:
        self.samplers = [ElasticSampler(rank=rank, world=world, **settings) for rank in range(world)]
        for one in self.samplers if state is not None else ():
            one.load_state_dict(state)  # type: ignore[arg-type]
        self.micro_batches = self.samplers[0].micro_batches
        self.begin()

    def begin(self) -> None:
        """Ranks begin to take lists from where they are."""
        self.iterators = [iter(one) for one in self.samplers]
        self.ahead: list[list[list[list[int]]]] = [[] for _ in self.samplers]

    def draw(self, steps: int) -> None:
        """A loader takes lists ahead, of as many steps as the epoch has."""
        for ahead, lists in zip(self.ahead, self.iterators, strict=True):
            drawn = list(itertools.islice(lists, steps * self.micro_batches))
            assert len(drawn) % self.micro_batches == 0
            ahead += [drawn[n : n + self.micro_batches] for n in range(0, len(drawn), self.micro_batches)]

    def step(self, prefetch: int) -> tuple[int, list[int]]:
        """One step with lists that were drawn ahead: its epoch and samples, in their order. Begins the next epoch if this one ends."""
        self.draw(max(0, prefetch + 1 - len(self.ahead[0])))
        if not self.ahead[0]:
            self.begin()
            self.draw(prefetch + 1)
        epoch = self.samplers[0].epoch
        lists = [(one, n) for one in self.samplers for n in range(self.micro_batches)]
        drawn = [samples for ahead in self.ahead for samples in ahead.pop(0)]
        trained: list[int] = []
        mean = Fraction(0)
        for (sampler, n), samples in zip(lists, drawn, strict=True):
            assert samples, "no loader takes an empty list"
            weight = sampler.weight(n)
            mean += Fraction(weight).limit_denominator(10**6) * Fraction(
                sum(samples), len(samples) * len(self.samplers)
            )
            if weight:
                trained += samples
        assert mean == Fraction(sum(trained), len(trained)), "weighted means of the parts are the mean of the whole"
        sizes = [
            sum(len(d) for d in drawn[n : n + self.micro_batches]) for n in range(0, len(drawn), self.micro_batches)
        ]
        if len(trained) >= len(lists):
            assert max(sizes) - min(sizes) <= 1
            assert max(map(len, drawn)) - min(map(len, drawn)) <= 1
        for one in self.samplers:
            one.advance()
        return epoch, trained

    def state(self) -> dict[str, Any]:
        states = [one.state_dict() for one in self.samplers]
        assert all(state == states[0] for state in states)
        return states[0]


stages = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(0, 12), st.integers(0, 4)), min_size=1, max_size=5
)


@settings(max_examples=100)
@given(st.integers(1, 50), st.integers(1, 20), st.booleans(), st.sampled_from(["uneven", "drop"]), stages)
def test_every_sample_comes_once_over_all_restarts(
    length: int, batch_size: int, shuffle: bool, tail: str, stages: list[tuple[int, int, int, int]]
) -> None:
    """Stages: ranks, micro batches, steps, steps drawn ahead. Each begins with the state of the one before, on other ranks."""
    if tail == "drop":
        batch_size = min(batch_size, length)
    state: dict[str, Any] | None = None
    found: list[tuple[int, list[int]]] = []
    for most_ranks, most_micro_batches, steps, prefetch in stages:
        world = min(most_ranks, batch_size)
        micro_batches = min(most_micro_batches, batch_size // world)
        job = Job(
            world,
            state,
            dataset=length,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=3,
            tail=tail,
            micro_batches=micro_batches,
        )
        found += [job.step(prefetch) for _ in range(steps)]
        state = job.state()
        assert state["total"] == sum(len(samples) for _, samples in found)
    used = length if tail == "uneven" else length - length % batch_size
    expected: list[tuple[int, list[int]]] = []
    epoch = 0
    while len(expected) < len(found):
        order = SampleOrder(length, shuffle=shuffle, seed=3, epoch=epoch).samples(0, used)
        expected += [(epoch, order[at : at + batch_size]) for at in range(0, used, batch_size)]
        epoch += 1
    assert found == expected[: len(found)]


def test_four_ranks_then_three_then_five() -> None:
    """1,000 samples in steps of 60; each job is left in the middle of an epoch with steps drawn ahead."""
    state, found = None, []
    for world, steps in ((4, 10), (3, 11), (5, 13)):
        job = Job(world, state, dataset=1000, batch_size=60, seed=1)
        found += [job.step(3) for _ in range(steps)]
        state = job.state()
    for epoch in (0, 1):
        samples = [one for number, step in found if number == epoch for one in step]
        assert sorted(samples) == list(range(1000))
    assert [epoch for epoch, _ in found] == [0] * 17 + [1] * 17
    assert state == {
        "version": 1,
        "length": 1000,
        "shuffle": True,
        "seed": 1,
        "batch_size": 60,
        "tail": "uneven",
        "epoch": 2,
        "samples": 0,
        "total": 2000,
    }


def test_the_state_passes_a_restricted_load() -> None:
    file = io.BytesIO()
    torch.save(ElasticSampler(10, 2).state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == ElasticSampler(10, 2).state_dict()


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers_that_draw_ahead(persistent: bool) -> None:
    """Two workers take four steps ahead: the loop is left after 3 of 6. Then it goes on, and so does another job."""
    settings: dict[str, Any] = {"num_workers": 2, "prefetch_factor": 2, "persistent_workers": persistent}
    settings["multiprocessing_context"] = "fork"
    sampler = ElasticSampler(Numbers(), 7, seed=2)
    order = [SampleOrder(40, shuffle=True, seed=2, epoch=epoch).samples(0, 40) for epoch in range(2)]
    loader = DataLoader(Numbers(), batch_sampler=sampler, **settings)
    assert len(loader) == 6
    found = []
    for batch in loader:
        found += batch.tolist()
        assert sampler.steps_ahead > 1 or len(found) > 28
        sampler.advance()
        if len(found) == 21:
            break
    assert (sampler.samples, sampler.steps_ahead) == (21, 3)
    other = ElasticSampler(Numbers(), 7, seed=2)
    other.load_state_dict(sampler.state_dict())
    for one, start in ((loader, 21), (DataLoader(Numbers(), batch_sampler=other, **settings), 21)):
        sampler = one.batch_sampler  # type: ignore[assignment]
        went_on = list(order[0][:start])
        for epoch in range(2):
            for batch in one:
                assert sampler.epoch == epoch
                went_on += batch.tolist()
                sampler.advance()
        assert went_on == order[0] + order[1]
        del one


def test_an_iteration_of_before_a_restore_is_refused() -> None:
    sampler = ElasticSampler(40, 4)
    lists = iter(sampler)
    next(lists)
    sampler.load_state_dict(sampler.state_dict())
    with pytest.raises(CheckpointError, match=r"iter\(loader\), after each restore"):
        next(lists)


@pytest.mark.parametrize("tail", ["uneven", "drop"])
def test_an_endless_iteration_may_run_ahead_over_epochs(tail: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each batch is drawn two epochs before its step is counted; a job that goes on from any step gets the same samples."""
    settings: dict[str, Any] = {"seed": 1, "tail": tail, "endless": True}
    sampler = ElasticSampler(10, 4, **settings)
    with caplog.at_level(logging.WARNING, "fastckpt"):
        ends = 10 if tail == "uneven" else 8
        orders = [SampleOrder(10, shuffle=True, seed=1, epoch=epoch).samples(0, ends) for epoch in range(6)]
        steps = [order[at : at + 4] for order in orders for at in range(0, ends, 4)]
        lists = iter(sampler)
        drawn = [next(lists) for _ in range(6)]
        for number in range(6):
            assert sampler.steps_ahead == 6
            other = ElasticSampler(10, 4, **settings)
            other.load_state_dict(sampler.state_dict())
            assert list(itertools.islice(other, 3)) == steps[number : number + 3]
            drawn.append(next(lists))
            sampler.advance()
    assert drawn == steps[:12]
    assert not caplog.records
    with pytest.raises(TypeError, match="endless"):
        len(sampler)


def test_an_epoch_that_nobody_counted_is_dealt_again_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    sampler = ElasticSampler(10, 4)
    with caplog.at_level(logging.WARNING, "fastckpt"):
        first = list(sampler)
        assert not caplog.records
        assert list(sampler) == first
    assert "only 0 of its 10 samples belong to steps that were counted" in caplog.text
    caplog.clear()
    sampler.advance(3)
    assert list(sampler) != first
    assert not caplog.records


def test_a_look_at_the_first_batch_disturbs_no_iteration() -> None:
    sampler = ElasticSampler(40, 4)
    lists = iter(sampler)
    drawn = [next(lists) for _ in range(3)]
    assert next(iter(sampler)) == drawn[0]
    assert sampler.steps_ahead == 3
    sampler.advance(3)
    assert next(lists) == next(iter(sampler))


def test_ranks_without_a_sample_get_a_stand_in_that_does_not_count() -> None:
    """13 samples in steps of 5, on 5 ranks: the last step has 3."""
    samplers = [ElasticSampler(13, 5, shuffle=False, rank=rank, world=5) for rank in range(5)]
    for one in samplers:
        one.advance(2)
    assert [next(iter(one)) for one in samplers] == [[10], [10], [11], [11], [12]]
    assert [one.weight() for one in samplers] == [0, 5 / 3, 0, 5 / 3, 5 / 3]


def test_micro_batches_share_a_step() -> None:
    sampler = ElasticSampler(20, 10, shuffle=False, micro_batches=2, rank=1, world=2)
    assert len(sampler) == 4
    lists = iter(sampler)
    assert next(lists) == [5, 6]
    assert sampler.steps_ahead == 0  # half of a step is none
    assert next(lists) == [7, 8, 9]
    assert sampler.steps_ahead == 1
    assert [sampler.weight(n) for n in (0, 1)] == [2 * 2 / 10, 3 * 2 / 10]
    with pytest.raises(ValueError, match="expected 0 to 1"):
        sampler.weight(2)


# -- what does not fit -------------------------------------------------------------------------------------------------


def state_after(steps: int, length: int = 100, batch_size: int = 10, **settings: Any) -> dict[str, Any]:
    sampler = ElasticSampler(length, batch_size, **settings)
    sampler.advance(steps)
    return sampler.state_dict()


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"length": 101}, "length was 100 when it was saved and is 101 now"),
        ({"seed": 1}, "seed was 0 when it was saved and is 1 now"),
        ({"shuffle": False}, "shuffle was True when it was saved and is False now"),
    ],
)
def test_another_order_is_refused_within_an_epoch_and_taken_between_two(there: dict[str, Any], words: str) -> None:
    sampler = ElasticSampler(there.pop("length", 100), 10, **there)
    before = sampler.state_dict()
    with pytest.raises(RestoreError, match=words):
        sampler.load_state_dict(state_after(13))
    assert sampler.state_dict() == before
    sampler.load_state_dict(state_after(20))
    assert (sampler.epoch, sampler.samples, sampler.total) == (2, 0, 200)


def test_all_differences_are_told_at_once() -> None:
    problems = ElasticSampler(101, 10, seed=1).misfits(state_after(1))
    assert len(problems) == 2
    assert "10 samples of epoch 0 are done" in problems[1]


def test_without_shuffle_the_seed_means_nothing() -> None:
    ElasticSampler(100, 10, shuffle=False, seed=1).load_state_dict(state_after(3, shuffle=False, seed=2))


def test_another_batch_size_goes_on_at_the_same_sample_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    sampler = ElasticSampler(100, 16, shuffle=False)
    with caplog.at_level(logging.WARNING, "fastckpt"):
        sampler.load_state_dict(state_after(3, shuffle=False))
    assert "steps of 10 samples (tail='uneven') were saved, those from here on have 16" in caplog.text
    assert [len(samples) for samples in sampler] == [16, 16, 16, 16, 6]
    assert next(iter(sampler)) == list(range(30, 46))


def test_a_rest_that_is_dropped_ends_the_epoch_at_once() -> None:
    sampler = ElasticSampler(100, 16, tail="drop")
    sampler.load_state_dict(state_after(9))
    assert (sampler.epoch, sampler.samples, sampler.total) == (1, 0, 90)
    assert sum(map(len, sampler)) == 96


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": -1}, "samples is -1: expected a number ≥ 0"),
        ({"epoch": "2"}, "epoch is '2': expected a number ≥ 0"),
        ({"total": None}, "total is None: expected a number ≥ 0"),
        ({"samples": 101}, "samples is 101: expected 100 at most"),
        ({"version": 2}, "version is 2, and this fastckpt reads 1"),
        ({"version": 0}, "version is 0, and this fastckpt reads 1"),
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RestoreError, match=words):
        ElasticSampler(100, 10).load_state_dict({**state_after(3), **change})


def test_another_objects_state_is_refused() -> None:
    assert ElasticSampler(100, 10).misfits([1]) == ["expected the state of an ElasticSampler, found list"]


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"dataset": 0}, ValueError, "the number of samples is 0: expected 1 to"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"batch_size": True}, TypeError, "batch_size is True: expected a whole number"),
        ({"batch_size": 2.0, "seed": "1"}, TypeError, "batch_size is 2.0: .*; seed is '1'"),
        ({"shuffle": "no"}, TypeError, "shuffle is 'no': expected True or False"),
        ({"tail": "pad"}, ValueError, 'tail is \'pad\': expected "uneven" or "drop"'),
        ({"tail": "drop", "batch_size": 101}, ValueError, "would use none"),
        ({"rank": 1}, TypeError, "expected two whole numbers, or neither"),
        ({"rank": 2, "world": 2}, ValueError, "expected a rank from 0"),
        ({"rank": 0, "world": 6, "micro_batches": 2}, ValueError, "12 lists .6 ranks, 2 micro batches each"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        ElasticSampler(**{"dataset": 100, "batch_size": 10, **arguments})


@pytest.mark.parametrize("steps", [-1, True, 1.0])
def test_only_whole_steps_are_counted(steps: Any) -> None:
    with pytest.raises(ValueError, match="expected a number of optimizer steps"):
        ElasticSampler(100, 10).advance(steps)
