"""What retention may do: properties of the pure plan, and passes over a store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.errors import CorruptCheckpointError, ObjectNotFoundError, StoreAccessError
from fastckpt.format.keys import CheckpointId, SaveId, commit_key, pack_key, pin_key
from fastckpt.format.repository_records import Commit, Pin, Tombstone, pin_bytes, utc_now
from fastckpt.repository.collector import Collector
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import (
    Candidate,
    Keep,
    Pins,
    RepositoryView,
    RetentionPlan,
    TombstoneSeen,
    plan_retention,
)
from fastckpt.repository.vote_set import VoteSetState
from fastckpt.store.memory import MemoryStore
from tests.support.keeping import keeps
from tests.support.repositories import begin, check_all, flip, keys_of, living, reuse, save_steps, vote
from tests.support.states import rich_state, sealed

GRACE_S = 100.0


@st.composite
def views(draw: st.DrawFn) -> tuple[RepositoryView, set[SaveId]]:
    """Any repository that a pass may see: living, dead, unfinished and unreadable steps of three epochs, packs that several need."""
    ids = draw(st.lists(st.builds(CheckpointId, st.integers(1, 3), st.integers(0, 5)), unique=True, max_size=10))
    kinds = {c: draw(st.sampled_from(["living", "dead", "unfinished", "unreadable"])) for c in ids}
    now_s = 1000.0
    times = {c: draw(st.floats(0, now_s)) for c in ids}
    saves = [SaveId(*c, draw(st.integers(0, 1))) for c in ids]
    packs = {save: [pack_key(save, 0, n) for n in range(draw(st.integers(0, 2)))] for save in saves}
    every_pack = sorted(key for some in packs.values() for key in some)
    hidden = any(kind == "unreadable" for kind in kinds.values())
    needed = None if hidden else set(draw(st.lists(st.sampled_from(every_pack)))) if every_pack else set()
    living = {c: _commit(c) for c, kind in kinds.items() if kind == "living"}
    order = draw(st.permutations(sorted(living, reverse=True)))
    inside = sorted(order[: draw(st.integers(0, len(order)))], reverse=True)
    view = RepositoryView(
        newest_epoch=draw(st.integers(1, 3)),
        history=[Candidate(c, {}) for c in inside],
        living=living,
        tombstones={c: TombstoneSeen(times[c]) for c, kind in kinds.items() if kind == "dead"},
        commit_times_s={c: times[c] for c, kind in kinds.items() if kind in ("living", "dead")},
        unreadable={c for c, kind in kinds.items() if kind == "unreadable"},
        votes={save: [f"vote of {save}"] for save in saves},
        vote_sets={save: draw(st.sampled_from(VoteSetState)) for save in saves},
        packs=packs,
        needed=needed,
        pins=Pins(set(draw(st.lists(st.sampled_from(ids)))) if ids else set()),
        now_s=now_s,
    )
    return view, set(draw(st.lists(st.sampled_from(saves), max_size=2))) if saves else set()


def _commit(checkpoint: CheckpointId) -> Commit:
    return Commit(SaveId(*checkpoint, 0), 1, None, "manual", {}, {}, 0, 0, 0.0, "", (), {}, "")


@given(views(), st.none() | keeps, st.booleans(), st.booleans())
def test_a_plan_hurts_nothing_that_lives(
    world: tuple[RepositoryView, set[SaveId]], keep: Keep | None, abandoned: bool, stopped: bool
) -> None:
    view, flying = world
    found = plan_retention(view, keep, flying, GRACE_S, abandoned=abandoned, stopped=stopped)
    retired = {c for c, _ in found.retire}
    stays = view.living.keys() - retired
    if view.history:
        assert view.history[0].checkpoint not in retired, "the newest"
    assert not retired & {c for c in view.pins.checkpoints if c in view.living}, "pins"
    assert not retired & {save.checkpoint for save in flying}
    assert not retired & set(view.unreadable)
    if keep is None:
        assert not retired & view.living.keys()
    if not abandoned:
        assert retired & view.living.keys() <= {c.checkpoint for c in view.history}, "branches are nobody's business"
    owner = {key: save for save, some in view.packs.items() for key in some}
    for key in found.delete:
        if key in owner:
            assert view.needed is not None, "it is not known what the unreadable ones need"
            assert key not in view.needed
            assert owner[key] not in flying
            checkpoint = owner[key].checkpoint
            # Only once the commit key says that it is over, for so long, by the store's own clock.
            tombstone = view.tombstones.get(checkpoint)
            over_s = view.commit_times_s.get(checkpoint, view.now_s) if tombstone is None else tombstone.written_s
            assert view.now_s - over_s >= GRACE_S
        elif key.startswith("vote of "):
            save = next(save for save, some in view.votes.items() if key in some)
            assert save not in flying
            assert save.checkpoint not in stays or view.living[save.checkpoint].save != save
        else:
            checkpoint = next(c for c in view.tombstones if commit_key(c) == key)
            packs = {k for save, some in view.packs.items() if save.checkpoint == checkpoint for k in some}
            assert packs <= set(found.delete), "a tombstone is the last of its checkpoint to go"
            assert checkpoint.epoch < view.newest_epoch or stopped


def test_votes_go_before_packs_before_tombstones() -> None:
    dead = CheckpointId(1, 1)
    save = SaveId(1, 1, 0)
    view = RepositoryView(
        newest_epoch=2,
        history=[],
        living={},
        tombstones={dead: TombstoneSeen(0.0)},
        commit_times_s={},
        unreadable=(),
        votes={save: ["vote"]},
        vote_sets={},
        packs={save: [pack_key(save, 0, 0)]},
        needed=set(),
        pins=Pins(expired=["pin"]),
        now_s=GRACE_S,
    )
    assert plan_retention(view, None, (), GRACE_S).delete == [
        "vote",
        pack_key(save, 0, 0),
        commit_key(dead),
        "pin",
    ]


def collect(store: MemoryStore, keep: Keep, grace_s: float = 0.0) -> list[str]:
    collector = Collector(Repository(store))
    todo = plan_retention(collector.look(), keep, (), grace_s)
    collector.run(todo, None)
    return todo.notes


def steps(store: MemoryStore) -> list[int]:
    return sorted(c.step for c in living(store))


def test_packs_that_a_living_checkpoint_shares_stay() -> None:
    store = MemoryStore()
    save_steps(store, [1])
    reuse(store, 1, 2)
    packs = keys_of(store, "data/")
    for _ in range(3):
        collect(store, Keep(last=1))
    assert steps(store) == [2]
    assert keys_of(store, "data/") == packs
    check_all(store)


def pin(store: MemoryStore, step: int, expires_s: int) -> None:
    store.put(pin_key("reader"), pin_bytes(Pin(CheckpointId(1, step), expires_s, "a reader", utc_now())))


def test_a_pin_keeps_and_expires() -> None:
    now_s = [0.0]
    store = MemoryStore(clock=lambda: now_s[0])
    save_steps(store, [1, 2, 3])
    pin(store, 1, 60)
    assert any("pinned" in words for words in collect(store, Keep(last=1)))
    assert steps(store) == [1, 3]
    now_s[0] = 61.0
    vote(store, 1, 3, 0, 1, rich_state(4, 100), attempt=1)  # the store's clock is read off what it writes
    collect(store, Keep(last=1))
    assert keys_of(store, "pins/") == []
    collect(store, Keep(last=1))
    assert steps(store) == [3]
    check_all(store)


def test_grace_is_counted_from_the_tombstone() -> None:
    now_s = [0.0]
    store = MemoryStore(clock=lambda: now_s[0])
    save_steps(store, [1, 2])
    old = keys_of(store, "data/000001-000000000001-000/")
    now_s[0] = 500.0
    collect(store, Keep(last=1), GRACE_S)
    now_s[0] = 500.0 + GRACE_S - 1
    vote(store, 1, 3, 0, 1, rich_state(3, 100))
    collect(store, Keep(last=1), GRACE_S)
    assert set(old) <= set(keys_of(store, "data/")), "somebody may be reading them"
    now_s[0] = 500.0 + GRACE_S
    vote(store, 1, 3, 0, 1, rich_state(4, 100), attempt=1)
    collect(store, Keep(last=1), GRACE_S)
    assert not set(old) & set(keys_of(store, "data/"))
    check_all(store)


def test_an_unreadable_record_keeps_every_pack() -> None:
    store = MemoryStore()
    save_steps(store, [1, 2, 3])
    flip(store, commit_key(CheckpointId(1, 1)))
    packs = keys_of(store, "data/")
    notes = collect(store, Keep(last=1))
    assert keys_of(store, "data/") == packs
    assert any("no pack is deleted" in words for words in notes)


def test_only_the_newest_epoch_collects() -> None:
    store = MemoryStore()
    save_steps(store, [1, 2, 3])
    collector = Collector(Repository(store))
    todo = plan_retention(collector.look(), Keep(last=1), (), 0.0)
    begin(store, 1, None)
    collector.run(todo, 1)
    assert steps(store) == [1, 2, 3]


class Locked(MemoryStore):
    """Some objects cannot be deleted (a legal hold)."""

    def __init__(self, now_s: list[float]) -> None:
        super().__init__(clock=lambda: now_s[0])
        self.held: set[str] = set()
        self.asked: list[str] = []

    def delete(self, key: str) -> None:
        if key in self.held:
            self.asked.append(key)
            raise StoreAccessError(f"{key} is under legal hold")
        super().delete(key)


def test_one_object_that_cannot_be_deleted_keeps_no_other_and_is_told_once() -> None:
    now_s = [0.0]
    store = Locked(now_s)
    job = save_steps(store, [1])
    store.held = set(keys_of(store, "votes/"))
    told = []
    for step in range(2, 9):
        job.save(sealed(rich_state(step, 100)), step)
        now_s[0] += 10.0
        told += job.retain(Keep(last=1), 0.0).refused
    assert [str(error) for error in told] == [f"{key} is under legal hold" for key in store.held]
    assert store.asked == list(store.held)
    assert steps(store) == [8]
    assert len(keys_of(store, "data/")) <= 2
    assert set(keys_of(store, "votes/")) == store.held | set(keys_of(store, "votes/000001-000000000008-000/"))
    assert commit_key(CheckpointId(1, 1)) in keys_of(store, "commits/"), "or it would count as an unfinished save"


def test_an_object_whose_deletion_was_refused_for_a_while_is_deleted_later() -> None:
    store = Locked(now_s := [0.0])
    job = save_steps(store, [1])
    store.held = set(keys_of(store, "votes/"))
    for step in range(2, 24):
        job.save(sealed(rich_state(step, 100)), step)
        now_s[0] += 10.0
        job.retain(Keep(last=1), 0.0)
        store.held = store.held if step < 5 else set()
    assert len(store.asked) == 1
    assert not [key for key in keys_of(store, "votes/") if key.startswith("votes/000001-000000000001-")]


def test_votes_that_contradict_each_other_stop_nothing_else() -> None:
    store = MemoryStore()
    job = save_steps(store, [1, 2, 3])
    vote(store, 1, 2, 0, 1, rich_state(9, 100), attempt=1)
    vote(store, 1, 2, 0, 1, rich_state(8, 100), attempt=1)
    vote(store, 1, 7, 0, 2, rich_state(8, 100))
    vote(store, 1, 7, 0, 2, rich_state(9, 100))
    for _ in range(2):
        job.retain(Keep(last=1), 0.0)
    assert steps(store) == [3]
    assert not keys_of(store, "data/000001-000000000001-000/")
    check_all(store)


def test_a_record_that_cannot_be_read_when_it_is_to_be_retired_keeps_no_other() -> None:
    store = MemoryStore()
    save_steps(store, [1, 2, 3])
    collector = Collector(Repository(store))
    todo = plan_retention(collector.look(), Keep(last=1), (), 0.0)
    flip(store, commit_key(CheckpointId(1, 1)))
    (refused,) = collector.run(todo, None)
    assert isinstance(refused, CorruptCheckpointError)
    assert isinstance(Repository(store).commit(CheckpointId(1, 2)), Tombstone)


def test_a_tombstone_of_the_living_epoch_goes_a_grace_after_all_of_its_checkpoint() -> None:
    now_s = [0.0]
    store = MemoryStore(clock=lambda: now_s[0])
    job = save_steps(store, [1, 2])
    seen: dict[str, float] = {}
    for step in range(3, 12):
        now_s[0] += GRACE_S / 2
        job.save(sealed(rich_state(step, 100)), step)
        job.retain(Keep(last=1), GRACE_S)
        for what, prefix in (("pack", "data/000001-000000000001"), ("tombstone", "commits/000001-000000000001")):
            if not any(key.startswith(prefix) for key in keys_of(store, "")):
                seen.setdefault(what, now_s[0])
    assert seen["tombstone"] >= seen["pack"] + GRACE_S
    check_all(store)


def test_one_over_a_save_that_was_never_committed_stays_while_its_epoch_lives() -> None:
    now_s = [0.0]
    store = MemoryStore(clock=lambda: now_s[0])
    job = save_steps(store, [1])
    vote(store, 1, 2, 0, 2, rich_state(2, 100))  # the other rank's never came
    for step in range(3, 12):
        now_s[0] += 2 * GRACE_S
        job.save(sealed(rich_state(step, 100)), step)
        job.retain(Keep(last=1), GRACE_S)
    assert not keys_of(store, "data/000001-000000000002-000/")
    assert commit_key(CheckpointId(1, 2)) in keys_of(store, "commits/")


@pytest.mark.parametrize("what", ["epochs/000001.json", commit_key(CheckpointId(1, 2))])
def test_nothing_goes_while_a_record_is_missing(what: str) -> None:
    store = MemoryStore()
    save_steps(store, [1, 2, 3])
    collector = Collector(Repository(store))
    collector.look()
    store.delete(what)
    before = keys_of(store, "")
    todo = plan_retention(collector.look(), Keep(last=1), (), 0.0)
    assert what in todo.warnings[0]
    collector.run(todo, None)
    assert keys_of(store, "") == before


def test_a_record_that_only_the_list_shows_keeps_packs() -> None:
    class Contradicting(MemoryStore):
        hidden = ""

        def _find(self, key: str) -> tuple[bytes, float]:
            if key == self.hidden:
                raise ObjectNotFoundError(key)
            return super()._find(key)

    store = Contradicting()
    save_steps(store, [1, 2, 3])
    store.hidden = commit_key(CheckpointId(1, 2))
    packs = keys_of(store, "data/")
    collect(store, Keep(last=1))
    collect(store, Keep(last=1))
    assert keys_of(store, "data/") == packs


def test_a_pin_that_cannot_be_read_retires_nothing() -> None:
    store = MemoryStore()
    save_steps(store, [1, 2, 3])
    pin(store, 1, 60)
    flip(store, pin_key("reader"))
    assert any("a pin cannot be read" in words for words in collect(store, Keep(last=1)))
    assert steps(store) == [1, 2, 3]


def test_a_new_epoch_between_two_batches_ends_the_pass() -> None:
    store = MemoryStore()
    save_steps(store, [1, 2])
    collector = Collector(Repository(store))
    doomed = [f"data/000001-000000000001-000/r00000/{n:06}.pack" for n in range(250)]
    for key in doomed:
        store.put(key, b"")
    todo = RetentionPlan(delete=doomed)
    original = store.delete

    def delete(key: str) -> None:
        original(key)
        if key == doomed[0]:
            begin(store, 1, None)

    store.delete = delete  # type: ignore[method-assign]
    collector.run(todo, 1)
    assert len(set(doomed) & set(keys_of(store, "data/"))) == 150


def test_what_is_in_flight_is_asked_again_before_anything_goes() -> None:
    store = MemoryStore()
    save_steps(store, [1, 2, 3])
    collector = Collector(Repository(store))
    todo = plan_retention(collector.look(), Keep(last=1), (), 0.0)
    collector.run(todo, 1, lambda: [SaveId(1, 1, 0)])
    assert steps(store) == [1, 3]
    assert keys_of(store, "votes/000001-000000000001-000/")
