"""A repository that several actors use at once, and a scheduler that says who does the next store operation."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from fastckpt.errors import (
    CheckpointError,
    NoCheckpointError,
    RepositoryError,
    SaveError,
    StoreUnavailableError,
    SupersededError,
)
from fastckpt.format.keys import CheckpointId
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Wrapper
from tests.support.repositories import OPTIONS, check_all, history, read
from tests.support.states import same, small_state

GRACE_S = 50.0
WAIT_S = 60.0
BESIDE = "-retention"


class Stopped(BaseException):
    """The actor is killed: nothing of it happens any more."""


class Turns:
    """Lets one actor at a time do one store operation."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn: str | None = None
        self._waiting: set[str] = set()
        self._dead: set[str] = set()
        self._ended: set[str] = set()

    def wait_for_turn(self, name: str) -> None:
        with self._changed:
            self._waiting.add(name)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._turn == name or name in self._dead, WAIT_S)
            self._waiting.discard(name)
            self._turn = None
            if name in self._dead:
                raise Stopped

    def give(self, name: str) -> bool:
        """Let the actor do its next operation, and wait until it stands before the one after it. False once it has ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: name in self._waiting or name in self._ended, WAIT_S)
            if name not in self._ended:
                self._turn = name
                self._waiting.discard(name)
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: name in self._waiting or name in self._ended, WAIT_S)
            return name not in self._ended

    def reaches(self, name: str) -> bool:
        """Wait until an actor stands before an operation. False once it has ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: name in self._waiting or name in self._ended, WAIT_S)
            return name not in self._ended

    def kill(self, name: str) -> None:
        with self._changed:
            self._dead.add(name)
            self._changed.notify_all()

    def ended(self, name: str) -> None:
        with self._changed:
            self._ended.add(name)
            self._changed.notify_all()


class SteppedStore(Wrapper):
    """A view of the common store for one actor's threads; may lose replies and delay writes.

    A thread whose own name is that of an actor is an actor beside the one that the store was made for: retention, beside saves.
    """

    def __init__(
        self,
        inner: MemoryStore,
        turns: Turns,
        name: str,
        rng: random.Random,
        late: list[Callable[[], Any]],
        faults: float,
        deciding: set[str],
        committing: set[str],
    ) -> None:
        super().__init__(inner)
        self._turns, self._name, self._rng, self._late, self._faults = turns, name, rng, late, faults
        self._deciding, self._committing = deciding, committing

    def _call(self, verb: str, key: str, operation: Callable[[], Any]) -> Any:
        thread = threading.current_thread().name
        name = thread if thread.endswith(BESIDE) else self._name
        if (verb, key.partition("/")[0]) in (("put_if_absent", "commits"), ("put", "votes")):
            self._committing.add(name)
        try:
            self._turns.wait_for_turn(name)
        finally:
            self._committing.discard(name)
        # From a look at the votes of a save to its commit, or to a look at something else: what A1 wants done within the grace.
        if verb == "list" and key.startswith("votes/"):
            self._deciding.add(name)
        elif verb == "list" or key.startswith("commits/"):
            self._deciding.discard(name)
        roll = self._rng.random()
        if roll < self._faults:
            kind = self._rng.choice(["before", "after", "late"])
            if kind == "after":
                operation()
            elif kind == "late" and verb in ("put", "put_if_absent"):
                self._late.append(operation)
            raise StoreUnavailableError(f"{verb} {key}: lost ({kind})")
        return operation()

    def put(self, key: str, data: Any) -> None:
        super().put(key, bytes(data))


class World:
    """The store, the model of what was promised, and the actors."""

    sleeps = 0.0
    """How likely it is that a completer which is about to commit sleeps through all that the others do, hours perhaps."""
    blind_prune = False
    """Whether `prune` never sees that a job has started."""

    def __init__(self, seed: int, faults: float) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.now_s = 1000.0
        self.store = MemoryStore(clock=lambda: self.now_s)
        self.turns = Turns()
        self.late: list[Callable[[], Any]] = []
        self.deciding: set[str] = set()
        """Actors that have seen votes and may be about to commit."""
        self.committing: set[str] = set()
        """Those that stand before that, or before their vote."""
        self.acknowledged: list[tuple[CheckpointId, float]] = []
        self.values: dict[CheckpointId, set[float]] = {}
        """Every value that was ever given to a save of this checkpoint."""
        self.rewinds: list[int] = []
        self.actors: dict[str, threading.Thread] = {}
        self.problems: list[BaseException] = []
        self.n_values = 0
        self.prune_looked = True
        """Whether the operator has seen that the run is stopped: a job may start nevertheless, from now on."""
        self.epoch_at_prune = 0

    def value(self) -> float:
        self.n_values += 1
        return float(self.n_values)

    def start(self, name: str, act: Callable[[World, Incarnation, random.Random], None]) -> None:
        rng = random.Random(self.rng.random())
        run = Incarnation(
            Repository(
                SteppedStore(self.store, self.turns, name, rng, self.late, self.faults, self.deciding, self.committing)
            ),
            OPTIONS,
            sleep=lambda s: None,
        )

        self.begin(name, lambda: act(self, run, rng))

    def begin(self, name: str, act: Callable[[], None]) -> None:
        """A thread that the scheduler knows."""

        def body() -> None:
            try:
                act()
            except Stopped:
                pass
            except (StoreUnavailableError, SupersededError, RepositoryError, SaveError, NoCheckpointError):
                pass  # typed, and the actor has stopped: all that is asked of it
            except BaseException as error:
                self.problems.append(error)
            finally:
                self.deciding.discard(name)
                self.turns.ended(name)

        thread = threading.Thread(target=body, name=name)
        self.actors[name] = thread
        thread.start()

    def run(self, kill: float, jumps: float = 0.0) -> None:
        asleep: set[str] = set()
        while self.actors:
            likely = {"completer": self.sleeps, "starter": 0.5}
            sleepy = {name: likely[kind] for name in self.committing - asleep if (kind := name.split("-")[0]) in likely}
            asleep |= {name for name, how_likely in sleepy.items() if self.rng.random() < how_likely}
            awake = sorted(self.actors.keys() - asleep)
            awake = awake or sorted(self.actors)
            # A pass has some 40 operations, a save 8: for a tombstone to come to its end within a world, passes need more of the turns.
            # For a job to come to its commit while somebody prunes, it needs more of them too.
            often = [name for name in awake if name.endswith(BESIDE)]
            early = [name for name in awake if name.startswith("starter")]
            name = self.rng.choice(awake + 7 * often + 4 * early)
            thread = self.actors[name]
            if self.rng.random() < kill:
                self.turns.kill(name)
            if not self.turns.give(name):
                thread.join()
                del self.actors[name]
            self.now_s += self.rng.choice([0, 0, 1, 5, -3])
            if self.late and self.rng.random() < 0.05:
                self._release()
            if self.rng.random() < jumps and self.settled():  # hours of training, or of sleep
                self.now_s += GRACE_S
        self._release()
        for problem in self.problems:
            raise problem

    def settled(self) -> bool:
        """Nobody is about to commit, and what was delayed has been done: what A1 promises after the grace."""
        if self.deciding and not self.sleeps:
            return False
        self._release()
        return True

    def _release(self) -> None:
        late, self.late = self.late, []
        for operation in late:
            try:
                operation()
            except CheckpointError:
                continue

    def judge(self) -> None:
        check_all(self.store)
        repository = Repository(self.store)
        found = history(self.store)
        for checkpoint in found:
            value = read(self.store, repository.commit(checkpoint))  # type: ignore[arg-type]
            assert any(same(value, small_state(v)) for v in self.values[checkpoint]), f"{checkpoint} is a mixture"
        # G8: unless somebody went back on purpose, the last acknowledged one or a newer one is what a restore takes.
        if self.acknowledged and not self.rewinds:
            newest = self.acknowledged[-1][0]
            assert found, f"{newest} was acknowledged, nothing is left"
            assert found[0].step >= newest.step or found[0].epoch > newest.epoch, (
                f"{newest} was acknowledged, found {found[0]}"
            )
            if found[0].epoch > newest.epoch:
                assert newest in found or any(c.step >= newest.step for c in found), (
                    f"{newest} is not in the history {found}"
                )
