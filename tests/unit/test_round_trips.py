"""How many requests of a save wait for each other: on a far store, they are what a small save takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch

import fastckpt
from fastckpt.format import keys
from fastckpt.store.base import ObjectInfo
from fastckpt.store.memory import MemoryStore
from tests.support.repositories import check_all

WAIT_S = 15.0
MIB = 1 << 20


class Rounds(MemoryStore):
    """Requests that should go out together are answered once all of them are there; if they come one after the other, never."""

    def __init__(self) -> None:
        super().__init__()
        self.together: dict[str, threading.Barrier] = {}
        self.rounds: list[str] = []
        self._lock = threading.Lock()

    def expect(self, packs: int) -> None:
        self.rounds = []
        self.together = {"pack": threading.Barrier(packs), "look": threading.Barrier(4)}

    def _answer(self, kind: str) -> None:
        if not self.together:
            return
        if kind in self.together:
            self.together[kind].wait(WAIT_S)
        with self._lock:
            if kind not in self.together or kind not in self.rounds:
                self.rounds.append(kind)

    def put(self, key: str, data: Any) -> None:
        self._answer("pack" if key.startswith(keys.DATA) else "vote")
        super().put(key, data)

    def put_if_absent(self, key: str, data: Any) -> None:
        self._answer("commit")
        super().put_if_absent(key, data)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._answer("look" if prefix == keys.EPOCHS else "list")
        return super().list(prefix)

    def get(self, key: str) -> bytes:
        self._answer("look")
        return super().get(key)

    def get_into(self, key: str, offset: int, out: Any) -> None:
        self._answer("look")
        super().get_into(key, offset, out)

    def head(self, key: str) -> ObjectInfo:
        self._answer("head")
        return super().head(key)


def test_a_save_of_20_mb_takes_five_round_trips() -> None:
    store = Rounds()
    state = {"w": torch.randint(0, 256, (20 * MIB,), dtype=torch.uint8)}
    one = fastckpt.Options(threads=1)  # which of several is faster decides whether there are five packs or six
    with fastckpt.Checkpointer(store, state, every=None, keep=None, spot=None, options=one) as ckpt:
        ckpt.save_now(1).wait()
        n_packs = sum(1 for _ in store.list(keys.DATA))
        assert n_packs >= 5
        for step in (2, 3):
            state["w"][:: 1 << 16] += 1
            store.expect(n_packs)
            ckpt.save_now(step).wait()
            assert store.rounds == ["pack", "vote", "list", "commit", "look"]
    store.together = {}
    check_all(store)
