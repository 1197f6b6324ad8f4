"""What the votes of one try are, said once: committing, retention and a person's tools go by the same answer."""

from __future__ import annotations

import itertools

from fastckpt.format.keys import CheckpointId, SaveId, VoteName
from fastckpt.repository.collector import Collector
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep, plan_retention
from fastckpt.repository.vote_set import VoteSetState, vote_set_of
from fastckpt.store.memory import MemoryStore
from tests.support.repositories import begin, save_steps, vote
from tests.support.states import rich_state


def test_complete_incomplete_or_contradictory() -> None:
    """Every set of up to three votes of a small world."""
    names = [
        VoteName(SaveId(1, 7, 0), rank, world, 1, digest * 32)
        for world in (1, 2, 3)
        for rank in range(world)
        for digest in "ab"
    ]
    for n in range(4):
        for some in itertools.combinations(names, n):
            found = vote_set_of(reversed(some))
            ranks = [name.rank for name in some]
            contradictory = len({name.world for name in some}) > 1 or len(set(ranks)) < len(ranks)
            complete = bool(some) and set(ranks) == set(range(some[0].world))
            assert found.state is (
                VoteSetState.CONTRADICTORY
                if contradictory
                else VoteSetState.COMPLETE
                if complete
                else VoteSetState.INCOMPLETE
            )
            assert [name.rank for name in found.votes] == sorted(ranks)
            assert bool(found.why) == contradictory


def test_votes_that_contradict_each_other_stay_while_they_are_the_newest() -> None:
    """One answer for all: what `try_commit` refuses for ever, retention does not hold for a save that can still be completed."""
    store = MemoryStore()
    save_steps(store, [1])
    for seed in (0, 1):
        vote(store, 1, 2, 0, 1, rich_state(seed, 100))
    collector = Collector(Repository(store))
    view = collector.look()
    assert view.vote_sets[SaveId(1, 2, 0)] is VoteSetState.CONTRADICTORY
    found = plan_retention(view, Keep(last=1), (), 0.0)
    assert not found.retire
    assert any("contradict each other" in words for words in found.notes)
    stopped = plan_retention(view, Keep(last=1), (), 0.0, stopped=True)
    assert stopped.retire == [(CheckpointId(1, 2), "unfinished save")]
    save_steps(store, [3])
    assert (CheckpointId(1, 2), "unfinished save") in plan_retention(collector.look(), Keep(last=1), (), 0.0).retire


def test_votes_that_disagree_about_the_world_stay_too() -> None:
    store = MemoryStore()
    begin(store, 3)
    vote(store, 1, 7, 0, 2, rich_state(0, 100))
    vote(store, 1, 7, 1, 3, rich_state(1, 100))
    begin(store, 3)
    found = plan_retention(Collector(Repository(store)).look(), Keep(last=1), (), 0.0)
    assert not found.retire
    assert any("contradict each other" in words for words in found.notes)
