"""Votes of owners are read from the store once for all ranks of a node."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fastckpt.ranks.world import World
from fastckpt.repository.node_votes import remove_shared_votes, shared_votes
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import T, Wrapper


class Counting(Wrapper):
    def __init__(self, inner: MemoryStore) -> None:
        super().__init__(inner)
        self.gets: Counter[str] = Counter()

    def _call(self, verb: str, key: str, operation: Callable[[], T]) -> T:
        if verb == "get":
            self.gets[key] += 1
        return operation()


@pytest.fixture
def store() -> Counting:
    inner = MemoryStore()
    for name in "abc":
        inner.put(f"votes/{name}", name.encode() * 100)
    return Counting(inner)


def read(store: Counting, rank: int, nonce: str, keys: str, found: dict[int, list[bytes]]) -> None:
    world = World(rank, 4, rank % 2, 2)
    with shared_votes(store, world, nonce, f"votes/own-{rank}") as seen:
        found[rank] = [seen.get(f"votes/{key}") for key in keys]
        assert [seen.head(f"votes/{key}").n_bytes for key in keys] == [100] * len(keys)


def test_one_rank_of_a_node_reads(store: Counting) -> None:
    found: dict[int, list[bytes]] = {}
    threads = [threading.Thread(target=read, args=(store, rank, "n1", "abc", found)) for rank in (1, 0, 3, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(4):
        assert found[rank] == [b"a" * 100, b"b" * 100, b"c" * 100]
        remove_shared_votes(World(rank, 4, rank % 2, 2), "n1")
    # Two nodes. A rank that comes before its node's first one does not wait for it.
    assert all(2 <= n <= 4 for n in store.gets.values())


def test_what_the_first_rank_did_not_need(store: Counting) -> None:
    found: dict[int, list[bytes]] = {}
    read(store, 0, "n2", "a", found)
    read(store, 1, "n2", "ab", found)
    assert store.gets == {"votes/a": 1, "votes/b": 1}
    remove_shared_votes(World(0, 4, 0, 2), "n2")


def test_shared_memory_that_is_full(store: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    found: dict[int, list[bytes]] = {}
    read(store, 0, "n3", "ab", found)
    read(store, 1, "n3", "ab", found)
    assert found[0] == found[1]
    assert store.gets == {"votes/a": 2, "votes/b": 2}
    remove_shared_votes(World(0, 4, 0, 2), "n3")
