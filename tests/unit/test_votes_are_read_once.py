"""How often the large indexes are asked for and parsed: never by who has made them, once by who restores, one range by retention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.format import directory_reader, keys
from fastckpt.format.wholes import Wholes
from fastckpt.repository.collector import Collector
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep, plan_retention
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from fastckpt.training.checkpointer import Checkpointer
from tests.support.repositories import OPTIONS, begin, flip, keys_of, reuse, save_ranks, save_steps
from tests.support.states import sealed

N_TENSORS = 300


def state(seed: int) -> dict[str, Any]:
    """Many tensors, of which some are of kinds that are written in other forms."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer {n}": torch.randn(8, generator=generator) for n in range(N_TENSORS)}
    odd = {"empty": torch.empty(0, 3), "meta": torch.empty(3, device="meta"), torch.float32: torch.ones(2)}
    return {**tensors, "odd": odd, "sparse": torch.eye(3).to_sparse(), "note": "a \\ and a \u2028"}


class Counting(Wrapper):
    """Counts requests by verb and folder, and the bytes of votes that were read."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.requests: Counter[str] = Counter()
        self.vote_bytes = 0

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        found = operation()
        self.requests[f"{verb} {key.partition('/')[0]}"] += 1
        if verb == "get" and key.startswith(keys.VOTES):
            self.vote_bytes += len(found)
        return found

    def get_into(self, key: str, offset: int, out: Any) -> None:
        super().get_into(key, offset, out)
        self.vote_bytes += len(out) if key.startswith(keys.VOTES) else 0


class Counts:
    """Of one stretch of work."""

    def __init__(self, store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
        self._store = store
        self._parses = 0
        right = directory_reader.parse

        def parse(data: bytes, *rest: Any) -> Any:
            self._parses += data.count(b'"name":[') >= N_TENSORS  # not the few rows that a builder tries
            return right(data, *rest)

        monkeypatch.setattr(directory_reader, "parse", parse)

    def take(self) -> tuple[int, int, int]:
        """GETs of votes, GETs of ranges of votes, and parses of whole directories, since the last call."""
        requests = self._store.requests
        found = requests["get votes"], requests["get_into votes"], self._parses
        self._store.requests, self._store.vote_bytes, self._parses = Counter(), 0, 0
        return found


@pytest.fixture
def store() -> Counting:
    return Counting(MemoryStore())


def test_a_save_and_its_retention_read_no_vote(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(store, monkeypatch)
    run = Incarnation(Repository(store), OPTIONS)
    run.choose_and_claim()
    for step in (1, 2, 3):
        run.save(sealed(state(step)), step)
        run.retain(Keep(last=2), grace_s=0.0)
        assert counts.take() == (0, 0, 0)


def test_a_checkpointer_restores_with_one_read_of_the_vote(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(store, monkeypatch)
    model = {f"layer {n}": torch.full((8,), float(n)) for n in range(N_TENSORS)}
    with Checkpointer(store, {"model": model}, every=None, spot=None, keep=Keep(last=2), options=OPTIONS) as ckpt:
        assert ckpt.restore() == 0
        ckpt.save_now(1).wait()
        ckpt.wait()
    assert counts.take() == (0, 0, 0)
    with Checkpointer(store, {"model": model}, every=None, spot=None, options=OPTIONS) as ckpt:
        assert ckpt.restore() == 1
        assert counts.take() == (1, 0, 1)


def test_who_only_reads_reads_the_vote_once(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastckpt.repository.newest import read_checkpoint

    save_steps(store, [1])
    run = Incarnation(Repository(store), OPTIONS)
    run.choose_and_claim()
    run.save(sealed(state(2)), 2)
    counts = Counts(store, monkeypatch)
    counts.take()
    assert read_checkpoint(store, "latest", lambda ranks, _: len(ranks.whole(0).directory.tensors)) >= N_TENSORS
    assert counts.take() == (1, 0, 1)


def test_votes_that_are_open_are_listed_without_another_read(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks 0 and 2 of a world of four; the other two are read by two ranges each, and parsed."""
    begin(store, 4)
    commit = save_ranks(store, 1, 1, [state(0) for _ in range(4)])
    ranks, wholes = SavedRanks(store, commit), Wholes()
    for rank in (0, 2):
        ranks.vote(rank)
    counts = Counts(store, monkeypatch)
    counts.take()
    ranks.list_in(wholes, 0)
    assert counts.take() == (0, 4, 2)
    assert not wholes.problems
    assert len(wholes.found) >= N_TENSORS


def test_retention_reads_one_range_of_an_earlier_incarnations_vote(
    store: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Incarnation(Repository(store), OPTIONS)
    run.choose_and_claim()
    for step in (1, 2, 3):
        run.save(sealed(state(step)), step)
    packs = set(keys_of(store, keys.DATA))
    counts = Counts(store, monkeypatch)
    collector = Collector(Repository(store))
    counts.take()
    view = collector.look()
    whole = sum(info.n_bytes for info in store.list(keys.VOTES))
    assert view.needed == packs
    assert store.vote_bytes < whole / 20
    assert counts.take() == (0, 3, 0)
    collector.look()
    assert counts.take() == (0, 0, 0), "what is known is not asked for again"


def test_a_pass_reads_what_is_new() -> None:
    class Reads(MemoryStore):
        read = 0

        def get(self, key: str) -> bytes:
            self.read += 1
            return super().get(key)

    store = Reads()
    job = save_steps(store, [*range(1, 9)])
    job.retain(Keep(last=4), 1e9)
    store.read = 0
    job.retain(Keep(last=4), 1e9)
    store.read = 0
    job.retain(Keep(last=4), 1e9)
    assert store.read == 0


@pytest.mark.parametrize("at", range(0, 200, 7))
def test_a_file_table_that_is_not_as_it_must_be_is_not_believed(at: int) -> None:
    """Read alone it has no checksum: a flipped digit in it must not make a living checkpoint's pack look unused."""
    store = MemoryStore()
    save_steps(store, [1, 2])
    collector = Collector(Repository(store))
    commit = min(collector.look().living.values(), key=lambda commit: commit.save)
    offset, n_bytes = commit.votes[0].parts["file table"]
    flip(store, keys.vote_key(commit.vote(0)), offset + at % n_bytes)
    view = Collector(Repository(store)).look()
    assert view.needed is None or view.needed == set(keys_of(store, keys.DATA)), "a flip in a crc changes no key"
    assert not [key for key in plan_retention(view, Keep(last=1), (), 0.0).delete if key.startswith(keys.DATA)]


def test_packs_of_other_saves_are_known_by_the_whole_vote() -> None:
    store = MemoryStore()
    save_steps(store, [1])
    reuse(store, 1, 2)
    packs = set(keys_of(store, keys.DATA))
    assert Collector(Repository(store)).look().needed == packs


def test_one_error_says_that_the_checkpoint_cannot_be_read_and_another_that_the_store_cannot() -> None:
    store = MemoryStore()
    save_steps(store, [1])
    repository = Repository(store)
    with pytest.raises(fastckpt.UnreadableError) as caught:
        repository.commit(keys.CheckpointId(1, 9))
    assert isinstance(caught.value, fastckpt.errors.ObjectNotFoundError)
    flip(store, keys_of(store, keys.COMMITS)[0])
    with pytest.raises(fastckpt.UnreadableError):
        repository.commit(keys.CheckpointId(1, 1))
    assert not issubclass(fastckpt.errors.StoreUnavailableError, fastckpt.UnreadableError)
