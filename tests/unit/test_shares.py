"""What several ranks hold alike is written once and read by all: saved, committed, restored, exported, checked and salvaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.errors import CorruptCheckpointError, SaveError
from fastckpt.format.digest import digest
from fastckpt.format.keys import CheckpointId, SaveId, commit_key, vote_key
from fastckpt.format.repository_records import Commit
from fastckpt.format.shares import owners_needed
from fastckpt.format.tensor_names import canonical
from fastckpt.format.vote import replica_conflicts
from fastckpt.host.files import AtomicFile
from fastckpt.options import Options
from fastckpt.ranks.ownership import Replicated, share_out
from fastckpt.reading.contents import OfContainer
from fastckpt.reading.merged_reader import merge
from fastckpt.reading.tensor_reader import TensorReader
from fastckpt.repository.catalog import open_checked
from fastckpt.repository.commit import open_vote, read_vote, try_commit
from fastckpt.repository.rank_reader import open_rank
from fastckpt.repository.repository import Repository
from fastckpt.state.chunking import chunk_bytes
from fastckpt.state.chunks import shareable
from fastckpt.state.prints import prints_of
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.upkeep.export import export
from fastckpt.upkeep.salvage import salvage
from tests.support.repositories import begin, check_all, commit_of, keys_of, load, save_shared, shared, vote_shared
from tests.support.states import captured, same

MIB = 1 << 20
WORLD = 4
# Alike on all ranks; alike on ranks 0 and 2, and on 1 and 3; each rank's own.
SHARES: dict[int, dict[str, list[tuple[int, int]]]] = {
    rank: {
        "model.weight": [(0, 4000), (1, 4000), (3, 4000)],
        "model.tied": [(2, 1200)],
        "model.half": [(rank % 2, 600), (rank % 2 + 2, 400)],
        "model.zeros": [(1, 2000), (2, 2000)],
        "optim.step": [(3, 4)],
    }
    for rank in range(WORLD)
}


def state_of(rank: int, step: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    tied = torch.randn(300, generator=generator)
    pair = torch.Generator().manual_seed(100 * step + rank % 2)
    own = torch.Generator().manual_seed(1000 * step + rank)
    model = {
        "weight": torch.randn(3000, generator=generator),
        "tied": tied,
        "tied_too": tied[:200],
        "half": torch.randn(500, generator=pair).bfloat16(),
        "zeros": torch.zeros(1000),
        "empty": torch.empty(0),
    }
    optim = {"step": torch.tensor(float(step)), "own": torch.randn(5000, generator=own), "rank": rank}
    # Storages of one name have other numbers on other ranks.
    return {"model": model, "optim": optim} if rank % 2 else {"optim": optim, "model": model}


@pytest.fixture
def store() -> MemoryStore:
    store = MemoryStore()
    begin(store, WORLD)
    save_shared(store, 1, 1, [shared(state_of(rank), rank, SHARES[rank]) for rank in range(WORLD)])
    return store


def reopened(store: MemoryStore, step: int = 1) -> Commit:
    return commit_of(store, step)


def test_every_rank_gets_back_what_it_had(store: MemoryStore) -> None:
    commit = reopened(store)
    open_checked(store, commit)
    for rank in range(WORLD):
        assert same(load(open_rank(store, commit, rank)), state_of(rank))
    check_all(store)


def test_what_is_alike_is_written_once(store: MemoryStore) -> None:
    own = WORLD * 5000 * 4
    alike = 12000 + 1200 + 4000 + 4 + 2 * 1000
    assert reopened(store).raw_bytes == own + alike


def test_tensors_are_fetched_by_name(store: MemoryStore) -> None:
    reader = open_rank(store, reopened(store), 2)
    with TensorReader(OfContainer(reader, Options())) as found:
        state = state_of(2)
        assert same(found["model.weight"], state["model"]["weight"])
        assert same(found["model.half"], state["model"]["half"])
        assert same(found["model.tied_too"], state["model"]["tied_too"])


def test_a_rank_alone_is_never_loaded_in_part(store: MemoryStore) -> None:
    with pytest.raises(ValueError, match="merge it with the votes of their owners"):
        load(open_vote(store, reopened(store).vote(2)))


def test_only_what_is_needed_of_others_is_kept(store: MemoryStore) -> None:
    commit = reopened(store)
    votes = {rank: open_vote(store, commit.vote(rank)) for rank in range(WORLD)}
    assert owners_needed(votes[0].directory) == {1, 2, 3}
    merged = merge(votes[0], votes)
    used = {piece.chunk for number in range(len(merged.directory.storages)) for piece in merged.pieces(number)}
    assert used == set(range(len(merged.records)))
    assert len(merged.records) < sum(len(vote.records) for vote in votes.values())
    assert not any(storage.shares for storage in merged.directory.storages)


def test_nothing_changes_for_who_shares_nothing(store: MemoryStore) -> None:
    save_shared(store, 1, 2, [shared(state_of(rank, 2), rank, {}) for rank in range(WORLD)])
    vote = open_vote(store, reopened(store, 2).vote(0))
    assert vote.footer.header.read_features == 0
    assert merge(vote, {}) is vote


@pytest.mark.parametrize("rank", range(WORLD))
def test_an_export_is_whole(store: MemoryStore, tmp_path: Path, rank: int) -> None:
    path = tmp_path / "out.fckpt"
    export(Repository(store), reopened(store), rank, AtomicFile(str(path)))
    assert same(fastckpt.load(path), state_of(rank))
    with fastckpt.open(path) as found:
        assert same(found["model.weight"], state_of(rank)["model"]["weight"])


def test_a_job_of_one_may_share_with_itself(tmp_path: Path) -> None:
    root = tmp_path / "run"
    store = LocalStore(root)
    begin(store, 1)
    save_shared(store, 1, 1, [shared(state_of(0), 0, {"model.weight": [(0, 12000)]})])
    assert same(fastckpt.load(root), state_of(0))


def test_large_storages_are_split_at_chunks_and_balanced() -> None:
    """Takes 80 MiB: shares of less than a chunk are not split."""
    store = MemoryStore()
    begin(store, 2)
    generator = torch.Generator().manual_seed(5)
    alike = {f"w{n}": torch.randint(-9, 9, (n * 1_000_000 + 5,), generator=generator) for n in (1, 2, 3)}
    states = []
    for rank in range(2):
        state = shared({**alike, "rank": torch.tensor([rank] * 1000)}, rank, {})
        shapes = [shape for shape in shareable(state).values() if shape.name != ("rank",)]
        wanted = [Replicated(canonical(s.name or ()), s.n_bytes, chunk_bytes(s.element), (0, 1)) for s in shapes]
        state.shares = dict(zip((s.number for s in shapes), share_out(wanted), strict=True))
        states.append(state)
    n_bytes = sum(tensor.nbytes for tensor in alike.values())
    assert all(abs(state.own_bytes - 8000 - n_bytes / 2) <= 4 << 20 for state in states)
    commit = save_shared(store, 1, 1, states)
    assert commit.raw_bytes == n_bytes + 2 * 8000
    for rank in range(2):
        assert same(load(open_rank(store, commit, rank)), {**alike, "rank": torch.tensor([rank] * 1000)})


# -- what is wrong -----------------------------------------------------------------------------------------------------


def votes_that_differ(store: MemoryStore, what: str) -> None:
    """Rank 1 says something else than rank 0 of what rank 1 writes."""
    begin(store, 2)
    mine = {"model": {"weight": torch.arange(100.0), "tied": torch.arange(3.0)}}
    theirs = {"model": {"weight": torch.arange(100.0), "tied": torch.arange(3.0)}}
    weight: list[tuple[int, int]] = [(0, 200), (1, 200)]
    if what == "another type":
        theirs["model"]["weight"] = torch.arange(100, dtype=torch.int32)
    elif what == "another length":
        theirs["model"]["weight"], weight = torch.arange(101.0), [(0, 200), (1, 204)]
    elif what == "other shares":
        weight = [(0, 204), (1, 196)]
    elif what == "another name":
        theirs["model"]["other"] = theirs["model"].pop("weight")
    name = "model.other" if what == "another name" else "model.weight"
    shares: dict[str, list[tuple[int, int]]] = {} if what == "its own" else {name: weight}
    states = [shared(mine, 0, {"model.weight": [(0, 200), (1, 200)]}), shared(theirs, 1, shares)]
    for state in states:
        vote_shared(store, 1, 1, 2, state)


def commit_all_the_same(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> Commit:
    """As a writer would that does not look at shares."""
    with monkeypatch.context() as patch:
        patch.setattr("fastckpt.format.vote.unmet_shares", lambda votes: [])
        commit = try_commit(store, SaveId(1, 1, 0))
    assert commit is not None
    return commit


@pytest.mark.parametrize("what", ["another type", "another length", "other shares", "another name", "its own"])
def test_what_does_not_fit_is_not_committed(what: str) -> None:
    store = MemoryStore()
    votes_that_differ(store, what)
    with pytest.raises(
        CorruptCheckpointError, match=r"model\.weight .* of rank 0: the vote of rank 1 has no such storage"
    ):
        try_commit(store, SaveId(1, 1, 0))
    assert keys_of(store, "commits/") == []
    (unfinished,) = check_repository(Repository(store)).unfinished
    assert unfinished.state == "damaged"
    assert "the vote of rank 1 has no such storage" in unfinished.why


@pytest.mark.parametrize("what", ["another type", "another length", "other shares", "another name", "its own"])
def test_what_does_not_fit_is_refused_with_both_sides(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    votes_that_differ(store, what)
    commit = commit_all_the_same(store, monkeypatch)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_rank(store, commit, 0)
    (damage,) = caught.value.damage
    assert damage.tensors == ("model.weight",)
    assert "model.weight, the share of rank 1" in damage.place
    assert "float32, 400 bytes" in damage.expected
    assert "r00000-of" in damage.expected
    assert "r00001-of" in damage.found
    with pytest.raises(CorruptCheckpointError, match="shares of rank 1"):
        open_checked(store, commit)
    report = check_repository(Repository(store))
    assert [one.state for one in report.checkpoints] == ["damaged"]
    finding = next(f for f in report.findings if f.rank == 1)
    assert finding.damage.tensors == ("model.weight",)
    assert finding.also_ranks == (0,)


def test_a_missing_owner_is_named_with_what_it_takes_along(store: MemoryStore, tmp_path: Path) -> None:
    commit = reopened(store)
    store.delete(vote_key(commit.vote(2)))
    for rank, lost in [
        (0, {"model.tied", "model.tied_too", "model.half", "model.zeros"}),
        (1, {"model.tied", "model.tied_too", "model.zeros"}),
    ]:
        with pytest.raises(CorruptCheckpointError) as caught:
            open_rank(store, commit, rank)
        assert {name for damage in caught.value.damage for name in damage.tensors} == lost
        assert all("rank 2" in damage.place for damage in caught.value.damage)
        with pytest.raises(CorruptCheckpointError):
            export(Repository(store), commit, rank, AtomicFile(str(tmp_path / "out")))
    with pytest.raises(CorruptCheckpointError, match="no such object"):
        open_checked(store, commit)
    report = check_repository(Repository(store))
    finding = next(f for f in report.findings if f.also_ranks)
    assert finding.rank == 2
    assert finding.also_ranks == (0, 1, 3)
    assert {"model.tied", "model.tied_too", "model.zeros"} <= set(finding.damage.tensors)
    assert "lost to ranks 0, 1, 3 as well" in str(finding)


@pytest.mark.parametrize("quick", [False, True])
def test_a_damaged_pack_names_all_ranks_that_need_it(store: MemoryStore, quick: bool) -> None:
    (key,) = (key for key in keys_of(store, "data/") if "/r00003/" in key)
    data = bytearray(store.get(key))
    if quick:
        store.put(key, bytes(data[:-1]))
    else:
        for at in range(0, len(data), 200):
            data[at] ^= 1
        store.put(key, bytes(data))
    report = check_repository(Repository(store), quick=quick)
    findings = [f for f in report.findings if f.rank == 3 and f.damage.tensors]
    by_name = {name: f.also_ranks for f in findings for name in f.damage.tensors}
    if quick:
        assert by_name["model.weight"] == by_name["optim.own"] == (0, 1, 2)
    else:
        assert by_name["model.weight"] == (0, 1, 2)
        assert by_name["optim.own"] == ()
        assert by_name["model.half"] == (1,)


def test_a_damaged_chunk_of_an_owner_is_named_at_load(store: MemoryStore) -> None:
    commit = reopened(store)
    (key,) = (key for key in keys_of(store, "data/") if "/r00003/" in key)
    data = bytearray(store.get(key))
    for at in range(0, len(data), 50):
        data[at] ^= 1
    store.put(key, bytes(data))
    with pytest.raises(CorruptCheckpointError) as caught:
        load(open_rank(store, commit, 0))
    places = [damage.place for damage in caught.value.damage if "model.weight" in damage.tensors]
    assert any("of rank 3" in place and "r00003" in place for place in places)


def test_salvage_takes_out_what_owners_still_have(store: MemoryStore, tmp_path: Path) -> None:
    store.delete(vote_key(reopened(store).vote(2)))
    report = salvage(Repository(store), CheckpointId(1, 1), str(tmp_path), ranks=[0, 1, 2])
    assert set(report.ranks[0].saved) == {"model.weight", "model.empty", "optim.step", "optim.own"}
    assert {tensor.name[-1] for tensor in report.ranks[0].lost} == {"tied", "tied_too", "half", "zeros"}
    assert all("rank 2" in tensor.why[0] for tensor in report.ranks[0].lost)
    assert {tensor.name[-1] for tensor in report.ranks[1].lost} == {"tied", "tied_too", "zeros"}
    assert report.ranks[2].lost_whole
    found = fastckpt.load(tmp_path / "rank-00000.fckpt")
    assert same(found["model.weight"], state_of(0)["model"]["weight"])


def test_salvage_finds_lost_shares_in_another_checkpoint(store: MemoryStore, tmp_path: Path) -> None:
    save_shared(store, 1, 2, [shared(state_of(rank, 2), rank, SHARES[rank]) for rank in range(WORLD)])
    store.delete(vote_key(reopened(store, 2).vote(2)))
    report = salvage(Repository(store), CheckpointId(1, 2), str(tmp_path), ranks=[0])
    assert all(t.found_in is not None and t.found_in.checkpoint.step == 1 for t in report.ranks[0].lost)


def test_what_cannot_be_found_by_name_is_not_saved() -> None:
    store = MemoryStore()
    begin(store, 2)
    state = shared({"a": torch.arange(5.0)}, 0, {"a": [(0, 20)]})
    state.tensors = []
    with pytest.raises(SaveError, match="storage 0, first name: expected one of its own"):
        vote_shared(store, 1, 1, 2, state)


def test_what_has_no_first_name_of_its_own_is_not_shareable() -> None:
    tied = torch.arange(3.0)
    state = captured({"a": tied, "b": tied, "c": torch.arange(4.0), "d": torch.arange(5.0), "empty": torch.empty(0)})
    assert [shape.name for shape in shareable(state).values()] == [("a",), ("c",), ("d",)]
    state.tensors = [entry._replace(name=("c",)) if entry.name == ("d",) else entry for entry in state.tensors]
    assert [shape.name for shape in shareable(state).values()] == [("a",)]
    state.tensors = []
    assert shareable(state) == {}


def test_a_print_is_the_digest_of_all_bytes() -> None:
    values = torch.randint(-9, 9, (3 * MIB,), dtype=torch.int32)
    state = shared({"w": values, "none": torch.empty(0)}, 1, {"w": [(0, 12 * MIB)]})
    assert prints_of(state, [0, 1]) == {0: digest(values.numpy()).hex(), 1: digest(b"").hex()}


def test_prints_tell_replicas_that_differ() -> None:
    store = MemoryStore()
    begin(store, 3)
    for rank in range(3):
        values = {"a": torch.arange(5.0), "b": torch.arange(7.0) + rank // 2, "c": torch.arange(9.0)}
        state = shared(values, rank, {name: [(0, len(values[name]) * 4)] for name in "abc"})
        named = {entry.storage: entry.name[0] for entry in state.tensors}
        state.prints = prints_of(state, [number for number, name in named.items() if name != "c"])
        vote_shared(store, 1, 1, 3, state)
    commit = try_commit(store, SaveId(1, 1, 0))
    assert commit is not None
    words = replica_conflicts([read_vote(store, commit.vote(rank)) for rank in range(3)])
    assert len(words) == 1
    assert words[0] == "b: ranks that should hold the same bytes do not: those of ranks 0, 1; rank 2 are different"
    assert store.get(commit_key(CheckpointId(1, 1)))
