"""`upkeep/mirror`: what travels, in which order, and what is refused; killed and failing mirrors leave whole checkpoints."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastckpt.errors import (
    CorruptCheckpointError,
    NoCheckpointError,
    RepositoryError,
    RetiredError,
    StoreAccessError,
    StoreUnavailableError,
    TooLargeError,
)
from fastckpt.format import keys
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import CheckpointId, SaveId, commit_key, vote_key
from fastckpt.format.repository_records import parse_pin
from fastckpt.options import Options
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.pinning import EXPIRES_S, Pinning
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.testing.faulty_store import FaultyStore
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.upkeep.mirror.mirror import mirror
from fastckpt.upkeep.mirror.plan import MirrorAsked
from fastckpt.upkeep.mirror.transfer import Transfer
from tests.support.repositories import (
    IN_PARALLEL,
    as_parent,
    check_all,
    commit_of,
    flip,
    history,
    incarnation,
    keys_of,
    living,
    place_vote,
    read,
    reuse,
    save_ranks,
    save_shared,
    shared,
)
from tests.support.states import same, sealed, small_state


def save_steps(store: Store, steps: list[int]) -> Incarnation:
    job = incarnation(store)
    job.choose_and_claim()
    for step in steps:
        job.save(sealed(small_state(step)), step)
    return job


def copied(source: Store, target: Store, **asked: object) -> list[int]:
    return [c.step for c in mirror(source, target, MirrorAsked(**asked), IN_PARALLEL).copied]  # type: ignore[arg-type]


def require_equal(source: Store, target: Store) -> None:
    """Every living checkpoint of the target is the source's, bit for bit, and `check` has nothing to say."""
    check_all(target)
    assert check_repository(Repository(target)).ok
    for checkpoint, commit in living(target).items():
        assert target.get(commit_key(checkpoint)) == source.get(commit_key(checkpoint))
        for rank in range(commit.world):
            assert same(read(target, commit, rank), read(source, commit, rank))


def test_the_history_is_copied_newest_first_under_its_own_names() -> None:
    source, target = MemoryStore(), MemoryStore()
    save_steps(source, [1, 2, 3])
    assert copied(source, target) == [3, 2, 1]
    require_equal(source, target)
    assert history(target) == history(source)
    assert same(read(target, commit_of(target, 3)), small_state(3))
    theirs, ours = Repository(source).marker(), Repository(target).marker()
    assert theirs is not None
    assert ours is not None
    assert ours.origin is not None
    assert ours.repository != theirs.repository
    assert (ours.origin.repository, ours.origin.url) == (theirs.repository, source.url)
    assert not keys_of(source, keys.PINS)


def test_only_what_is_missing_travels() -> None:
    source, target = MemoryStore(), MemoryStore()
    job = save_steps(source, [1, 2])
    mirror(source, target, options=IN_PARALLEL)
    job.save(sealed(small_state(3)), 3)
    reuse(source, 3, 4)  # names packs of step 3 alone
    watched = FaultyStore(target)
    report = mirror(source, watched, options=IN_PARALLEL)
    assert [c.step for c in report.copied] == [4, 3]
    assert [c.step for c in report.present] == [2, 1]
    written = [key for verb, key in watched.operations if verb in ("put", "put_if_absent") and "probe/" not in key]
    assert [key for key in written if key.startswith(keys.DATA)] == keys_of(source, "data/000001-000000000003-000/")
    assert written.index(commit_key(CheckpointId(1, 4))) > written.index(
        keys_of(source, "votes/000001-000000000004-000/")[0]
    )
    assert len(written) == report.sent_objects + 2  # the two commit records
    again = mirror(source, target, options=IN_PARALLEL)
    assert (again.copied, again.sent_objects, len(again.present)) == ([], 0, 4)
    require_equal(source, target)


def test_one_step_or_the_newest_few() -> None:
    source = MemoryStore()
    save_steps(source, [1, 2, 3])
    assert copied(source, MemoryStore(), step=2) == [2]
    assert copied(source, MemoryStore(), last=2) == [3, 2]
    with pytest.raises(NoCheckpointError, match="step 9"):
        copied(source, MemoryStore(), step=9)
    empty, target = MemoryStore(), MemoryStore()
    Repository(empty).initialise()
    with pytest.raises(NoCheckpointError, match="nothing to copy"):
        copied(empty, target)
    assert not keys_of(target, "")


def test_packs_of_earlier_saves_come_with_the_checkpoint_that_names_them() -> None:
    source, target = MemoryStore(), MemoryStore()
    save_steps(source, [1])
    reuse(source, 1, 2)
    assert copied(source, target, step=2) == [2]
    require_equal(source, target)
    assert keys_of(target, keys.COMMITS) == [commit_key(CheckpointId(1, 2))]


def test_votes_of_all_ranks_and_what_they_share() -> None:
    source, target = MemoryStore(), MemoryStore()
    Repository(source).initialise()
    Repository(source).claim(None, world=2)
    half = 8 << 20
    states = [{"own": torch.full((10,), float(rank)), "all": torch.arange(half / 2)} for rank in (0, 1)]
    shares = {"all": [(0, half), (1, half)]}
    commit = save_shared(source, 1, 1, [shared(state, rank, shares) for rank, state in enumerate(states)])
    assert commit.world == 2
    save_ranks(source, 1, 2, [small_state(1), small_state(2), small_state(3)])
    assert copied(source, target) == [2, 1]
    require_equal(source, target)


def rewound_source() -> MemoryStore:
    """Epoch 1: steps 1 to 3; epoch 2 went back to 1, and has step 2 of its own."""
    source = MemoryStore()
    save_steps(source, [1, 2, 3])
    job = incarnation(source)
    job.choose_and_claim(1)
    job.save(sealed(small_state(7)), 2)
    return source


def test_branches_travel_only_if_they_are_asked_for_and_stay_branches() -> None:
    source, target = rewound_source(), MemoryStore()
    assert mirror(source, target, options=IN_PARALLEL).copied == [CheckpointId(2, 2), CheckpointId(1, 1)]
    assert mirror(source, target, MirrorAsked(branches=True), IN_PARALLEL).copied == [(1, 3), (1, 2)]
    assert history(target) == history(source) == [(2, 2), (1, 1)]
    require_equal(source, target)


def test_a_run_goes_on_from_the_copy_and_the_origin_is_refused_then() -> None:
    source, target = MemoryStore(), MemoryStore()
    old = save_steps(source, [1, 2])
    mirror(source, target, options=IN_PARALLEL)
    job = incarnation(target)
    choice = job.choose_and_claim()
    assert choice is not None
    assert same(read(target, choice.commit), small_state(2))
    before = keys_of(target, "")
    old.save(sealed(small_state(3)), 3)
    with pytest.raises(RepositoryError, match=r"gone on without .* epoch 2"):
        mirror(source, target, options=IN_PARALLEL)
    assert keys_of(target, "") == before
    other = incarnation(source)
    other.choose_and_claim()
    other.save(sealed(small_state(4)), 4)  # both have an epoch 2 now
    with pytest.raises(RepositoryError, match="gone on"):
        mirror(source, target, options=IN_PARALLEL)
    job.save(sealed(small_state(5)), 5)
    check_all(target)
    assert copied(target, MemoryStore()) == [5, 2, 1]  # and that can be mirrored on


def test_a_run_that_begins_at_the_copy_meanwhile_stops_the_mirror() -> None:
    source, target = MemoryStore(), MemoryStore()
    save_steps(source, [1, 2])

    def claim(number: int, verb: str, key: str, when: str) -> None:
        if key == commit_key(CheckpointId(1, 2)) and verb == "put_if_absent" and when == "after":
            incarnation(target).choose_and_claim()

    with pytest.raises(RepositoryError, match="gone on"):
        mirror(source, FaultyStore(target, hook=claim), options=IN_PARALLEL)
    assert [c.step for c in living(target)] == [2]
    check_all(target)


@pytest.mark.parametrize("what", ["itself", "a stranger", "its origin", "a copy of another"])
def test_what_is_no_copy_is_refused_in_words(what: str) -> None:
    source, target = MemoryStore(), MemoryStore()
    save_steps(source, [1])
    if what == "itself":
        target = source
    elif what == "a stranger":
        save_steps(target, [1])
    elif what == "its origin":
        mirror(source, target, options=IN_PARALLEL)
        source, target = target, source
    else:
        another = MemoryStore()
        save_steps(another, [5])
        mirror(another, target, options=IN_PARALLEL)
    before = {key: target.get(key) for key in keys_of(target, "")}
    words = {
        "itself": "same repository",
        "a stranger": "of its own",
        "its origin": "origin of",
        "a copy of another": "copy of another one",
    }
    with pytest.raises(RepositoryError, match=words[what]):
        mirror(source, target, options=IN_PARALLEL)
    assert {key: target.get(key) for key in keys_of(target, "")} == before


def test_damage_on_the_way_is_read_again_and_damage_at_the_source_is_listed() -> None:
    source, target = MemoryStore(), MemoryStore()
    save_steps(source, [1, 2])
    pack = keys_of(source, "data/000001-000000000002-000/")[0]
    whole = source.get(pack)
    reads = 0

    def flip_once(number: int, verb: str, key: str, when: str) -> None:
        nonlocal reads
        if key == pack and verb == "get_into":
            reads += when == "before"
            if when == "before" and reads == 1:
                flip(source, pack)
            elif when == "after":
                source.put(pack, whole)

    assert len(mirror(FaultyStore(source, hook=flip_once), target, options=IN_PARALLEL).copied) == 2
    assert reads == 2
    require_equal(source, target)
    flip(source, pack)
    other = MemoryStore()
    report = mirror(source, other, options=IN_PARALLEL)
    assert [c.step for c in report.copied] == [1]
    ((checkpoint, error),) = report.failed
    assert checkpoint.step == 2
    assert isinstance(error, CorruptCheckpointError)
    assert error.damage[0].place == pack
    check_all(other)


def test_damaged_objects_of_the_copy_are_put_again() -> None:
    source, target = MemoryStore(), MemoryStore()
    save_steps(source, [1, 2])
    mirror(source, target, options=IN_PARALLEL)
    pack = keys_of(target, "data/000001-000000000002-000/")[0]
    vote = keys_of(target, "votes/000001-000000000001-000/")[0]
    for key in (pack, vote):
        flip(target, key)
    assert not mirror(source, target, options=IN_PARALLEL).replaced  # lengths are right, and nobody looked further
    report = mirror(source, target, MirrorAsked(contents=True), IN_PARALLEL)
    assert report.replaced == [pack]
    assert report.sent_objects == 2
    require_equal(source, target)
    target.put(pack, b"short")
    target.delete(commit_key(CheckpointId(1, 2)))
    assert mirror(source, target, options=IN_PARALLEL).replaced == [pack]
    require_equal(source, target)


def test_a_pin_holds_what_is_copied_against_retention() -> None:
    source, target = MemoryStore(), MemoryStore()
    job = save_steps(source, [1, 2])
    seen = []

    def retire(number: int, verb: str, key: str, when: str) -> None:
        if verb == "get_into" and key.startswith("data/000001-000000000001-") and when == "before":
            (pin,) = keys_of(source, keys.PINS)
            seen.append(parse_pin(source.get(pin), pin))
            job.retain(Keep(last=1), grace_s=0.0)

    report = mirror(FaultyStore(source, hook=retire), target, options=IN_PARALLEL)
    assert [c.step for c in report.copied] == [2, 1]
    assert {pin.checkpoint for pin in seen} == {CheckpointId(1, 1)}
    assert target.url in seen[0].owner
    assert not keys_of(source, keys.PINS)
    require_equal(source, target)


def test_pins_are_renewed_and_expire() -> None:
    now, store = [0.0], MemoryStore(clock=lambda: now[0])
    with Pinning(store, "me", clock=lambda: now[0]) as pins:
        pins.hold(CheckpointId(1, 1))
        (first,) = store.list(keys.PINS)
        now[0] = EXPIRES_S / 2
        pins.renew()
        (second,) = store.list(keys.PINS)
        assert (first.key, first.modified_s, second.modified_s) == (second.key, 0.0, EXPIRES_S / 2)
        pins.renew()
    assert not keys_of(store, keys.PINS)


def test_what_is_retired_meanwhile_is_left_out_and_the_newest_is_taken_instead() -> None:
    source, target = MemoryStore(), MemoryStore()
    job = save_steps(source, [1])

    def replace(number: int, verb: str, key: str, when: str) -> None:
        vote = vote_key(commit.vote(0))
        if (verb, key, when) == ("head", vote, "before"):
            for pin in keys_of(source, keys.PINS):
                source.delete(pin)
            job.save(sealed(small_state(2)), 2)
            job.retain(Keep(last=1), grace_s=0.0)

    commit = commit_of(source, 1)
    report = mirror(FaultyStore(source, hook=replace), target, MirrorAsked(last=1), IN_PARALLEL)
    assert [c.step for c in report.copied] == [2]
    check_all(target)
    with pytest.raises((RetiredError, NoCheckpointError)):
        copied(source, MemoryStore(), step=1)


class NoPins(FaultyStore):
    """A source that may only be read."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner, lambda number, verb, key: verb in ("put", "delete"), error=StoreAccessError)


def test_a_source_that_may_only_be_read_is_copied_without_a_pin() -> None:
    source, target = MemoryStore(), MemoryStore()
    save_steps(source, [1])
    report = mirror(NoPins(source), target, options=IN_PARALLEL)
    assert [c.step for c in report.copied] == [1]
    assert "without a pin" in report.notes[0]


def test_the_copy_keeps_what_the_source_retires_unless_it_is_to_follow() -> None:
    now = [1e9]
    source, target = MemoryStore(), MemoryStore(clock=lambda: now[0])
    job = save_steps(source, [1, 2])
    mirror(source, target, options=IN_PARALLEL)
    job.save(sealed(small_state(3)), 3)
    job.retain(Keep(last=1), grace_s=0.0)
    assert copied(source, target) == [3]
    assert [c.step for c in history(target)] == [3, 2, 1]
    report = mirror(source, target, MirrorAsked(prune=True), IN_PARALLEL)
    assert [c.step for c in report.retired] == [1, 2]
    assert [c.step for c in history(target)] == [3]
    assert keys_of(target, "data/000001-000000000001-000/")  # readers have a grace
    now[0] += 3 * 7200
    for _ in range(3):
        job.save(sealed(small_state(now_step := int(job.last.checkpoint.step) + 1)), now_step)  # type: ignore[union-attr]
        mirror(source, target, MirrorAsked(prune=True), IN_PARALLEL)
        now[0] += 3 * 7200
    assert not keys_of(target, "data/000001-000000000001-000/")
    check_all(target)


def test_a_source_that_has_lost_its_records_takes_nothing_from_the_copy() -> None:
    source, target = MemoryStore(), MemoryStore()
    save_steps(source, [1, 2, 3])
    mirror(source, target, options=IN_PARALLEL)
    for step in (2, 3):
        source.delete(commit_key(CheckpointId(1, step)))
    report = mirror(source, target, MirrorAsked(prune=True), IN_PARALLEL)
    assert not report.retired
    assert [c.step for c in history(target)] == [3, 2, 1]


def test_a_pack_that_is_too_large_for_memory_is_refused_in_words() -> None:
    source = MemoryStore()
    huge = FileEntry("data/x/big.pack", 65 << 20, 0)
    source.put(huge.key, bytes(65 << 20))
    transfer = Transfer(source, MemoryStore(), Options(max_load_bytes=1 << 20))
    with pytest.raises(TooLargeError, match="FASTCKPT_MAX_LOAD_BYTES"):
        list(transfer.carry([huge], {}))
    claimed = huge._replace(n_bytes=1 << 60)
    with pytest.raises(CorruptCheckpointError, match=str(1 << 60)):
        list(transfer.carry([claimed], {}))


def test_a_vote_that_names_packs_of_a_later_epoch_brings_nothing_there() -> None:
    """A hostile source could otherwise put objects where a run that goes on from the copy will save."""
    source, target = MemoryStore(), MemoryStore()
    save_steps(source, [1])
    reader = open_vote(source, commit_of(source, 1).vote(0))
    (file,) = reader.files
    later = file._replace(key=file.key.replace("data/000001", "data/000009"))
    source.put(later.key, source.get(file.key))
    reader.files = (later,)
    place_vote(source, SaveId(1, 2, 0), reader, parent=as_parent(commit_of(source, 1)))
    assert try_commit(source, SaveId(1, 2, 0)) is not None
    report = mirror(source, target, options=IN_PARALLEL)
    assert [c.step for c in report.copied] == [1]
    ((checkpoint, error),) = report.failed
    assert checkpoint.step == 2
    assert later.key in str(error)
    assert later.key not in keys_of(target, "")


def test_a_disk_at_one_side_does_not_slow_the_other_down(tmp_path: Path) -> None:
    disk, bucket = LocalStore(tmp_path), MemoryStore()
    assert Transfer(bucket, disk, Options(connections=8)).connections == 8
    assert Transfer(disk, bucket, Options(connections=8)).connections == 8
    assert Transfer(disk, disk, Options(connections=8)).connections == 2


@pytest.mark.parametrize("mode", ["before", "after"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_any_failing_operation_leaves_whole_checkpoints_and_the_next_run_finishes(side: str, mode: str) -> None:
    source = MemoryStore()
    save_steps(source, [1])
    reuse(source, 1, 2)

    def run(fail_at: int | None, target: Store) -> FaultyStore:
        faulty = FaultyStore(
            source if side == "source" else target,
            lambda number, verb, key: number == fail_at,
            mode=mode,  # type: ignore[arg-type]
        )
        mirror(
            faulty if side == "source" else source,
            faulty if side == "target" else target,
            options=Options(threads=1, connections=1),
        )
        return faulty

    operations = len(run(None, MemoryStore()).operations)
    assert operations > 8
    for number in range(operations):
        target = MemoryStore()
        with contextlib.suppress(StoreUnavailableError):
            run(number, target)
        check_all(target)
        mirror(source, target, options=IN_PARALLEL)
        require_equal(source, target)
        assert history(target) == history(source)


def forked(act: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_killed_at_random_the_copy_has_whole_checkpoints_and_a_second_run_finishes(tmp_path: Path) -> None:
    """SIGKILL of a child at ten operations of the target, drawn at random, while others are under way; a run from there ends with all."""
    source = LocalStore(tmp_path / "source")
    save_steps(source, [1, 2])
    counting = FaultyStore(LocalStore(tmp_path / "count"))
    one = Options(threads=1, connections=1)
    mirror(source, counting, options=one)
    changing = [n for n, (verb, _) in enumerate(counting.operations) if verb in ("put", "put_if_absent")]
    rng = random.Random(7)
    for turn, at in enumerate(rng.sample(changing, 10 if len(changing) > 10 else len(changing))):
        root = tmp_path / f"copy-{turn}"

        def kill(
            number: int, verb: str, key: str, when: str, at: int = at, moment: str = rng.choice(("before", "after"))
        ) -> None:
            if number == at and when == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        status = forked(lambda: mirror(source, FaultyStore(LocalStore(root), hook=kill), options=IN_PARALLEL))  # noqa: B023
        assert os.WTERMSIG(status) == signal.SIGKILL
        target = LocalStore(root)
        check_all(target)
        mirror(source, target, options=one)
        require_equal(source, target)
        assert history(target) == history(source)
