"""What the tests of repositories share: small states, savers, a store that can be held, and looking at everything."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import torch

from fastckpt import Checkpointer, Options
from fastckpt.errors import CorruptCheckpointError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_loader import load_object
from fastckpt.repository.catalog import Catalog, verify
from fastckpt.repository.commit import open_vote
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.spot import Notice
from fastckpt.state import Captured, capture
from fastckpt.store.base import Store
from fastckpt.store.memory import MemoryStore

OPTIONS = Options(threads=1, connections=1, host_budget_bytes=256 << 20)
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


def state_of(value: float) -> dict[str, Any]:
    """A small state that says which save it is: some chunks of different kinds."""
    generator = torch.Generator().manual_seed(int(value * 1000))
    return {
        "value": value,
        "weight": torch.randn(300, generator=generator),
        "count": torch.full((40,), int(value)),
        "noise": torch.randint(0, 255, (500,), generator=generator, dtype=torch.uint8),
    }


def captured(value: float) -> Captured:
    return capture(state_of(value), pickle, 2)


def incarnation(store: Store) -> Incarnation:
    return Incarnation(Repository(store), OPTIONS)


def read(store: Store, commit: Commit, rank: int = 0) -> Any:
    """The object of a checkpoint, every byte verified."""
    return load(open_vote(store, commit.vote(rank)))


def load(reader: Reader) -> Any:
    """The object of an index that was read."""
    return load_object(reader, OPTIONS, 1, map_location=None, pickle_module=pickle, weights_only=True, load_args={})


def same(found: Any, value: float) -> bool:
    expected = state_of(value)
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], v) if isinstance(v, torch.Tensor) else found[k] == v for k, v in expected.items()
    )


def living(store: Store) -> dict[CheckpointId, Commit]:
    """All living checkpoints, in the history or not. Raises for one that cannot be read."""
    repository = Repository(store)
    found = repository.read_all(repository.list())
    assert not found.failed, found.failed
    return found.commits


def history(store: Store) -> list[CheckpointId]:
    return list(Catalog(Repository(store)).history())


def check_all(store: Store) -> None:
    """G1: whatever is committed is whole, to the last bit."""
    for commit in living(store).values():
        verify(store, commit)
        for rank in range(commit.world):
            reader = open_vote(store, commit.vote(rank))
            for number in range(len(reader.records)):
                out = np.empty(int(reader.records["raw_bytes"][number]), np.uint8)
                damage = reader.read_chunk(number, out)
                if damage is not None:
                    raise CorruptCheckpointError(commit.checkpoint.__str__(), [damage])


def saved_once(state: dict[str, Any]) -> MemoryStore:
    """A repository with step 1 of a state."""
    store = MemoryStore()
    with Checkpointer(store, state, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    return store


def restore_once(store: MemoryStore, state: dict[str, Any]) -> None:
    """Step 1 into the objects of a state."""
    with Checkpointer(store, state, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 1


class GivenNotices:
    """A source of notices that the test controls."""

    name = "test"

    def __init__(self) -> None:
        self.notices: list[Notice] = []

    def poll(self, now_s: float) -> list[Notice]:
        """Each is told once."""
        found, self.notices = self.notices, []
        return found
