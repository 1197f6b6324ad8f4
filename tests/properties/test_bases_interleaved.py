"""Saves that refer to earlier ones, while others retire these: every place at which an actor of a small world can be stopped.

A world is a repository of four saves (of the first two only packs are left, to which the others refer), and two or three actors. Within
a bound, the number of stops, all schedules are tried: one actor runs up to each of its requests, the others run, it goes on. Nothing is
drawn by chance. The bug switches at the end show that the schedules find what they are there to find.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

import pytest

from fastckpt.errors import CheckpointError
from fastckpt.format.keys import CheckpointId, parse_pack
from fastckpt.format.repository_records import Tombstone
from fastckpt.format.sealed_state import SealedState
from fastckpt.repository import commit, incarnation, retention, still_ours
from fastckpt.repository.catalog import Catalog, complete_pending
from fastckpt.repository.collector import Collector
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.writing.bases import Uploaded
from tests.support.stops import GRACE_S, Job, Schedule, Stops, World, read_checkpoint

BOTH: tuple[Stops, ...] = ("between requests", "on the way")
Acts = dict[str, Callable[[], object]]


class Scenario(NamedTuple):
    """A world with actors, made anew for each schedule."""

    make: Callable[[World], Acts]
    stopped: str
    """The actor that is stopped at each of its requests."""
    beside: str
    """The one that may be stopped too, if there are two stops."""


@cache
def beginning() -> World:
    """Living: steps 3 and 4. Of steps 1 and 2, packs that those refer to, under tombstones whose grace is long over."""
    world = World("between requests")
    job = Job(world, "", keep=Keep(last=2))
    job.restore()
    for step, value in ((1, 1), (2, 3), (3, 4), (4, 5)):
        job.save(step, value=value)
        job.retain()
        world.now_s += 3 * GRACE_S
    world.n_values = 5
    job.retain()
    world.judge()
    packs = {parse_pack(info.key) for info in world.store.list("data/")}
    assert {save.step for save in packs if save is not None} == {1, 2, 3, 4}
    assert isinstance(Repository(world.store).commit(CheckpointId(1, 2)), Tombstone)
    return world


def take_over(world: World, *, full: bool) -> None:
    """Another incarnation: it goes on from the newest, and retires all but its own newest, for as long as that takes."""
    job = Job(world, "next", keep=Keep(last=1, max_grace_bytes=0))  # of other epochs' bytes none goes early
    job.restore()
    job.save(8, full=full)
    for _ in range(3):
        job.retain()
        world.pause()
    job.save(9)
    job.retain()


def stopped_writer(world: World, *, full: bool) -> Acts:
    """A job is stopped in a save; another incarnation takes over."""
    job = Job(world, "writer")
    job.restore()
    return {"writer": partial(job.save, 5), "next": partial(take_over, world, full=full)}


def own_retention(world: World) -> Acts:
    """Retention beside saves of the same job, which holds no useless byte of its own epoch."""
    job = Job(world, "writer", keep=Keep(last=1, max_grace_bytes=0))
    job.restore()
    job.save(5)

    def passes() -> None:
        for _ in range(2):
            job.retain()
            world.pause()

    def saves() -> None:
        for step in (6, 7):
            job.save(step)

    return {"writer": saves, "retention": passes}


def lost_answer(world: World) -> Acts:
    """The last save of a job was committed, and the answer was lost: the next one refers to the checkpoint before it."""
    job = Job(world, "writer", keep=Keep(last=1, max_grace_bytes=0))
    job.restore()
    job.save(5, value=9)
    before = job.run.last, job.base
    job.save(6, value=12)
    job.run.last, job.base = before
    assert job.base is not None

    def passes() -> None:
        for _ in range(2):
            job.retain()
            world.pause()

    return {"writer": partial(job.save, 7, value=10), "retention": passes}


def rewind(world: World) -> Acts:
    """A person goes back to a step that a job, which still runs, is about to retire, with all its bytes at once."""
    job = Job(world, "old", keep=Keep(last=1, max_grace_bytes=0))
    job.restore()
    job.save(5, value=9)
    job.save(6, value=12)

    def old() -> None:
        job.retain()
        job.retain()

    def person() -> None:
        other = Job(world, "person")
        other.restore(5)
        other.save(7, value=10)  # as 5, and not as 6

    return {"person": person, "old": old}


def readers(world: World) -> Acts:
    """Somebody reads the newest, and a step by its name, while they are retired."""

    def reads() -> None:
        for which in (3, "latest"):
            try:
                read_checkpoint(world, "reader", which)  # type: ignore[arg-type]
            except CheckpointError:
                continue

    return {"reader": reads, "next": partial(take_over, world, full=True)}


def two_ranks(world: World) -> Acts:
    """Ranks that look for each other's votes in the store; what they leave is completed by the next start."""
    first, second = (Job(world, f"rank {rank}", rank=rank, ranks=2) for rank in range(2))
    first.restore()
    assert first.run.epoch is not None
    second.run.adopt(first.run.epoch, first.run.last)
    second.base = first.base

    def completer() -> None:
        repository = Repository(world.store)
        complete_pending(repository, Catalog(repository))
        take_over(world, full=True)

    # The first rank asks for the other's vote until it is there: it comes after it in each schedule.
    return {"rank 1": partial(second.save, 5, value=6), "next": completer, "rank 0": partial(first.save, 5, value=6)}


SCENARIOS = {
    "a writer is stopped, the next one saves in full": Scenario(partial(stopped_writer, full=True), "writer", "next"),
    "a writer is stopped, the next one refers": Scenario(partial(stopped_writer, full=False), "writer", "next"),
    "retention beside saves": Scenario(own_retention, "writer", "retention"),
    "retention after a lost answer": Scenario(lost_answer, "writer", "retention"),
    "a rewind beside retention": Scenario(rewind, "person", "old"),
    "a reader": Scenario(readers, "reader", "next"),
    "two ranks": Scenario(two_ranks, "rank 1", "rank 0"),
}


def requests_of(scenario: Scenario, stops: Stops, name: str) -> int:
    """How many requests an actor makes when nobody disturbs it."""
    world, n = World(stops, beginning()), 0
    acts = scenario.make(world)
    alone = {name: acts[name]} if name != "rank 0" else acts

    def count(give: Callable[[str], bool], who: str) -> bool:
        nonlocal n
        n += who == name
        return give(who)

    world.turns.give = partial(count, world.turns.give)  # type: ignore[method-assign]
    world.run(alone, [])
    return n


def one_stop(scenario: Scenario, stops: Stops) -> Iterator[Schedule]:
    for n in range(requests_of(scenario, stops, scenario.stopped) + 1):
        yield [(scenario.stopped, n), (scenario.beside, None) if scenario.beside != "rank 0" else ("next", None)]


def two_stops(scenario: Scenario, stops: Stops, every: int = 1) -> Iterator[Schedule]:
    beside = requests_of(scenario, stops, scenario.beside)
    for n in range(requests_of(scenario, stops, scenario.stopped) + 1):
        for m in range((7 * n) % every, beside + 1, every):
            yield [(scenario.beside, m), (scenario.stopped, n), (scenario.beside, None)]
            yield [(scenario.stopped, n), (scenario.beside, m), (scenario.stopped, None)]


def explore(scenario: Scenario, stops: Stops, schedules: Iterator[Schedule]) -> int:
    n = 0
    for schedule in schedules:
        world = World(stops, beginning())
        with pytest.MonkeyPatch.context() as patch:
            for module in (commit, still_ours):
                patch.setattr(module, "seconds_since_boot", world.boot_clock_s)
            try:
                world.run(scenario.make(world), schedule)
                world.judge()
            except BaseException:
                print("schedule", schedule, stops)
                raise
        n += 1
    return n


@pytest.mark.parametrize("stops", BOTH)
@pytest.mark.parametrize("what", SCENARIOS)
def test_what_lives_has_all_its_packs_wherever_somebody_is_stopped(what: str, stops: Stops) -> None:
    assert explore(SCENARIOS[what], stops, one_stop(SCENARIOS[what], stops)) > 5


@pytest.mark.parametrize("what", SCENARIOS)
def test_nor_with_two_stops(what: str) -> None:
    """Some of these schedules, others each time: all of them take minutes."""
    scenario = SCENARIOS[what]
    for stops in BOTH:
        every = random.randrange(60, 120)
        assert explore(scenario, stops, islice(two_stops(scenario, stops, every), 12))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stops", BOTH)
@pytest.mark.parametrize("what", SCENARIOS)
def test_nor_with_any_two_stops(what: str, stops: Stops) -> None:
    """Minutes."""
    explore(SCENARIOS[what], stops, two_stops(SCENARIOS[what], stops))


def save_that_fails(world: World, at: int, *, answer_is_lost: bool) -> bool:
    """Request number `at` of some saves fails; others follow, and what was left is removed. False if there is no such request."""
    job = Job(world, "writer")
    job.restore()
    job.store.requests, job.store.fails_at, job.store.answer_is_lost = 0, at, answer_is_lost
    for step in (5, 5, 6):
        with contextlib.suppress(CheckpointError):  # that request has failed, or the step was saved at once
            job.save(step)
    failed, job.store.fails_at = job.store.requests > at, None
    world.judge()
    for step in (8, 9, 10):
        job.retain()
        world.pause()
        job.save(step)
    world.judge()
    return failed


@pytest.mark.parametrize("answer_is_lost", [False, True])
def test_packs_of_a_save_that_failed_are_never_named(answer_is_lost: bool) -> None:
    failed, at = True, 0
    while failed:
        failed = save_that_fails(World("between requests", beginning()), at, answer_is_lost=answer_is_lost)
        at += 1
    assert at > 8


# -- bug switches: what the protocol does, left out ------------------------------------------------------------------------


def nobody_looks_at_the_base(patch: pytest.MonkeyPatch) -> None:
    """Whoever commits looks neither for the parent nor for the packs that it names."""
    patch.setattr(commit, "require_parent", lambda store, save, parent: None)
    patch.setattr(commit, "packs_at_odds", lambda store, files: [])


def the_look_may_be_old(patch: pytest.MonkeyPatch) -> None:
    """A process that was stopped between its look and the commit does not look again."""
    patch.setattr(World, "boot_clock_s", lambda self: 0.0)


def retention_retires_what_the_next_save_refers_to(patch: pytest.MonkeyPatch) -> None:
    """It keeps the newest checkpoint that lives, not the newest of which this process knows."""
    patch.setattr(incarnation.Incarnation, "_in_use", lambda self: self.in_flight.copy())


def retention_forgets_packs_of_earlier_saves(patch: pytest.MonkeyPatch) -> None:
    original = Collector._all_needed

    def only_own(self: Collector, commits: Any) -> set[str] | None:
        kept = list(commits)
        found = original(self, kept)
        return found and {key for key in found if parse_pack(key) in {one.save for one in kept}}

    patch.setattr(Collector, "_all_needed", only_own)


def the_grace_counts_from_the_save_that_wrote_the_pack(patch: pytest.MonkeyPatch) -> None:
    original = retention.plan_retention

    def plan(view: Any, *rest: Any, **more: Any) -> Any:
        stones = {c: replace(stone, named={}) for c, stone in view.tombstones.items()}
        return original(replace(view, tombstones=stones), *rest, **more)

    patch.setattr(incarnation, "plan_retention", plan)


def the_cap_takes_packs_of_all_epochs(patch: pytest.MonkeyPatch) -> None:
    original = retention._too_much

    def too_much(view: Any, waits: Any, deleted: Any, cap: int) -> set[str]:
        return {key for key in waits if key not in deleted} | original(view, waits, deleted, cap)

    patch.setattr(retention, "_too_much", too_much)


def a_save_names_what_a_failed_one_has_put(patch: pytest.MonkeyPatch) -> None:
    done: list[Uploaded] = []
    original = incarnation.upload

    def upload(*arguments: Any) -> Uploaded:
        done.append(original(*arguments))
        return done[-1]

    def take(job: Job, state: SealedState) -> None:
        if done and job.base is not None:
            job.base = done[-1].as_base(state, job.base.parent, None, job.world.now_s)

    patch.setattr(incarnation, "upload", upload)
    patch.setattr(Job, "after_failure", staticmethod(take))


@pytest.mark.parametrize(
    ("bug", "where"),
    [
        (nobody_looks_at_the_base, "a rewind beside retention"),
        (the_look_may_be_old, "a writer is stopped, the next one saves in full"),
        (retention_retires_what_the_next_save_refers_to, "retention after a lost answer"),
        (retention_forgets_packs_of_earlier_saves, "a writer is stopped, the next one refers"),
        (the_grace_counts_from_the_save_that_wrote_the_pack, "a reader"),
        (the_cap_takes_packs_of_all_epochs, "a reader"),
        (a_save_names_what_a_failed_one_has_put, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bug_is_found(
    bug: Callable[[pytest.MonkeyPatch], None], where: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginning()
    bug(monkeypatch)
    with pytest.raises((AssertionError, CheckpointError)):
        explore_all(where)


def explore_all(where: str | None) -> None:
    if where is None:
        for answer_is_lost in (True, False):
            for at in range(12):
                save_that_fails(World("between requests", beginning()), at, answer_is_lost=answer_is_lost)
        return
    for stops in BOTH:
        explore(SCENARIOS[where], stops, one_stop(SCENARIOS[where], stops))
