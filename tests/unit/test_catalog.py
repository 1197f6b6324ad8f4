"""Which checkpoint comes next: against a model written from docs/guarantees.md, section 3, and by example."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.errors import CorruptCheckpointError, NoCheckpointError, RetiredError
from fastckpt.format.keys import COMMITS, CheckpointId, commit_key
from fastckpt.format.repository_records import Commit, Epoch, Parent, Tombstone, tombstone_bytes, utc_now
from fastckpt.repository.catalog import Catalog, history
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.base import ObjectInfo
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from tests.support.repositories import IN_PARALLEL, flip, keys_of, save_steps
from tests.support.states import rich_state, sealed


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[int, Epoch], list[CheckpointId]]:
    """Epochs 1 … n, each with any parent of an earlier one, some without a record; commits of any steps, some of them parents."""
    n = draw(st.integers(1, 6))
    steps = st.integers(0, 5)
    epochs: dict[int, Epoch] = {}
    commits: list[CheckpointId] = []
    for number in range(1, n + 1):
        earlier = draw(st.none() | st.builds(CheckpointId, st.integers(1, number - 1), steps)) if number > 1 else None
        parent = None if earlier is None else Parent(earlier, "0" * 32)
        fresh = parent is None and draw(st.booleans())
        if draw(st.integers(0, 9)):
            epochs[number] = Epoch(number, parent, fresh, draw(st.booleans()), (), 1, "0" * 32, "")
        commits += [CheckpointId(number, step) for step in draw(st.sets(steps, max_size=4))]
    return epochs, commits


def model(
    number: int, most: float, named: bool, epochs: dict[int, Epoch], commits: set[CheckpointId]
) -> list[CheckpointId]:
    """ "From the highest epoch: its commits, highest step first; then the parent its record names; then the commits of the parent's
    epoch with steps up to the parent's; and so on." """
    if number == 0:
        return []
    own = sorted((c for c in commits if c.epoch == number), reverse=True)
    found = [c for c in own if c.step <= most]
    epoch = epochs.get(number)
    passed_over = not own and not named and (epoch is None or not (epoch.rewind or epoch.fresh))
    if epoch is None or passed_over:
        return found + model(number - 1, float("inf"), False, epochs, commits)
    if epoch.parent is not None:
        parent = epoch.parent.checkpoint
        return found + model(parent.epoch, parent.step, True, epochs, commits)
    return found if epoch.fresh else found + model(number - 1, float("inf"), False, epochs, commits)


@given(worlds())
def test_history_is_the_documents(world: tuple[dict[int, Epoch], list[CheckpointId]]) -> None:
    epochs, commits = world
    newest = max([*epochs, *(c.epoch for c in commits)], default=0)
    found = list(history(newest, epochs.get, commits))
    assert found == model(newest, float("inf"), False, epochs, set(commits))
    assert len(set(found)) == len(found)
    assert found == list(history(newest, epochs.get, reversed(commits)))


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    save_steps(store, [1, 2, 3])
    return store


def catalog(store: MemoryStore) -> Catalog:
    return Catalog(Repository(store))


def bury(store: MemoryStore, step: int) -> None:
    checkpoint = CheckpointId(1, step)
    store.put(commit_key(checkpoint), tombstone_bytes(Tombstone(checkpoint, None, "retention", utc_now())))


def damage(store: MemoryStore, step: int) -> None:
    flip(store, next(key for key in keys_of(store, "votes/") if f"-{step:012}-" in key))


def test_choosing(store: MemoryStore) -> None:
    found = catalog(store).choose()
    assert found is not None
    assert found.commit.save.step == 3
    second = catalog(store).choose(2)
    assert second is not None
    assert second.commit.save.step == 2
    by_name = catalog(store).choose(CheckpointId(1, 1))
    assert by_name is not None
    assert by_name.commit.save.step == 1
    with pytest.raises(NoCheckpointError, match="4"):
        catalog(store).choose(4)


def test_nothing_was_ever_saved() -> None:
    store = MemoryStore()
    Repository(store).initialise()
    assert catalog(store).choose() is None
    assert catalog(store).choose("latest-valid") is None
    with pytest.raises(NoCheckpointError):
        catalog(store).choose(1)


def test_tombstones_are_passed_over(store: MemoryStore) -> None:
    bury(store, 3)
    found = catalog(store).choose()
    assert found is not None
    assert found.commit.save.step == 2
    with pytest.raises(NoCheckpointError):
        catalog(store).choose(3)


def test_damage_is_an_error_that_names_the_newest_complete_step(store: MemoryStore) -> None:
    damage(store, 3)
    damage(store, 2)
    with pytest.raises(CorruptCheckpointError, match="step 1") as caught:
        catalog(store).choose()
    assert "latest-valid" in str(caught.value)
    found = catalog(store).choose("latest-valid")
    assert found is not None
    assert found.commit.save.step == 1
    assert [skipped.checkpoint.step for skipped in found.skipped] == [3, 2]


def test_an_unreadable_record_is_not_passed_over_in_silence(store: MemoryStore) -> None:
    flip(store, commit_key(CheckpointId(1, 3)))
    with pytest.raises(CorruptCheckpointError):
        catalog(store).choose()
    found = catalog(store).choose("latest-valid")
    assert found is not None
    assert found.commit.save.step == 2


def test_all_are_damaged(store: MemoryStore) -> None:
    for step in (1, 2, 3):
        damage(store, step)
    for step in ("latest", "latest-valid"):  # type: ignore[assignment]
        with pytest.raises((CorruptCheckpointError, NoCheckpointError)):
            catalog(store).choose(step)


def test_a_rewind_leaves_a_branch(store: MemoryStore) -> None:
    job = Incarnation(Repository(store), IN_PARALLEL)
    job.choose_and_claim(1)
    assert [c.step for c in catalog(store).history()] == [1], "even before its first save"
    job.save(sealed(rich_state(9)), 2)
    assert list(catalog(store).history()) == [CheckpointId(2, 2), CheckpointId(1, 1)]
    assert catalog(store).branches() == [CheckpointId(1, 3), CheckpointId(1, 2)]
    old = catalog(store).choose(3)
    assert old is not None
    assert old.commit.checkpoint == CheckpointId(1, 3), "a step of a branch is found by its number"


class SavesMeanwhile(Wrapper):
    """A job saves on, and retires, between each listing of commits and what is read after it; `rounds` times."""

    def __init__(self, inner: MemoryStore, job: Incarnation, rounds: int, keep: Keep) -> None:
        super().__init__(inner)
        self.step = 0
        self._job, self._rounds, self._keep = job, rounds, keep

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found = list(self.inner.list(prefix))
        if prefix == COMMITS and self._rounds:
            self._rounds -= 1
            self.save()
        return iter(found)

    def save(self) -> None:
        for _ in range(2):
            self.step += 1
            self._job.save(sealed(rich_state(self.step)), self.step)
        self._job.retain(self._keep, grace_s=3600.0)


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_what_was_kept_of_old_is_not_taken_for_the_newest(rounds: int) -> None:
    """All that was listed has been retired since, but step 3 is kept for good: a reader beside the job gets the newest all the same."""
    inner = MemoryStore()
    job = Incarnation(Repository(inner), IN_PARALLEL)
    job.choose_and_claim()
    store = SavesMeanwhile(inner, job, rounds, Keep(last=1, every=3))
    store.save()
    store.save()
    assert store.step == 4
    choice = Catalog(Repository(store)).choose()
    assert choice is not None
    # At most as old as what was listed last.
    assert choice.commit.save.step >= store.step - 2
    assert isinstance(job.repository.commit(choice.commit.checkpoint), Commit)


def test_a_job_that_retires_faster_than_anybody_reads() -> None:
    inner = MemoryStore()
    job = Incarnation(Repository(inner), IN_PARALLEL)
    job.choose_and_claim()
    store = SavesMeanwhile(inner, job, 1000, Keep(last=1))
    store.save()
    with pytest.raises(RetiredError, match="a newer checkpoint exists"):
        Catalog(Repository(store)).choose()


def test_debris_newer_than_all_is_no_reason_to_look_for_ever(store: MemoryStore) -> None:
    """A tombstone of a save that never was: nothing changes, so the checkpoint behind it is the newest."""
    newest = Catalog(Repository(store)).choose()
    assert newest is not None
    bury(store, newest.commit.save.step + 1)
    assert Catalog(Repository(store)).choose() == newest
