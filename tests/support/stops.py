"""Actors of one repository, stopped between any two of their requests by a schedule that a test gives: "n of mine, then all of yours".

Saves refer to earlier ones (only what has changed is uploaded), as those of a Checkpointer do. Time is the world's: the store's clock, and
the one that goes on while a process is stopped.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from fastckpt.errors import CheckpointError, CorruptCheckpointError, StoreUnavailableError
from fastckpt.format import keys
from fastckpt.format.digest import digest
from fastckpt.format.keys import CheckpointId, SaveId
from fastckpt.format.repository_records import Commit, Parent, parse_commit_record
from fastckpt.format.sealed_state import SealedState
from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.catalog import Catalog, Which, open_checked
from fastckpt.repository.commit import open_vote
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from fastckpt.writing.bases import Base, Place, Uploaded
from tests.support.interleaving import Turns
from tests.support.repositories import OPTIONS, living
from tests.support.states import sealed

GRACE_S = 1000.0
Stops = Literal["between requests", "on the way"]
"""Where an actor stands when others go on: it has the answer to its last request, as a process that was stopped; or its next request is on
its way. The first may take any time, the second less than the grace (A1)."""
Schedule = Sequence[tuple[str, int | None]]
"""Who goes on, and for how many requests; None: to its end."""


def state_of(value: int) -> dict[str, Any]:
    """Says which save it is. A part never changes, another one at every third value, the rest always; each is a chunk."""

    def noise(seed: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(40, generator=torch.Generator().manual_seed(seed)).to(dtype)

    return {
        "value": value,
        "frozen": noise(-1, torch.float32),
        "slow": noise(value // 3, torch.float16),
        "fast": noise(value, torch.float64),
    }


class SteppedStore(Wrapper):
    """One actor's view of the store. A thread that has the name of an actor is that actor; any other works for the one it was made for."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world.store)
        self._world, self._name = world, name
        self.fails_at: int | None = None
        """The number of the request that fails."""
        self.answer_is_lost = False
        """Whether that one is carried out nevertheless."""
        self.requests = 0

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        thread = threading.current_thread().name
        name = thread if thread in self._world.actors else self._name
        if name not in self._world.actors:
            return self._request(verb, key, operation)
        with self._world.one_at_a_time[name]:
            if self._world.stops == "on the way":
                self._world.turns.wait_for_turn(name)
            try:
                return self._request(verb, key, operation)
            finally:
                if self._world.stops == "between requests":
                    self._world.turns.wait_for_turn(name)

    def _request(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        self.requests += 1
        fails = self.requests - 1 == self.fails_at
        if fails and not self.answer_is_lost:
            raise StoreUnavailableError(f"{verb} {key}: lost on its way")
        found = operation()
        if fails:
            raise StoreUnavailableError(f"{verb} {key}: the answer was lost")
        return found

    def put_if_absent(self, key: str, data: Any) -> None:
        self._call("put_if_absent", key, lambda: self._create(key, bytes(data)))

    def _create(self, key: str, data: bytes) -> None:
        self.inner.put_if_absent(key, data)
        checkpoint = keys.parse_commit(key)
        found = None if checkpoint is None else parse_commit_record(data, checkpoint, key)
        if isinstance(found, Commit):
            self._world.committed.add(found.save)

    def put(self, key: str, data: Any) -> None:
        super().put(key, bytes(data))


class World:
    """The store, its time, and what was given to saves."""

    def __init__(self, stops: Stops, start: World | None = None) -> None:
        self.stops = stops
        self.now_s: float = 1e6 if start is None else start.now_s
        self.store: MemoryStore = MemoryStore(clock=lambda: self.now_s)
        self.turns = Turns()
        self.actors: dict[str, threading.Thread] = {}
        self.one_at_a_time: dict[str, threading.Lock] = defaultdict(threading.Lock)
        """An actor's threads make their requests one after the other."""
        self.given: dict[CheckpointId, set[int]] = defaultdict(set)
        self.committed: set[SaveId] = set()
        self.problems: list[BaseException] = []
        self.n_values = 0
        if start is not None:
            self.store._objects, self.store._versions = start.store._objects.copy(), start.store._versions.copy()
            self.given.update({checkpoint: set(values) for checkpoint, values in start.given.items()})
            self.committed, self.n_values = set(start.committed), start.n_values

    def boot_clock_s(self) -> float:
        """The clock that goes on while a process is stopped."""
        return self.now_s

    def pause(self) -> None:
        """So much time as may pass while others stand: more than the grace if they are stopped, less if their requests are on the way."""
        self.now_s += 1.5 * GRACE_S if self.stops == "between requests" else 0.2 * GRACE_S

    def run(self, acts: Mapping[str, Callable[[], object]], schedule: Schedule) -> None:
        """Carry out a schedule, and then what is left of all actors, in the order of `acts`."""
        for name, n in (*schedule, *((name, None) for name in acts)):
            done = 0
            while (n is None or done < n) and self._advance(name, acts[name]):
                done += 1
        for thread in self.actors.values():
            thread.join()
        self.actors = {}
        for problem in self.problems:
            raise problem

    def _advance(self, name: str, act: Callable[[], object]) -> bool:
        """Let an actor do one request. False once it has ended."""
        if name in self.actors:
            return self.turns.give(name)

        def body() -> None:
            try:
                act()
            except CheckpointError:
                pass  # typed, and the actor has stopped: all that is asked of it
            except BaseException as error:
                self.problems.append(error)
            finally:
                self.turns.ended(name)

        self.actors[name] = thread = threading.Thread(target=body, name=name)
        thread.start()
        return self.turns.reaches(name) if self.stops == "between requests" else self.turns.give(name)

    def judge(self) -> None:
        """Whatever is a checkpoint is whole, holds what was given to its save, and names only what was committed."""
        for commit in living(self.store).values():
            open_checked(self.store, commit)
            for rank in range(commit.world):
                reader = open_vote(self.store, commit.vote(rank))
                value_of(self, commit, reader)
                for file in reader.files:
                    named = keys.parse_pack(file.key)
                    assert named in self.committed, f"{commit.checkpoint} names {file.key}, of no checkpoint"


class Job:
    """One incarnation, as a Checkpointer uses it: it knows its newest checkpoint, and saves only what has changed since."""

    after_failure: Callable[[Job, SealedState], None] = staticmethod(lambda job, state: None)
    """For a bug switch."""

    def __init__(self, world: World, name: str, *, rank: int = 0, ranks: int = 1, keep: Keep | None = None) -> None:
        self.world, self.keep = world, keep or Keep(last=1)
        self.store = SteppedStore(world, name)
        self.run = Incarnation(
            Repository(self.store),
            OPTIONS,
            rank=rank,
            world=ranks,
            sleep=lambda _: None,
            clock=lambda: world.now_s,
        )
        self.base: Base | None = None

    def restore(self, which: Which = "latest") -> None:
        """Choose, read, verify, claim; what was restored is what the next save refers to."""
        own: set[int] = set()
        while True:
            choice, self.base = self.run.choose(which, own=own), None
            if choice is not None:
                assert choice.reader is not None
                value = value_of(self.world, choice.commit, choice.reader)
                self.base = base_of(choice.commit, choice.reader, value, self.world.now_s)
            if self.run.claim(choice, which, own):
                return

    def save(self, step: int, *, value: int | None = None, full: bool = False) -> None:
        assert self.run.epoch is not None
        if value is None:
            self.world.n_values += 1
            value = self.world.n_values
        self.world.given[CheckpointId(self.run.epoch.number, step)].add(value)
        state, done = sealed(state_of(value)), list[Uploaded]()
        try:
            base = self.base
            if (
                full or base is None or base.parent != self.run.last
            ):  # an earlier try was committed, and its answer was lost
                base = None
            # A rank looks for the others' votes once: the last one finds all.
            commit = self.run.save(state, step, base=base, uploaded=done.append, commit_timeout_s=0.0)
        except CheckpointError:
            self.after_failure(self, state)
            raise
        if done:
            parent = Parent(commit.checkpoint, commit.digest)
            self.base = done[0].as_base(state, parent, None, self.world.now_s)

    def retain(self) -> None:
        self.run.retain(self.keep, GRACE_S)


@cache
def digests_of(value: int) -> tuple[bytes, ...]:
    """Of the chunks of a state."""
    state = sealed(state_of(value))
    chunks = range(len(state.chunks))
    return tuple(digest(state.source.raw(number, np.empty(MAX_RAW_BYTES, np.uint8))) for number in chunks)


def value_of(world: World, commit: Commit, reader: Reader) -> int:
    """Read all of a checkpoint, one request after the other, and find out which of its values that is. CorruptCheckpointError."""
    for number in range(len(reader.records)):
        damage = reader.read_chunk(number, np.empty(int(reader.records["raw_bytes"][number]), np.uint8))
        if damage is not None:
            raise CorruptCheckpointError(str(commit.checkpoint), [damage])
    found = {bytes(row) for row in reader.records["digest"]}
    fits = [value for value in world.given[commit.checkpoint] if set(digests_of(value)) == found]
    assert fits, f"{commit.checkpoint} is none of its saves"
    return fits[0]


def base_of(commit: Commit, reader: Reader, value: int, seen_s: float) -> Base:
    """What a save can refer to after a restore: rows are found by their digests."""
    form = sealed(state_of(value))
    rows = {bytes(row): number for number, row in enumerate(reader.records["digest"])}
    places = [Place(rows[found]) for found in digests_of(value)]
    parent, files = Parent(commit.checkpoint, commit.digest), tuple(reader.files)
    return Base(parent, form.storages, form.tensors, form.chunks, places, reader.records, files, None, seen_s)


def read_checkpoint(world: World, name: str, which: Which = "latest") -> None:
    """Somebody who only reads: the right bytes, or words. Whoever has the index gets the bytes, if that takes less than the grace."""
    choice = Catalog(Repository(SteppedStore(world, name))).choose(which)
    assert choice is not None
    assert choice.reader is not None
    try:
        value_of(world, choice.commit, choice.reader)
    except CheckpointError as error:
        if world.stops == "on the way":
            raise AssertionError(f"{choice.commit.checkpoint} was being read, and its bytes are gone") from error
        raise
