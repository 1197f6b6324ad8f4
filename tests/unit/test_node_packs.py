"""Packs that ranks of a machine have in common are fetched once, whatever happens to the one that fetches."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastckpt.errors import StoreUnavailableError
from fastckpt.format import keys
from fastckpt.format.digest import crc64nvme
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import SaveId
from fastckpt.ranks.world import World
from fastckpt.repository import node_packs
from fastckpt.repository.cache_folder import CacheFolder
from fastckpt.repository.cached_store import CachedStore
from fastckpt.repository.node_packs import NodePacks
from fastckpt.repository.node_votes import remove_shared_votes, shared_votes
from fastckpt.repository.repository import Repository
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from tests.support.repositories import commit_of, read, save_ranks, save_shared, shared
from tests.support.states import same

RANKS = 4
SAVE = SaveId(1, 1, 0)
DATA = b"0123456789" * 100
FILE = FileEntry("data/000001-000000000001-000/r00000/000000.pack", len(DATA), crc64nvme(DATA))
ID = "0" * 32


class Counting(Wrapper):
    """Counts the bytes of packs that are read."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.n_bytes: Counter[str] = Counter()

    def get_into(self, key: str, offset: int, out: Any) -> None:
        if key.startswith(keys.DATA):
            self.n_bytes[key] += memoryview(out).nbytes
        super().get_into(key, offset, out)


def on_all_ranks(store: Counting, folder: Path, nonce: str) -> list[Any]:
    """What a node's ranks read at once, each through a store of its own."""
    commit = commit_of(store, 1)
    found: list[Any] = [None] * RANKS

    def one(rank: int) -> None:
        through = CachedStore(store, str(folder))
        commit_of(through, 1)
        own = keys.vote_key(commit.vote(rank))
        with shared_votes(through, World(rank, RANKS, rank, RANKS), nonce, own) as seen:
            found[rank] = read(seen, commit, rank)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(RANKS):
        remove_shared_votes(World(rank, RANKS, rank, RANKS), nonce)
    return found


def begun() -> Counting:
    store = MemoryStore()
    Repository(store).initialise()
    Repository(store).claim(None, world=RANKS)
    return Counting(store)


def test_what_ranks_hold_alike_is_fetched_once(tmp_path: Path) -> None:
    store, quarter = begun(), 4 << 20
    states = [{"own": torch.full((10,), float(rank)), "all": torch.arange(float(quarter))} for rank in range(RANKS)]
    shares = {"all": [(rank, quarter) for rank in range(RANKS)]}
    save_shared(store, 1, 1, [shared(state, rank, shares) for rank, state in enumerate(states)])
    packs = {info.key: info.n_bytes for info in store.list(keys.DATA)}
    for number in range(2):  # the second time all of it is there
        store.n_bytes.clear()
        found = on_all_ranks(store, tmp_path / "cache", f"shared-{number}")
        assert all(same(one, state) for one, state in zip(found, states, strict=True))
        assert store.n_bytes == (Counter() if number else packs)


def test_what_a_rank_has_alone_is_not_written_to_the_disk(tmp_path: Path) -> None:
    store = begun()
    states = [{"w": torch.full((1000,), float(rank))} for rank in range(RANKS)]
    save_ranks(store, 1, 1, states)
    found = on_all_ranks(store, tmp_path / "cache", "alone")
    assert all(same(one, state) for one, state in zip(found, states, strict=True))
    assert not list((tmp_path / "cache").rglob("*.pack"))


@pytest.fixture
def folder(tmp_path: Path) -> CacheFolder:
    return CacheFolder(str(tmp_path / "cache"), ID)


def fill(out: Any) -> None:
    memoryview(out)[:] = DATA


def never(out: Any) -> None:
    raise AssertionError("nothing is to be read")


def waiting(folder: CacheFolder, meanwhile: Callable[[], None]) -> NodePacks:
    """A rank whose every pause is `meanwhile`; an hour passes in each."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 3600.0
        meanwhile()

    return NodePacks(folder, SAVE, sleep=sleep, clock=lambda: now[0])


def test_one_fetches_and_the_other_waits(folder: CacheFolder) -> None:
    first = NodePacks(folder, SAVE)

    def second(out: Any) -> None:
        waits = waiting(folder, lambda: None)
        assert waits.bring(FILE, never) is False  # it has waited long enough
        fill(out)

    assert first.bring(FILE, second) is True
    assert bytes(folder.read(FILE.key, len(DATA)) or b"") == DATA
    assert not folder.is_claimed(FILE.key)


def test_who_waits_gets_what_the_other_has_brought(folder: CacheFolder) -> None:
    waits = waiting(folder, lambda: folder.put(FILE.key, DATA))
    assert folder.claim(FILE.key, 60.0)
    assert waits.bring(FILE, never) is None


def test_a_pack_that_came_before_the_claim_is_not_fetched_again(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs, claim = NodePacks(folder, SAVE), folder.claim

    def late(key: str, limit_s: float) -> bool:
        folder.put(key, DATA)
        return claim(key, limit_s)

    monkeypatch.setattr(folder, "claim", late)
    assert packs.bring(FILE, never) is None
    assert not folder.is_claimed(FILE.key)


def test_who_waits_for_a_rank_that_fails_reads_for_itself(folder: CacheFolder) -> None:
    waits = waiting(folder, lambda: folder.let_go(FILE.key))
    assert folder.claim(FILE.key, 60.0)
    assert waits.bring(FILE, never) is False


def test_the_claim_of_a_killed_rank_ends(folder: CacheFolder) -> None:
    packs = NodePacks(folder, SAVE)
    assert folder.claim(FILE.key, 60.0)
    (claim,) = Path(folder.root).rglob(".claim-*")
    os.utime(claim, (0, 0))
    assert packs.bring(FILE, fill) is True


def test_an_error_of_the_store_is_raised_and_the_claim_ends(folder: CacheFolder) -> None:
    def fail(out: Any) -> None:
        raise StoreUnavailableError("no answer")

    packs = NodePacks(folder, SAVE)
    with pytest.raises(StoreUnavailableError):
        packs.bring(FILE, fail)
    assert not folder.is_claimed(FILE.key)


@pytest.mark.parametrize("what", ["damaged", "short", "no room", "too large"])
def test_what_cannot_be_left_there_is_left_to_the_store(
    what: str, folder: CacheFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs, file, read_it = NodePacks(folder, SAVE), FILE, fill
    if what == "damaged":
        file = FILE._replace(crc64nvme=1)
    elif what == "short":

        def short(out: Any) -> None:
            raise EOFError

        read_it = short
    elif what == "no room":
        monkeypatch.setattr(node_packs, "_LEFT_FREE_BYTES", 1 << 62)
    else:
        file = FILE._replace(n_bytes=1 << 40)
    assert packs.bring(file, read_it) is False
    assert folder.size(FILE.key) is None


def test_files_of_earlier_saves_go_unless_they_have_just_come(folder: CacheFolder) -> None:
    """A checkpoint may name packs of earlier saves: what a prefetch or another rank has brought of those is needed now."""
    NodePacks(folder, SAVE)
    for step in (0, 1, 2):
        folder.put(f"data/000001-00000000000{step}-000/r00000/000000.pack", DATA)
    NodePacks(folder, SAVE)
    assert len(list(Path(folder.root).rglob("*.pack"))) == 3
    for path in Path(folder.root).rglob("*-000*"):
        os.utime(path, (1, 1))
    for path in Path(folder.root).rglob("r00000"):
        os.utime(path, (1, 1))
    NodePacks(folder, SAVE)
    steps = sorted(path.parent.parent.name for path in Path(folder.root).rglob("*.pack"))
    assert steps == ["000001-000000000001-000", "000001-000000000002-000"]
