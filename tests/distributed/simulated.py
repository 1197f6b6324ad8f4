"""Ranks of one job under virtual time: real decisions, agreement, fates and commits; training and uploads are sleeps."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from fastckpt import Every, Options
from fastckpt.errors import AbandonedError, CheckpointError
from fastckpt.ranks.board import Board, BoardLostError, MemoryBoard, member_key
from fastckpt.ranks.team import Team
from fastckpt.ranks.world import World
from fastckpt.repository import joint_commit
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.joint_commit import JointTurn
from fastckpt.repository.object_board import ObjectBoard
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.memory import MemoryStore
from fastckpt.training.joint_decisions import JointDecisions
from fastckpt.training.save_queue import MAX_JOBS
from fastckpt.writing.rank import SaveAsked
from tests.support.states import sealed
from tests.support.virtual_time import VirtualTime

OPTIONS = Options(threads=1, connections=1)


class Died(BaseException):
    """A rank's process is no more."""


class Requests:
    """Those of one rank, of its board and its store: counted, and the last one at which it dies."""

    def __init__(self) -> None:
        self.n = 0
        self.dies_at: int | None = None
        """It dies instead of making the request of this number."""
        self.died: Callable[[], None] = lambda: None

    def next(self) -> None:
        self.n += 1
        if self.dies_at is not None and self.n >= self.dies_at:
            self.died()
            raise Died


class CountedStore:
    """A store whose requests are those of one rank."""

    def __init__(self, inner: Store, requests: Requests) -> None:
        self._inner, self._requests = inner, requests

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._inner, name)
        if name not in ("put", "put_if_absent", "get", "get_into", "list", "delete", "head"):
            return verb

        def call(*arguments: Any, **settings: Any) -> Any:
            self._requests.next()
            return verb(*arguments, **settings)

        return call


class LatentBoard:
    """A board whose answers take time, and which may be lost to one rank for a while."""

    def __init__(
        self, inner: Board, time: VirtualTime, dice: random.Random, latency_s: float, requests: Requests
    ) -> None:
        self._inner, self._time, self._dice, self._latency_s = inner, time, dice, latency_s
        self._requests = requests
        self.lost: Callable[[], bool] = lambda: False

    def join(self, group: str, member: int, value: bytes) -> None:
        """Two requests, as of a real store."""
        self.put(member_key(group, member), value)
        self.count(group)

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._inner, name)

        def call(*arguments: Any) -> Any:
            self._requests.next()
            self._time.sleep(self._latency_s * self._dice.uniform(0.2, 2))
            if self.lost():
                raise BoardLostError("cut off")
            return verb(*arguments)

        return call


@dataclass
class Job:
    asked: SaveAsked
    turn: JointTurn


@dataclass
class Counts:
    begun_s: float = 0.0


@dataclass
class SimulatedRank:
    """One rank. `outcomes`: what became of each save that it began, by name of the turn and step."""

    world: World
    team: Team
    incarnation: Incarnation
    upload_s: float
    requests: Requests
    outcomes: dict[tuple[str, int], str] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    dead: bool = False
    notice: Any = None
    left_at: int | None = None

    # What JointDecisions asks of a Saver.
    def begin_due(self, asked: SaveAsked, turn: JointTurn) -> Any:
        if len(self.jobs) >= MAX_JOBS:
            self.outcomes[turn.fate._at, asked.step] = "abandoned"
            return None
        return self.begin(asked, None, turn)

    def begin(self, asked: SaveAsked, deadline: Any = None, turn: JointTurn | None = None) -> Any:
        assert turn is not None
        self.counts.begun_s = self.team.clock()
        self.jobs.append(Job(asked, turn))
        return object()

    def __len__(self) -> int:
        return len(self.jobs)

    measured_s: float | None = None


class Simulation:
    """`run` trains, and checks that each save was committed or abandoned by all."""

    def __init__(
        self,
        n: int,
        *,
        seed: int,
        every: Every | None,
        step_s: float = 1.0,
        upload_s: Callable[[int], float] = lambda rank: 2.0,
        skew_s: float = 5.0,
        store: Store | None = None,
    ) -> None:
        self.time, self.dice, self.step_s = VirtualTime(), random.Random(seed), step_s
        joint_commit._random.seed(seed)
        self.store = store or MemoryStore()
        self.ranks: list[SimulatedRank] = []
        board = MemoryBoard()
        self._arrived: dict[int, int] = {}
        epoch = Incarnation(Repository(self.store), OPTIONS, world=n).begin()
        for rank in range(n):
            skew = self.dice.uniform(-skew_s, skew_s)
            requests = Requests()
            latent = LatentBoard(board, self.time, random.Random(seed + rank), 0.002, requests)
            own: Any = CountedStore(self.store, requests)
            objects = ObjectBoard(own, lambda: epoch.number)
            team = Team(
                World(rank, n),
                latent,  # type: ignore[arg-type]
                objects=objects,
                clock=lambda skew=skew: 1000.0 + skew + self.time.now_s,  # type: ignore[misc]
                sleep=self.time.sleep,
            )
            team.hold = lambda seconds: self.time.sleep(min(seconds, 0.01))  # type: ignore[method-assign]
            incarnation = Incarnation(Repository(own), OPTIONS, team=team, sleep=self.time.sleep, clock=team.clock)
            incarnation.adopt(epoch, None)
            one = SimulatedRank(World(rank, n), team, incarnation, upload_s(rank), requests)
            requests.died = functools.partial(setattr, one, "dead", True)
            one.counts.begun_s = team.clock()
            self.ranks.append(one)
        self.every = every

    def run(self, calls: int, limit_s: float = 120.0) -> None:
        for one in self.ranks:
            self._stopped = False
            for part in (self._train, self._speak, self._save):
                self.time.spawn(functools.partial(self._until_it_dies, part, one, calls))
        self.time.run(limit_s)
        self.check()

    def _until_it_dies(self, part: Callable[[SimulatedRank, int], None], one: SimulatedRank, calls: int) -> None:
        with contextlib.suppress(Died):
            part(one, calls)

    def check(self) -> None:
        living = [one for one in self.ranks if not one.dead]
        names = {name for one in living for name in one.outcomes}
        for name in names:
            found = {one.outcomes.get(name, "never heard of") for one in living}
            assert len(found) == 1 or found == {"abandoned", "never heard of"}, (name, found)
        committed = {step for (_, step), what in living[0].outcomes.items() if what == "committed"}
        records = {int(info.key.split("-")[1].split(".")[0]) for info in self.store.list("commits/")}
        assert committed == records - self.tombstones()

    def tombstones(self) -> set[int]:
        return {
            int(info.key.split("-")[1].split(".")[0])
            for info in self.store.list("commits/")
            if b'"fastckpt": "tombstone"' in self.store.get(info.key)
        }

    @property
    def committed(self) -> int:
        return sum(what == "committed" for what in self.ranks[0].outcomes.values())

    # -- the threads of a rank -----------------------------------------------------------------------------------------

    def _train(self, one: SimulatedRank, calls: int) -> None:
        ending = SimpleNamespace(notice_after_step=lambda: one.notice, may_go_early=False)
        torn = SimpleNamespace(trigger_for=lambda step: None)
        engine: Any = SimpleNamespace(team=one.team, queue=one, torn=torn)
        decisions = JointDecisions(engine, one, ending, self.every)  # type: ignore[arg-type]
        before = None
        for number in range(1, calls + 1):
            self.time.sleep(self.step_s * self.dice.uniform(0.8, 1.2))
            try:
                self._collective(number)
            except ConnectionError:
                break
            if one.dead:
                return
            asked = SaveAsked(number)
            decisions.begin_call()
            final = decisions.final()
            if final is not None:
                decisions.begin(asked, final.notice.deadline)
                one.left_at = number
                break
            decisions.save_if_due(before, asked, one.team.clock())
            before = asked
        while one.jobs and not one.dead:
            self.time.sleep(0.5)
        self._leave(one)

    def _collective(self, number: int) -> None:
        """A step ends for all when the last one has come, but that its host may be ahead of the others by a step."""
        self._arrived[number] = self._arrived.get(number, 0) + 1
        while self._arrived[number] < len(self.ranks):
            if any(one.left_at is not None for one in self.ranks):
                return
            if any(one.dead for one in self.ranks):
                raise ConnectionError
            self.time.sleep(0.003)

    _left = 0

    def _leave(self, one: SimulatedRank) -> None:
        self._left += 1
        while self._left < sum(not other.dead for other in self.ranks):
            self.time.sleep(0.5)
        one.team._stop.set()

    def _speak(self, one: SimulatedRank, calls: int) -> None:
        while not one.team._stop.is_set() and not one.dead:
            self.time.sleep(one.team.turn())

    def _save(self, one: SimulatedRank, calls: int) -> None:
        state = {"rank": torch.full((4,), one.world.rank)}
        while not one.team._stop.is_set() and not one.dead:
            if not one.jobs:
                self.time.sleep(0.05)
                continue
            job = one.jobs[0]
            name = (job.turn.fate._at, job.asked.step)
            started_s = self.time.now_s
            self.time.sleep(one.upload_s * self.dice.uniform(0.7, 1.3))
            if one.dead:
                return
            try:
                one.incarnation.save(sealed(state), job.asked, turn=job.turn)
                one.outcomes[name] = "committed"
            except AbandonedError:
                one.outcomes[name] = "abandoned"
            except CheckpointError as error:
                one.outcomes[name] = f"{type(error).__name__}: {error}"
            one.measured_s = self.time.now_s - started_s
            one.jobs.pop(0)


def seeds(given: Sequence[int]) -> Sequence[int]:
    return given
