"""Stores and sources of notices that the test controls."""

from __future__ import annotations

import threading
from typing import Any

from fastckpt.format import keys
from fastckpt.spot import Notice
from fastckpt.store.memory import MemoryStore

HELD_S = 60.0  # longer than any test holds a store: only one that fails comes near it


class HeldStore(MemoryStore):
    """A store whose puts of packs can be held back, or fail: a save stays under way for as long as the test wants it.

    `open` lets them go on, `reached` tells that one has begun. Only packs: what claims an epoch or commits is not kept waiting.
    """

    def __init__(self, *, held: bool = False) -> None:
        super().__init__()
        self.open = threading.Event()
        if not held:
            self.open.set()
        self.reached = threading.Event()
        self.failing: type[Exception] | None = None

    def put(self, key: str, data: Any) -> None:
        if key.startswith(keys.DATA):
            self.reached.set()
            assert self.open.wait(HELD_S)
            if self.failing is not None:
                raise self.failing("as the test wants it")
        super().put(key, data)


class GivenNotices:
    """A source of notices that the test controls."""

    name = "test"

    def __init__(self) -> None:
        self.notices: list[Notice] = []

    def poll(self, now_s: float) -> list[Notice]:
        """Each is told once."""
        found, self.notices = self.notices, []
        return found
