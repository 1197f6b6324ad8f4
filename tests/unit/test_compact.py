"""`upkeep/compact`: a checkpoint written in full, in place and elsewhere; refusals; killed and failing runs leave nothing or the whole."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt import Checkpointer
from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    NoCheckpointError,
    RepositoryError,
    SaveError,
    StoreUnavailableError,
    SupersededError,
)
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId, commit_key
from fastckpt.format.repository_records import Commit
from fastckpt.kernels.transform import Transform
from fastckpt.options import Options
from fastckpt.repository.commit import open_vote
from fastckpt.repository.repository import Repository
from fastckpt.state.sealing import seal
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.testing.faulty_store import FaultyStore
from fastckpt.upkeep import compact
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.upkeep.compact import comparing
from fastckpt.upkeep.compact.elsewhere import compact_to
from fastckpt.upkeep.compact.in_place import compact_in_place
from fastckpt.upkeep.compact.report import CompactReport
from fastckpt.upkeep.compact.stored_state import StoredChunks, stored_state
from fastckpt.upkeep.mirror.mirror import mirror
from tests.support.deltas import chain, chain_state, save_on
from tests.support.repositories import (
    IN_PARALLEL,
    begin,
    check_all,
    commit_of,
    flip,
    history,
    incarnation,
    keys_of,
    read,
    save_ranks,
    save_shared,
    shared,
)
from tests.support.states import same, sealed

ONE = Options(threads=1, connections=1)
Act = Callable[[Store, Store], CompactReport]
ACTS: dict[str, Act] = {
    "here": lambda store, target: compact_in_place(store, options=ONE),
    "there": lambda store, target: compact_to(store, target, options=ONE),
}


def packs_named(store: Store, commit: Commit) -> set[SaveId | None]:
    return {
        keys.parse_pack(file.key) for rank in range(commit.world) for file in open_vote(store, commit.vote(rank)).files
    }


def require_full(store: Store, commit: Commit) -> None:
    assert packs_named(store, commit) == {commit.save}
    for rank in range(commit.world):
        transforms = set(open_vote(store, commit.vote(rank)).records["transform"].tolist())
        assert not transforms & {Transform.SUB, Transform.SUBPACK, Transform.REF}
        assert Transform.CAST in transforms or "b_copy" not in str(open_vote(store, commit.vote(rank)).names_of_storage)


@pytest.mark.parametrize("world", [1, 2])
def test_in_place_the_newest_is_full_and_a_restore_takes_it(world: int) -> None:
    store = MemoryStore()
    old = chain(store, world=world)
    assert len(packs_named(store, old)) == 3
    drawn: list[tuple[int, int]] = []
    report = compact_in_place(store, options=IN_PARALLEL, progress=lambda done, total: drawn.append((done, total)))
    assert report.written
    assert history(store)[0] == report.compacted == CheckpointId(2, 3)
    new = commit_of(store, 3, epoch=2)
    require_full(store, new)
    assert (new.metrics, new.meta, new.world, new.raw_bytes) == (old.metrics, old.meta, old.world, old.raw_bytes)
    assert (new.trigger, new.parent is not None and new.parent.checkpoint) == ("compact", old.checkpoint)
    for rank in range(world):
        assert same(read(store, new, rank), chain_state(3 + 100 * rank))
    check_all(store)
    assert check_repository(Repository(store)).ok
    assert drawn[-1] == (1, 1)
    assert drawn[-2][0] == drawn[-2][1] - 1
    assert not compact_in_place(store, options=ONE).written  # it is full now
    assert history(store)[0] == CheckpointId(2, 3)


def test_training_goes_on_from_the_full_one() -> None:
    store, live = MemoryStore(), chain_state(0)
    chain(store)
    compact_in_place(store, options=ONE)
    with Checkpointer(store, live, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 3
        assert same(live, chain_state(3))
        ckpt.save_now(4).wait()
    assert history(store)[:2] == [CheckpointId(3, 4), CheckpointId(2, 3)]


def test_an_older_one_in_place_is_a_rewind_and_has_to_be_asked_for() -> None:
    store = MemoryStore()
    chain(store)
    before = keys_of(store, "")
    with pytest.raises(RepositoryError, match=r"step 3(.|\n)*--to URL(.|\n)*--rewind"):
        compact_in_place(store, 2, options=ONE)
    assert keys_of(store, "") == before
    assert compact_in_place(store, 2, rewind=True, options=ONE).written
    assert history(store) == [CheckpointId(2, 2), CheckpointId(1, 2), CheckpointId(1, 1)]
    assert same(read(store, commit_of(store, 2, epoch=2)), chain_state(2))


def test_shares_of_several_ranks_stay_shares() -> None:
    store = MemoryStore()
    begin(store, 2)

    def parts(step: int) -> list[Any]:
        held = {"w": torch.arange(400_000, dtype=torch.float32) + step, "own": torch.tensor([step])}
        half = 4 * 200_000
        return [shared(held, rank, {"w": [(0, half), (1, half)]}) for rank in range(2)]

    first = save_shared(store, 1, 1, parts(1))
    old = save_on(store, first, 2, [seal(one) for one in parts(2)])
    compact_in_place(store, options=ONE)
    new = commit_of(store, 2, epoch=2)
    require_full(store, new)
    for rank in range(2):
        assert same(read(store, new, rank), read(store, old, rank))
        of_new, of_old = (open_vote(store, one.vote(rank)).directory.storages for one in (new, old))
        assert [s.shares for s in of_new] == [s.shares for s in of_old]


def test_elsewhere_it_has_its_own_name_and_the_source_stays_as_it_is() -> None:
    source, target = MemoryStore(), MemoryStore()
    old = chain(source)
    before = {key: source.get(key) for key in keys_of(source, "")}
    report = compact_to(source, target, options=IN_PARALLEL)
    assert {key: source.get(key) for key in keys_of(source, "")} == before
    assert report.written
    new = commit_of(target, 3)
    require_full(target, new)
    assert (new.checkpoint, new.parent, new.metrics, new.trigger) == (
        old.checkpoint,
        old.parent,
        old.metrics,
        "compact",
    )
    assert new.save != old.save  # packs of that try may come with a mirror, and later checkpoints need them
    assert same(read(target, new), chain_state(3))
    assert check_repository(Repository(target)).ok
    assert not compact_to(source, target, options=ONE).written
    assert compact_to(source, target, step=2, options=ONE).written
    report_of_mirror = mirror(source, target, options=ONE)
    assert [c.step for c in report_of_mirror.copied] == [1]
    assert [c.step for c in report_of_mirror.present] == [3, 2]
    check_all(target)


def test_a_mirrored_checkpoint_is_not_replaced_and_its_packs_stay() -> None:
    source, target = MemoryStore(), MemoryStore()
    chain(source)
    mirror(source, target, options=ONE)
    before = {key: target.get(key) for key in keys_of(target, "") if not key.startswith("probe/")}
    with pytest.raises(RepositoryError, match="packs of earlier saves"):
        compact_to(source, target, options=ONE)
    assert {key: target.get(key) for key in keys_of(target, "") if not key.startswith("probe/")} == before
    assert not compact_to(source, target, step=1, options=ONE).written  # the first save is full as it is


def test_what_is_no_copy_of_the_source_is_refused() -> None:
    source, other = MemoryStore(), MemoryStore()
    chain(source)
    chain(other)
    before = keys_of(other, "")
    with pytest.raises(RepositoryError, match="no copy of anything"):
        compact_to(source, other, options=ONE)
    assert keys_of(other, "") == before
    with pytest.raises(RepositoryError, match="the same repository"):
        compact_to(source, source, options=ONE)
    empty = MemoryStore()
    with pytest.raises(RepositoryError, match="no fastckpt repository"):
        compact_in_place(empty, options=ONE)
    Repository(empty).initialise()
    with pytest.raises(NoCheckpointError):
        compact_in_place(empty, options=ONE)


@pytest.mark.parametrize("where", ["here", "there"])
def test_damage_of_a_base_is_named_and_nothing_is_committed(where: str) -> None:
    store, target = MemoryStore(), MemoryStore()
    chain(store)
    (key,) = keys_of(store, "data/000001-000000000001-000/")
    flip(store, key, 40)
    before = history(store)
    with pytest.raises(CorruptCheckpointError, match=key):
        ACTS[where](store, target)
    assert history(store) == before
    assert not keys_of(target, keys.COMMITS)


def test_a_job_that_saves_meanwhile_is_found_and_its_checkpoint_stays_the_newest() -> None:
    store = MemoryStore()
    chain(store)
    job = incarnation(store)
    job.choose_and_claim()
    said: list[int] = []

    def hook(number: int, verb: str, key: str, when: str) -> None:
        if verb == "put" and key.startswith(keys.VOTES) and when == "after" and not said:
            said.append(number)
            with contextlib.suppress(SupersededError):
                job.save(sealed(chain_state(9)), 9)

    with pytest.raises(RepositoryError, match="not stopped"):
        compact_in_place(FaultyStore(store, hook=hook), options=ONE)
    assert said
    assert history(store)[0].step == 9


def _require_nothing_or_all(act: str, source: Store, target: Store, old: Commit) -> None:
    check_all(source)
    check_all(target)
    where = source if act == "here" else target
    for checkpoint in history(where):
        commit = Repository(where).commit(checkpoint)
        assert isinstance(commit, Commit)
        if commit.trigger == "compact":
            require_full(where, commit)
            assert same(read(where, commit), chain_state(3))
    assert same(read(source, old), chain_state(3))


@pytest.mark.parametrize("mode", ["before", "after"])
@pytest.mark.parametrize("act", sorted(ACTS))
def test_any_failing_operation_leaves_nothing_or_the_whole_and_the_next_run_finishes(act: str, mode: Any) -> None:
    def run(fail_at: int | None) -> tuple[FaultyStore, MemoryStore, MemoryStore, Commit]:
        source, target = MemoryStore(), MemoryStore()
        old = chain(source, 3)

        def fail(number: int, verb: str, key: str) -> bool:
            return number == fail_at

        faulty = FaultyStore(source if act == "here" else target, fail, mode=mode)
        with contextlib.suppress(CheckpointError):  # unclear outcomes are told in words of their own
            ACTS[act](*((faulty, target) if act == "here" else (source, faulty)))
        return faulty, source, target, old

    operations = len(run(None)[0].operations)
    assert operations > 15
    for number in range(operations):
        _, source, target, old = run(number)
        _require_nothing_or_all(act, source, target, old)
        ACTS[act](source, target)
        where = source if act == "here" else target
        require_full(where, _newest(where))
        assert same(read(where, _newest(where)), chain_state(3))


def _newest(store: Store) -> Commit:
    found = Repository(store).commit(history(store)[0])
    assert isinstance(found, Commit)
    return found


@pytest.mark.parametrize("act", sorted(ACTS))
def test_killed_at_random_it_leaves_nothing_or_the_whole(act: str, tmp_path: Path) -> None:
    """SIGKILL of a child at five writes, drawn at random."""
    counted = LocalStore(tmp_path / "counted")
    chain(counted)
    counting = FaultyStore(LocalStore(tmp_path / "there") if act == "there" else counted)
    ACTS[act](*((counted, counting) if act == "there" else (counting, MemoryStore())))
    writes = [n for n, (verb, _) in enumerate(counting.operations) if verb in ("put", "put_if_absent")]
    rng = random.Random(5)
    for turn, at in enumerate(rng.sample(writes, min(5, len(writes)))):
        source, target = LocalStore(tmp_path / f"run-{turn}"), LocalStore(tmp_path / f"copy-{turn}")
        old = chain(source)
        moment = rng.choice(("before", "after"))

        def kill(number: int, verb: str, key: str, when: str, at: int = at, moment: str = moment) -> None:
            if number == at and when == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        pid = os.fork()
        if pid == 0:
            try:
                watched = FaultyStore(source if act == "here" else target, hook=kill)
                ACTS[act](*((watched, target) if act == "here" else (source, watched)))
            finally:
                os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        _require_nothing_or_all(act, source, target, old)
        ACTS[act](source, target)
        require_full(source if act == "here" else target, _newest(source if act == "here" else target))


def test_two_runs_to_one_place_never_overwrite_each_others_packs() -> None:
    source, target = MemoryStore(), MemoryStore()
    chain(source)
    second: list[CompactReport] = []

    def hook(number: int, verb: str, key: str, when: str) -> None:
        if keys.parse_pack(key) is not None and when == "before" and not second:
            second.append(compact_to(source, target, options=ONE))

    with pytest.raises(RepositoryError, match="another run"):
        compact_to(source, FaultyStore(target, hook=hook), options=ONE)
    assert second[0].written
    check_all(target)
    assert same(read(target, commit_of(target, 3)), chain_state(3))


def test_a_store_that_fails_at_the_source_ends_it() -> None:
    source, target = MemoryStore(), MemoryStore()
    chain(source)
    faulty = FaultyStore(source, lambda number, verb, key: verb == "get_into" and keys.parse_pack(key) is not None)
    with pytest.raises(StoreUnavailableError):
        compact_to(faulty, target, options=ONE)
    assert not keys_of(target, commit_key(CheckpointId(1, 3)).rpartition("/")[0] + "/")


def test_what_is_read_ahead_is_bounded_in_whatever_order_chunks_are_asked_for() -> None:
    store = MemoryStore()
    begin(store, 1)
    many = {f"w{n:02}": torch.randn(300_000) for n in range(40)}
    commit = save_ranks(store, 1, 1, [many])
    watched = FaultyStore(store)
    reader = open_vote(watched, commit.vote(0))
    state = stored_state(reader, IN_PARALLEL)
    numbers = list(range(len(state.chunks)))
    random.Random(3).shuffle(numbers)

    def n_read() -> int:
        return sum(keys.parse_pack(key) is not None for _, key in watched.operations)

    with contextlib.closing(state.source):
        for released, number in enumerate(numbers):
            raw = state.source.raw(number, np.empty(0, np.uint8))
            assert raw.size == state.chunks[number].n_bytes
            assert n_read() - released <= 2 * IN_PARALLEL.connections + 1
            state.source.release(number)
    assert n_read() == len(numbers), "each is read once"


def test_its_modules_ask_torch_for_nothing() -> None:
    """What was saved is copied as bytes: no object is unpickled, so no code of a repository can run."""
    folder = Path(compact.__file__).parent
    sources = [path.read_text() for path in folder.glob("*.py")]
    assert len(sources) > 4
    for text in sources:
        imported = re.findall(r"^(?:from|import) (\S+)", text, re.MULTILINE)
        assert not [name for name in imported if name.startswith(("torch", "pickle", "fastckpt.state"))]


def test_a_bundle_of_copies_that_is_cut_anew_is_compared_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small bfloat16 tensors are one chunk; as copies of masters each has a row of its own."""
    store = MemoryStore()
    begin(store, 1)
    masters = {f"w{n}": torch.randn(50 + n) for n in range(3)}
    state = {"master": masters, "model": {name: one.bfloat16() for name, one in masters.items()}}
    with monkeypatch.context() as patched:  # a writer that casts nothing
        patched.setattr("fastckpt.writing.casting.candidates", lambda *_: {})
        commit = save_ranks(store, 1, 1, [state])
    asked: list[int] = []
    compare = comparing._has_same_bytes
    monkeypatch.setattr(comparing, "_has_same_bytes", lambda *given: asked.append(given[2]) or compare(*given))
    compact_in_place(store, always=True, options=ONE)
    new = commit_of(store, 1, epoch=2)
    transforms = open_vote(store, new.vote(0)).records["transform"].tolist()
    assert transforms.count(Transform.CAST) == 3
    assert len(asked) == 3
    assert same(read(store, new), read(store, commit))


def test_what_was_written_otherwise_than_it_was_read_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    chain(store)
    before = history(store)
    read_right = StoredChunks.raw

    def raw(self: StoredChunks, number: int, scratch: Any) -> Any:
        found = read_right(self, number, scratch).copy()
        found[0] ^= number == 1
        return found

    monkeypatch.setattr(StoredChunks, "raw", raw)
    with pytest.raises(SaveError, match="differs from what was read"):
        compact_in_place(store, options=ONE)
    assert history(store) == before
