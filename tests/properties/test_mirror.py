"""Whatever origin, copy and failures do, a copy has only whole checkpoints of its origin, and a mirror that ends brings its history."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.errors import NoCheckpointError, RepositoryError, StoreUnavailableError
from fastckpt.format.keys import CheckpointId, commit_key
from fastckpt.options import Options
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.memory import MemoryStore
from fastckpt.testing.faulty_store import FaultyStore
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.upkeep.mirror.mirror import mirror
from fastckpt.upkeep.mirror.plan import MirrorAsked
from tests.support.repositories import check_all, history, incarnation, living, reuse
from tests.support.states import sealed, small_state

ONE = Options(threads=1, connections=1)


class Origin:
    """A job, and all that it has ever committed."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.job: Incarnation = incarnation(self.store)
        self.job.choose_and_claim()
        self.records: dict[CheckpointId, bytes] = {}

    @property
    def next_step(self) -> int:
        return 1 if self.job.last is None else self.job.last.checkpoint.step + 1

    def save(self) -> None:
        self.job.save(sealed(small_state(self.next_step)), self.next_step)
        self.note()

    def reuse(self) -> None:
        """A checkpoint whose vote names packs of the one before it."""
        assert self.job.epoch is not None
        last = self.job.last
        if last is not None and last.checkpoint.epoch == self.job.epoch.number:
            reuse(self.store, last.checkpoint.step, last.checkpoint.step + 1, self.job.epoch.number)
            self.note()
            self.restart()

    def restart(self) -> None:
        if history(self.store):
            self.job = incarnation(self.store)
            self.job.choose_and_claim()

    def rewind(self) -> None:
        found = history(self.store)
        if found:
            self.job = incarnation(self.store)
            self.job.choose_and_claim(found[-1])

    def fresh(self) -> None:
        self.job = incarnation(self.store)
        self.job.begin(fresh=True)

    def retain(self) -> None:
        self.job.retain(Keep(last=2), grace_s=0.0)

    def note(self) -> None:
        for checkpoint in living(self.store):
            self.records[checkpoint] = self.store.get(commit_key(checkpoint))


def mirrored(origin: Origin, copy: MemoryStore, how: dict[str, Any]) -> None:
    """One mirror, perhaps with a failure; what it leaves is looked at."""
    failing = how.pop("fails_at")
    side = FaultyStore(copy, lambda number, verb, key: number == failing, mode=how.pop("mode"))
    try:
        mirror(origin.store, side, MirrorAsked(**how), ONE)
        ended = True
    except (StoreUnavailableError, NoCheckpointError):
        ended = False
    check_all(copy)
    if living(copy):
        assert not check_repository(Repository(copy), quick=True).findings
    for checkpoint in living(copy):
        assert copy.get(commit_key(checkpoint)) == origin.records[checkpoint]
    if ended:
        there, here = history(origin.store), history(copy)
        assert here[:1] == there[:1]
        if how["last"] is None:
            assert set(there) <= set(here)
        if how["prune"] and there:
            assert all(c in living(origin.store) or c > max(living(origin.store)) for c in living(copy))


ACTS = ["save", "save", "save", "reuse", "restart", "rewind", "fresh", "retain"]
MIRRORS = st.fixed_dictionaries(
    {
        "last": st.sampled_from([None, None, 1, 2]),
        "branches": st.booleans(),
        "prune": st.booleans(),
        "contents": st.booleans(),
        "fails_at": st.one_of(st.none(), st.integers(0, 60)),
        "mode": st.sampled_from(["before", "after"]),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(ACTS), MIRRORS), max_size=10), MIRRORS, st.booleans())
def test_a_copy_follows_its_origin(acts: list[str | dict[str, Any]], last: dict[str, Any], goes_on: bool) -> None:
    origin, copy = Origin(), MemoryStore()
    for act in acts:
        if isinstance(act, str):
            getattr(origin, act)()
        else:
            mirrored(origin, copy, dict(act))
    mirrored(origin, copy, {**last, "fails_at": None})
    if not goes_on or Repository(copy).marker() is None:
        return
    if history(copy) and history(origin.store):
        incarnation(copy).choose_and_claim()
        before = {info.key for info in copy.list("")}
        with pytest.raises(RepositoryError, match="gone on"):
            mirror(origin.store, copy, options=ONE)
        assert {info.key for info in copy.list("")} == before
