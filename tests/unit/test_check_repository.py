"""check_repository: every kind of object damaged in turn, and nothing reported that is right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastckpt.errors import StoreUnavailableError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, SaveId, commit_key, epoch_key
from fastckpt.format.repository_records import Pin, commit_bytes, pin_bytes, utc_now
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import list_votes
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.upkeep.check.report import RepositoryReport, UnfinishedSave
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.upkeep.repair import plan_repair, repair
from tests.support.repositories import IN_PARALLEL, begin, commit_of, flip, keys_of, reuse, save_ranks, save_steps, vote
from tests.support.states import rich_state, same


class CountingStore(MemoryStore):
    """Counts reads of packs."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def get_into(self, key: str, offset: int, out: Any) -> None:
        self.reads[key] += 1
        super().get_into(key, offset, out)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def check(store: Any, **more: Any) -> RepositoryReport:
    return check_repository(Repository(store), options=IN_PARALLEL, **more)


def states(report: RepositoryReport) -> dict[int, str]:
    return {one.checkpoint.step: one.state for one in report.checkpoints}


def pack_of(store: Any, step: int, rank: int = 0) -> str:
    return keys_of(store, f"data/000001-{step:012}-000/r{rank:05}/")[0]


def vote_of(store: Any, step: int, rank: int = 0) -> str:
    return keys_of(store, f"votes/000001-{step:012}-000/")[rank]


def test_a_whole_repository(store: LocalStore) -> None:
    save_steps(store, [1, 2, 3])
    seen: list[tuple[int, int]] = []
    report = check(store, progress=lambda done, total: seen.append((done, total)))
    assert report.ok, report
    assert report.findings == []
    assert report.notes == []
    assert report.unfinished == []
    assert states(report) == {3: "ok", 2: "ok", 1: "ok"}
    assert [one.branch for one in report.checkpoints] == ["history"] * 3
    assert report.packs == 3
    assert report.pack_bytes == sum(info.n_bytes for info in store.list("data/"))
    assert seen[-1] == (report.pack_bytes, report.pack_bytes)
    assert report.repository == Repository(store).require().repository  # type: ignore[union-attr]
    plan = plan_repair(report, Repository(store).epoch, 1)
    assert plan.complete == ()
    assert plan.left == ()


def test_several_ranks_and_no_repository_at_all(store: LocalStore) -> None:
    save_ranks(store, begin(store, 3).number, 4, [rich_state(rank) for rank in range(3)])
    assert check(store).ok
    empty = check(MemoryStore())
    assert [(f.key, f.damage.part) for f in empty.findings] == [("fastckpt.json", "fastckpt.json")]


@pytest.mark.parametrize(
    ("find", "part", "harms"),
    [
        (lambda s: "fastckpt.json", "marker", False),
        (lambda s: epoch_key(1), "epoch", False),
        (lambda s: commit_key(CheckpointId(1, 2)), "commit or tombstone", True),
        (lambda s: vote_of(s, 2), "vote", True),
    ],
)
def test_a_bit_in_every_small_object(store: LocalStore, find: Any, part: str, harms: bool) -> None:
    save_steps(store, [1, 2])
    key = find(store)
    flip(store, key)
    report = check(store)
    assert not report.ok
    assert {f.key for f in report.findings} == {key}
    assert report.findings[0].damage.part == part
    assert states(report) == {2: "damaged" if harms else "ok", 1: "ok"}
    assert any("salvage" in words for words in plan_repair(report, lambda n: None, 1).left) == harms


@pytest.mark.parametrize("position", [3, -3])
def test_a_bit_in_a_pack_names_tensors_and_checkpoint(store: LocalStore, position: int) -> None:
    save_steps(store, [1, 2])
    key = pack_of(store, 2)
    flip(store, key, position % store.head(key).n_bytes)
    report = check(store)
    assert states(report) == {2: "damaged", 1: "ok"}
    whole = [f for f in report.findings if f.damage.place == "crc64nvme of the whole"]
    chunks = [f for f in report.findings if f.damage.tensors]
    assert len(whole) == len(chunks) == 1
    assert report.checkpoints[0].tensors_lost == chunks[0].damage.tensors
    quick = check(store, quick=True)
    assert quick.ok
    assert quick.packs == 0


def test_lost_and_short_packs_and_votes(store: LocalStore) -> None:
    save_steps(store, [1, 2, 3, 4])
    store.delete(pack_of(store, 2))
    short = pack_of(store, 3)
    store.put(short, store.get(short)[:-1])
    lost_vote = vote_of(store, 4)
    store.delete(lost_vote)
    report = check(store)
    assert states(report) == {4: "damaged", 3: "damaged", 2: "damaged", 1: "ok"}
    of_step = {f.checkpoint.step: f for f in report.findings if f.checkpoint is not None}
    assert "model.weight" in of_step[2].damage.tensors
    assert of_step[2].damage.found == "no such object"
    assert of_step[4].key == lost_vote
    assert of_step[4].rank_lost
    assert report.checkpoints[0].ranks_lost == (0,)
    assert any(f.key == short and f.damage.place == "length" for f in report.findings)
    assert 0 < len(report.checkpoints[1].tensors_lost) < len(report.checkpoints[2].tensors_lost)
    quick = check(store, quick=True)
    assert states(quick) == states(report)
    assert quick.checkpoints[1].tensors_lost  # by length alone: everything in that pack


def test_a_lost_epoch_record_is_missed(store: LocalStore) -> None:
    save_steps(store, [1])
    save_steps(store, [2])
    store.delete(epoch_key(1))
    report = check(store)
    assert [f.key for f in report.findings] == [epoch_key(1)]
    assert states(report) == {2: "ok", 1: "ok"}


def test_a_record_that_does_not_follow_from_its_votes(store: LocalStore) -> None:
    from dataclasses import replace

    save_steps(store, [1, 2])
    commit = commit_of(store, 1)
    store.put(commit_key(commit.checkpoint), commit_bytes(replace(commit, metrics={"loss": 0.0})))
    report = check(store)
    by_place = {f.damage.place for f in report.findings}
    assert "metrics" in by_place
    assert "1-1" in by_place  # step 2 names another record as its parent
    assert states(report) == {2: "ok", 1: "ok"}


def test_shared_packs_are_read_once_and_their_damage_hurts_all(store: LocalStore) -> None:
    counting = CountingStore()
    save_steps(counting, [1])
    reuse(counting, 1, 2)
    counting.reads.clear()
    assert check(counting).ok
    key = pack_of(counting, 1)
    assert counting.reads == {key: 1}
    flip(counting, key, 3)
    counting.reads.clear()
    report = check(counting)
    assert counting.reads == {key: 1}
    assert states(report) == {2: "damaged", 1: "damaged"}
    assert report.checkpoints[0].tensors_lost == report.checkpoints[1].tensors_lost != ()


def test_only_some_steps(store: LocalStore) -> None:
    save_steps(store, [1, 2])
    flip(store, pack_of(store, 1))
    report = check(store, steps={2})
    assert report.ok
    assert states(report) == {2: "ok", 1: "not checked"}
    assert states(check(store, steps={1})) == {2: "not checked", 1: "damaged"}


def test_unfinished_saves(store: LocalStore) -> None:
    save_steps(store, [1])
    vote(store, 1, 5, 0, 1, rich_state(5))  # killed before its commit
    vote(store, 1, 6, 0, 2, rich_state(6))  # the other rank never voted
    vote(store, 1, 1, 0, 1, rich_state(9), attempt=3)  # a late vote of another try
    vote(store, 1, 7, 0, 1, rich_state(7))
    store.delete(pack_of(store, 7))
    vote(store, 1, 8, 0, 1, rich_state(8))
    vote(store, 1, 8, 0, 2, rich_state(8))
    report = check(store)
    assert report.ok, "unfinished saves are no damage"
    found = {(u.save.step, u.save.attempt): u for u in report.unfinished}
    kinds = {place: one.state for place, one in found.items()}
    expected = {(1, 3): "superseded", (5, 0): "completable", (6, 0): "incomplete", (7, 0): "damaged", (8, 0): "damaged"}
    assert kinds == expected
    assert (found[6, 0].votes, found[6, 0].world) == (1, 2)
    assert found[5, 0].n_bytes > 10_000


def test_repair_commits_what_is_complete_and_touches_nothing_else(store: LocalStore) -> None:
    save_steps(store, [3])
    vote(store, 1, 5, 0, 1, rich_state(5))
    vote(store, 1, 2, 0, 1, rich_state(2))
    vote(store, 1, 6, 0, 2, rich_state(6))
    before = {info.key: info for info in store.list("")}
    report = check(store)
    plan = plan_repair(report, Catalog(Repository(store)).epoch, 1)
    assert [(c.save, c.becomes) for c in plan.complete] == [(SaveId(1, 2, 0), "history"), (SaveId(1, 5, 0), "newest")]
    done = repair(Repository(store), plan)
    assert [one.error for one in done] == [None, None]
    after = {info.key: info for info in store.list("")}
    assert after.keys() - before.keys() == {commit_key(CheckpointId(1, step)) for step in (2, 5)}
    assert {key: after[key] for key in before} == before
    choice = Catalog(Repository(store)).choose()
    assert choice is not None
    assert choice.commit.save.step == 5
    assert states(check(store)) == {5: "ok", 3: "ok", 2: "ok"}
    assert plan_repair(check(store), Catalog(Repository(store)).epoch, 1).complete == ()


def test_a_repair_that_fails_is_listed_and_the_others_are_done(store: LocalStore) -> None:
    save_steps(store, [1])
    vote(store, 1, 2, 0, 1, rich_state(2))
    vote(store, 1, 3, 0, 1, rich_state(3))
    plan = plan_repair(check(store), Catalog(Repository(store)).epoch, 1)
    flip(store, vote_of(store, 2))
    done = repair(Repository(store), plan)
    assert done[0].error is not None
    assert done[1].error is None


def test_an_abandoned_save_becomes_an_abandoned_branch(store: LocalStore) -> None:
    save_steps(store, [1])
    vote(store, 1, 5, 0, 1, rich_state(5))
    begin(store, 1, commit_of(store, 1), rewind=True)
    plan = plan_repair(check(store), Catalog(Repository(store)).epoch, 2)
    assert [c.becomes for c in plan.complete] == ["abandoned"]


def test_a_first_commit_can_be_completed(store: LocalStore) -> None:
    begin(store, 1)
    vote(store, 1, 5, 0, 1, rich_state(5))
    report = check(store)
    assert report.checkpoints == []
    assert [c.becomes for c in plan_repair(report, Catalog(Repository(store)).epoch, 1).complete] == ["newest"]


def test_what_does_not_belong_is_noted_not_damage(store: LocalStore) -> None:
    save_steps(store, [1])
    for key in ("notes.txt", "data/other.bin", "commits/1-1.json", "votes/x/y", "probe/abc", "commits/backup.json"):
        store.put(key, b"x")
    store.delete("README.txt")
    report = check(store)
    assert report.ok
    assert len(report.notes) == 7
    assert sum("not ours" in words for words in report.notes) == 5


def test_pins(store: LocalStore) -> None:
    save_steps(store, [1])
    good = pin_bytes(Pin(CheckpointId(1, 1), 3600, "me", utc_now()))
    store.put(keys.pin_key("good"), good)
    store.put(keys.pin_key("gone"), pin_bytes(Pin(CheckpointId(1, 9), 3600, "me", utc_now())))
    report = check(store)
    assert report.ok
    assert len(report.pins) == 2
    assert [words for words in report.notes if "pins/gone.json" in words]
    flip(store, keys.pin_key("good"))
    bad = check(store)
    assert [f.key for f in bad.findings] == ["pins/good.json"]
    assert states(bad) == {1: "ok"}


def test_retired_checkpoints_are_a_note(store: LocalStore) -> None:
    job = save_steps(store, [1, 2, 3])
    job.retain(Keep(last=1))
    report = check(store)
    assert report.ok
    assert states(report) == {3: "ok"}
    assert report.unfinished == []
    assert any(words.startswith("2 steps are retired") for words in report.notes)


def test_a_checkpoint_retired_meanwhile_is_no_damage() -> None:
    class Retiring(MemoryStore):
        job: Any = None

        def get_into(self, key: str, offset: int, out: Any) -> None:
            if self.job is not None:
                job, self.job = self.job, None
                job.retain(Keep(last=1), grace_s=0)
                job.retain(Keep(last=1), grace_s=0)
            super().get_into(key, offset, out)

    store = Retiring()
    job = save_steps(store, [1, 2])
    store.job = job
    report = check(store)
    assert report.ok, report.findings
    assert states(report) == {2: "ok", 1: "retired"}


def test_newer_formats_are_not_vouched_for(store: LocalStore) -> None:
    from fastckpt.format.digest import digest

    save_steps(store, [1])
    data = store.get(epoch_key(1)).replace(b'"format": 1', b'"format": 9')
    body = data[:-49]
    store.put(epoch_key(1), body + f',\n"digest": "{digest(body).hex()}"\n}}\n'.encode())
    report = check(store)
    assert not report.ok
    assert report.findings == []
    assert "format 9" in report.not_checked[0]


def test_errors_of_the_store_are_raised(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(store, [1])

    def fail(*_: Any) -> None:
        raise StoreUnavailableError("as the test wants")

    monkeypatch.setattr(store, "get_into", fail)
    with pytest.raises(StoreUnavailableError):
        check(store)


def test_reading_changes_nothing(store: LocalStore) -> None:
    save_steps(store, [1, 2])
    vote(store, 1, 6, 0, 2, rich_state(6))
    before = list(store.list(""))
    check(store)
    check(store, quick=True)
    assert list(store.list("")) == before


def test_one_completable_try_of_a_step_is_taken() -> None:
    report = RepositoryReport("memory://", False)
    report.unfinished = [UnfinishedSave(SaveId(1, 2, attempt), "completable", "", 1, 1, 1, 10) for attempt in (1, 0, 2)]
    assert [c.save.attempt for c in plan_repair(report, lambda n: None, 1).complete] == [0]


def test_states_are_what_the_tools_say(store: LocalStore) -> None:
    assert same(rich_state(3), rich_state(3))
    assert not same(rich_state(3), rich_state(4))
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    save_steps(store, [1])
    assert len(list_votes(store, SaveId(1, 1, 0))) == 1
