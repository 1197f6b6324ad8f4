"""One save of thousands of ranks, event by event: real code of fates, pulses, agreement and commits, under virtual time.

What is real: `Fate`, `Pulse`, `Agreement`, `Team.turn`, `Cancelled`, `JointCommit`, the commit record. What is not: uploads are times
drawn by chance, votes in the store are a few bytes, and requests take the seconds that stand below. An effect is seen by others when its
request is over.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from fastckpt import Options
from fastckpt.errors import AbandonedError, ObjectExistsError
from fastckpt.events import logger
from fastckpt.format.directory import Directory
from fastckpt.format.keys import VOTES, SaveId, VoteName, commit_key, vote_key
from fastckpt.format.repository_records import Commit, parse_commit_record
from fastckpt.format.shares import GroupClaim
from fastckpt.format.vote import SaveInfo, Vote, save_to_json
from fastckpt.ranks.agreement import Wish
from fastckpt.ranks.board import ANSWER_S, BoardLostError, MemoryBoard
from fastckpt.ranks.team import Team
from fastckpt.ranks.world import World
from fastckpt.repository import commit as commit_module
from fastckpt.repository import joint_commit
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.joint_commit import Cancelled, JointCommit
from fastckpt.repository.object_board import ObjectBoard
from fastckpt.repository.repository import Repository
from fastckpt.store.base import ObjectInfo
from fastckpt.store.memory import MemoryStore

OF_STORE_S = 0.03
"""One request of an object store, and one page of a LIST three times that."""
OF_BOARD_S = 0.0005
PAGE = 1000
RANKS_OF_A_NODE = 8
KEYS_OF_A_REQUEST = 1024
LIMIT_S = 120.0
OPTIONS = Options(threads=1, connections=1)


class Died(Exception):
    """The rank whose code runs is no more."""


@dataclass
class Now:
    """Who acts, and when: the time of its request is that of the event and of the requests before it."""

    event_s: float = 0.0
    busy_s: float = 0.0
    rank: int = -1
    activity: str = ""

    @property
    def s(self) -> float:
        return self.event_s + self.busy_s


class CountingStore(MemoryStore):
    """Counts requests by rank and activity; what was put is there when the put is over."""

    def __init__(self, now: Now) -> None:
        super().__init__()
        self._now, self._counted = now, threading.Lock()
        self.of_rank: dict[str, Counter[int]] = {}
        self.of_verb: Counter[tuple[str, str]] = Counter()
        self.of_second: Counter[tuple[str, int]] = Counter()
        self._from_s: dict[str, float] = {}

    def count(self, verb: str, n: int = 1, each_s: float = OF_STORE_S) -> None:
        now = self._now
        with self._counted:
            polls = "votes" if verb == "GET of votes" else now.activity
            self.of_rank.setdefault(polls, Counter())[now.rank] += n
            self.of_verb[now.activity, verb] += n
            self.of_second[verb, int(now.s)] += n
            pooled = threading.current_thread() is not threading.main_thread()
            now.busy_s += n * each_s / (commit_module._READS_AT_ONCE if pooled else 1)

    def put(self, key: str, data: Any) -> None:
        self.count("PUT")
        super().put(key, data)
        self._from_s[key] = self._now.s

    def put_if_absent(self, key: str, data: Any) -> None:
        self.count("PUT")
        try:
            super().put_if_absent(key, data)
        except ObjectExistsError:  # the other put is over first
            self._now.busy_s = max(self._now.busy_s, self._from_s[key] - self._now.event_s)
            raise
        self._from_s[key] = self._now.s

    def _find(self, key: str) -> tuple[bytes, float]:
        found = super()._find(key)
        if self._from_s.get(key, 0.0) > self._now.s:
            raise commit_module.ObjectNotFoundError(f"{key} is not there yet")
        return found

    def get(self, key: str) -> bytes:
        self.count("GET of votes" if key.startswith(VOTES) else "GET")
        return super().get(key)

    def head(self, key: str) -> ObjectInfo:
        self.count("HEAD")
        return super().head(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found = [one for one in super().list(prefix) if self._from_s.get(one.key, 0.0) <= self._now.s]
        self.count("LIST", max(1, -(-len(found) // PAGE)), 3 * OF_STORE_S)
        return iter(found)


class CountingBoard(MemoryBoard):
    """Counts what `StoreBoard` would ask a TCPStore; lost to all from a moment on."""

    def __init__(self, now: Now, lost_from_s: float) -> None:
        super().__init__()
        self._now, self._lost_from_s = now, lost_from_s
        self.of_second: Counter[tuple[str, int]] = Counter()
        self.told_of_second: Counter[tuple[str, int]] = Counter()
        """Those that nobody waits for: `set`."""
        self._known: set[int] = set()
        self._from_s: dict[str, float] = {}

    def _ask(self, n: int, *, answered: bool = True) -> None:
        now = self._now
        if now.s >= self._lost_from_s:
            if now.rank not in self._known:  # later ones fail at once: the first is still without an answer
                self._known.add(now.rank)
                now.busy_s += ANSWER_S
            raise BoardLostError("its host is gone")
        (self.of_second if answered else self.told_of_second)[now.activity, int(now.s)] += n
        now.busy_s += n * OF_BOARD_S

    def put(self, key: str, value: bytes) -> None:
        self._ask(1, answered=False)
        self._values[key] = value
        self._from_s.setdefault(key, self._now.s)

    def put_once(self, key: str, value: bytes) -> bytes:
        self._ask(1)
        self._from_s.setdefault(key, self._now.s)
        return self._values.setdefault(key, value)

    def get(self, key: str) -> bytes | None:
        found = self._seen(key)
        self._ask(1 if found is None else 2)
        return found

    def _seen(self, key: str) -> bytes | None:
        return self._values.get(key) if self._from_s.get(key, 0.0) <= self._now.s else None

    def get_all(self, keys: Sequence[str]) -> list[bytes] | None:
        found: list[bytes] = []
        for first in range(0, len(keys), KEYS_OF_A_REQUEST):
            part = [self._seen(key) for key in keys[first : first + KEYS_OF_A_REQUEST]]
            if None in part:
                self._ask(1)
                return None
            self._ask(2)
            found += [value for value in part if value is not None]
        self._now.busy_s += sum(map(len, found)) / 100e6
        return found

    def has_all(self, keys: Sequence[str]) -> bool:
        for first in range(0, len(keys), KEYS_OF_A_REQUEST):
            self._ask(1)
            if any(self._seen(key) is None for key in keys[first : first + KEYS_OF_A_REQUEST]):
                return False
        return True

    def join(self, group: str, member: int, value: bytes) -> None:
        self.put(f"{group}/{member}", value)
        self._ask(1)
        self._joined[group] = self._joined.get(group, 0) + 1

    def n_joined(self, group: str) -> int:
        self._ask(1)
        return self._joined.get(group, 0)

    def delete(self, keys: Sequence[str]) -> None:
        self._ask(len(keys))
        for key in keys:
            self._values.pop(key, None)


def in_a_second(counted: Counter[tuple[str, int]], *names: str) -> int:
    """Most requests in one second; of these activities or verbs, or of all."""
    totals: Counter[int] = Counter()
    for (name, second), n in counted.items():
        if not names or name in names:
            totals[second] += n
    return max(totals.values(), default=0)


@dataclass
class Plan:
    """What happens to the ranks of one save."""

    size: int
    seed: int = 0
    upload_s: tuple[float, float] = (10.0, 20.0)
    """The shortest and the longest upload."""
    lost_from_s: float = float("inf")
    dead: dict[int, float] = field(default_factory=dict)
    """Rank → when it dies."""
    dies_before_put: bool = False
    """Whoever decides that it is committed dies then."""


class Save:
    """One save of all ranks. `run` returns what it took."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.dice, self.now = plan, random.Random(plan.seed), Now()
        joint_commit._random.seed(plan.seed)
        self.store, self.board = CountingStore(self.now), CountingBoard(self.now, plan.lost_from_s)
        self.epoch = Incarnation(Repository(self.store), OPTIONS, world=plan.size).begin()
        self.store.of_rank.clear()
        self.store.of_verb.clear()
        self.store.of_second.clear()
        self.save = SaveId(self.epoch.number, 1000, 0)
        self.heap: list[tuple[float, int, int, Callable[[int], float | None]]] = []
        self._numbers = itertools.count()
        self.teams = [self._team(rank) for rank in range(plan.size)]
        self.votes: dict[str, Vote] = {}
        self.commits: dict[int, JointCommit] = {}
        self.knew_s: dict[int, float] = {}
        self.outcomes: dict[int, str] = {}
        self.voted_s: dict[int, float] = {}
        self.real_s: Counter[int] = Counter()
        """Of this machine's processor, by rank."""
        self.dead = dict(plan.dead)
        self.everybody = tuple(range(plan.size))
        self.waiting = set(self.everybody)
        """Ranks that live and do not know what has become of the save."""

    def _team(self, rank: int) -> Team:
        world = World(rank, self.plan.size, rank % RANKS_OF_A_NODE, min(RANKS_OF_A_NODE, self.plan.size))
        objects = ObjectBoard(self.store, lambda: self.epoch.number)
        return Team(world, self.board, objects=objects, clock=lambda: self.now.s, sleep=lambda seconds: None)

    def at(self, when_s: float, rank: int, call: Callable[[int], float | None]) -> None:
        heapq.heappush(self.heap, (when_s, next(self._numbers), rank, call))

    def run(self) -> dict[str, Any]:
        shortest_s, longest_s = self.plan.upload_s
        for rank in range(self.plan.size):
            self.at(self.dice.uniform(0, 8), rank, self._speak)
            self.at(self.dice.uniform(0, 1), rank, self._begin)
            self.at(self.dice.uniform(shortest_s, longest_s), rank, self._vote)
        with self._fakes():
            while self.waiting:
                when_s, _, rank, call = heapq.heappop(self.heap)
                assert when_s < LIMIT_S, f"not over after {LIMIT_S} s"
                if when_s < self.dead.get(rank, float("inf")):
                    self._act(when_s, rank, call)
                else:
                    self.waiting.discard(rank)
        return self.result()

    def _act(self, when_s: float, rank: int, call: Callable[[int], float | None]) -> None:
        self.now.event_s, self.now.busy_s, self.now.rank = when_s, 0.0, rank
        try:
            pause_s = call(rank)
        except Died:
            self.dead[rank] = self.now.s
            self.waiting.discard(rank)
            return
        if pause_s is not None:
            self.at(self.now.s + pause_s, rank, call)

    @contextlib.contextmanager
    def _fakes(self) -> Iterator[None]:
        real = joint_commit.commit_votes

        def commit_votes(store: Any, votes: Sequence[Vote], seen_s: float | None = None) -> Commit:
            if self.plan.dies_before_put and self.now.rank == 0:
                raise Died
            return real(store, votes, seen_s)

        def read_vote(store: Any, name: VoteName, listed: Any = None) -> Vote:
            store.get(vote_key(name))
            return self.votes[vote_key(name)]

        @functools.cache
        def parse(data: bytes, checkpoint: Any, source: str) -> Any:
            return parse_commit_record(data, checkpoint, source)

        level = logger.level
        logger.setLevel(100)
        try:
            with (
                mock.patch.object(joint_commit, "commit_votes", commit_votes),
                mock.patch.object(commit_module, "read_vote", read_vote),
                mock.patch.object(commit_module, "parse_commit_record", parse),  # the same bytes by each rank
            ):
                yield
        finally:
            logger.setLevel(level)

    # -- what a rank does ----------------------------------------------------------------------------------------------

    def _speak(self, rank: int) -> float | None:
        self.now.activity = "beats and wishes"
        return self.teams[rank].turn()

    def _begin(self, rank: int) -> float | None:
        """The call of save: from then on the upload asks whether to end early."""
        self.now.activity = "commit"
        fate = self.teams[rank].fate("7.0")
        with contextlib.suppress(BoardLostError):
            fate.begin(self.save.step)
        cancelled = Cancelled(fate, lambda: False, lambda: self.now.s, self.plan.size)

        def ask(rank: int) -> float | None:
            self.now.activity = "commit"
            if rank in self.voted_s or rank in self.knew_s:
                return None
            if cancelled():
                self._knows(rank, "abandoned")
            return 1.0

        self.at(self.now.s + self.dice.random(), rank, ask)
        return None

    def _vote(self, rank: int) -> float | None:
        if rank in self.knew_s:
            return None
        self.now.activity = "commit"
        vote = self._made(rank)
        self.votes[vote_key(vote.name)] = vote
        self.store.put(vote_key(vote.name), b"a vote")
        self.voted_s[rank] = self.now.s
        team = self.teams[rank]
        incarnation = Incarnation(Repository(self.store), OPTIONS, team=team)
        incarnation.adopt(self.epoch, None)
        part = JointCommit(self.store, team, team.fate("7.0"), incarnation.acknowledge, lambda: False, timeout_s=600)

        def look(rank: int) -> float | None:
            self.now.activity = "commit"
            began_s = time.perf_counter()
            try:
                found = part.look(vote)
            except AbandonedError:
                self._knows(rank, "abandoned")
                return None
            finally:
                took_s = time.perf_counter() - began_s
                self.real_s[rank] += took_s
            if isinstance(found, Commit):
                self._knows(rank, "committed")
                return None
            return found

        self.at(self.now.s, rank, look)
        return None

    def _knows(self, rank: int, what: str) -> None:
        self.knew_s[rank], self.outcomes[rank] = self.now.s, what
        self.waiting.discard(rank)
        with contextlib.suppress(BoardLostError):
            self.teams[rank].fate("7.0").forget()

    def _made(self, rank: int) -> Vote:
        """A vote whose summary has the size of a real one's."""
        digits = self.dice.getrandbits(128)
        name = VoteName(self.save, rank, self.plan.size, 1_234_567, f"{digits:032x}")
        info = SaveInfo(self.save, None, "interval", {}, 9_876_543_210, 7_654_321_098, 17.125, "2026-01-01T00:00:00Z")
        directory = Directory(
            (),
            (),
            step=self.save.step,
            rank=rank,
            world=self.plan.size,
            writer={"name": "fastckpt", "version": "1.0.0", "python": "3.11.9", "host": "node"},
            save=save_to_json(info),
        )
        parts = {
            part: (1_000_000 + n, 123_456) for n, part in enumerate(("directory", "file table", "records", "skeleton"))
        }
        pair = rank - rank % RANKS_OF_A_NODE
        groups = (
            GroupClaim(self.everybody, "0" * 32),  # as in DistributedDataParallel
            GroupClaim(
                tuple(range(pair, min(pair + RANKS_OF_A_NODE, self.plan.size))), "1" * 32
            ),  # as in hybrid shards
        )
        return Vote(name, info, directory, parts, (), groups)

    # -- what it took --------------------------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        living = [rank for rank in range(self.plan.size) if rank not in self.dead]
        outcomes = {self.outcomes[rank] for rank in living}
        assert len(outcomes) == 1, f"ranks do not agree: {Counter(self.outcomes.values())}"
        of_rank = self.store.of_rank.get("commit", Counter())
        key = commit_key(self.save.checkpoint)
        with contextlib.suppress(commit_module.ObjectNotFoundError):
            self.now.event_s = LIMIT_S
        record = MemoryStore.get(self.store, key) if key in self.store._objects else b""
        read = sum(self.store.of_rank.get("votes", Counter()).values())
        since_s = max(*self.voted_s.values(), *self.dead.values(), self._lost_s())
        return {
            "ranks": self.plan.size,
            "outcome": outcomes.pop(),
            "store requests per rank, mean": round((sum(of_rank.values()) + read) / self.plan.size, 2),
            "store requests per rank, median": sorted(of_rank.get(rank, 0) for rank in living)[len(living) // 2],
            "store requests of the busiest rank, votes read apart": max(of_rank.values(), default=0),
            "store requests by verb": {
                verb: n for (what, verb), n in sorted(self.store.of_verb.items()) if what == "commit"
            },
            "most GET and HEAD in a second": in_a_second(self.store.of_second, "GET", "HEAD", "GET of votes"),
            "most PUT in a second": in_a_second(self.store.of_second, "PUT"),
            "most LIST pages in a second": in_a_second(self.store.of_second, "LIST"),
            "board requests in the busiest second": in_a_second(self.board.of_second),
            "board sets in the busiest second": in_a_second(self.board.told_of_second),
            "board requests per second, mean": round(sum(self.board.of_second.values()) / max(self.knew_s.values())),
            "seconds until all know": round(max(self.knew_s[rank] for rank in living) - since_s, 1),
            "seconds until half know": round(
                sorted(self.knew_s[rank] for rank in living)[len(living) // 2] - since_s, 1
            ),
            "commit record, bytes": len(record),
            "processor seconds of the committer": round(max(self.real_s.values(), default=0), 2),
            "board keys left": len(self.board._values),
        }

    def _lost_s(self) -> float:
        return 0.0 if self.plan.lost_from_s == float("inf") else self.plan.lost_from_s


SCENARIOS: dict[str, Callable[[int], Plan]] = {
    "the board is healthy": Plan,
    "the board is lost halfway": lambda size: Plan(size, lost_from_s=15.0),
    "rank 0 dies between fate and put": lambda size: Plan(size, dies_before_put=True),
    "one rank dies while it uploads": lambda size: Plan(size, dead={size // 2 + 1: 9.0}),
}


def agreement(size: int, seed: int = 0, *, idle_s: float = 30.0, step_s: float = 1.0) -> dict[str, Any]:
    """One round: requests of the board idle and during it, and for how long a call of `step` is held."""
    save = Save(Plan(size, seed))
    dice, now = random.Random(seed), save.now
    held_s: Counter[int] = Counter()
    begun: dict[int, float] = {}
    decided: dict[int, int] = {}
    missed: set[int] = set()

    def speak(rank: int) -> float | None:
        now.activity = "beats and wishes"
        return save.teams[rank].turn()

    def train(rank: int) -> float | None:
        """A call of `step`, a second after the end of the one before; while it is held it looks again."""
        team = save.teams[rank]
        if rank not in begun:
            begun[rank] = now.s
            team.agreement.begin_call()
        if team.agreement.must_wait() > 0:
            return 0.05
        held_s[rank] = max(held_s[rank], now.s - begun.pop(rank))
        decision, past = team.agreement.due()
        if past:
            missed.add(rank)
        if decision is not None and decision.calls is not None:
            decided[rank] = decision.calls
        return step_s * dice.uniform(0.95, 1.05)

    for rank in range(size):
        save.at(dice.uniform(0, 8), rank, speak)
        save.at(dice.uniform(0, 0.2), rank, train)
    wished = False
    while save.heap and (len(decided) + len(missed) < size):
        when_s, _, rank, call = heapq.heappop(save.heap)
        assert when_s < LIMIT_S, "no decision"
        if not wished and when_s > idle_s:
            wished = True
            save.teams[size // 3].agreement.wish(Wish("interval", size // 3))
        save._act(when_s, rank, call)
    per_second: Counter[int] = Counter()
    for (_, second), n in save.board.of_second.items():
        per_second[second] += n
    idle = [per_second[second] for second in range(10, int(idle_s))]
    return {
        "ranks": size,
        "board requests per second, idle": round(sum(idle) / len(idle)),
        "board requests in the busiest second of a round": max(
            per_second[s] for s in range(int(idle_s), int(now.s) + 1)
        ),
        "seconds from the wish to the save": round(now.s - idle_s, 1),
        "longest hold of a step, seconds": round(max(held_s.values()), 2),
        "ranks that missed the call": len(missed),
    }


def one_save(name: str, size: int, seed: int = 0) -> dict[str, Any]:
    plan = SCENARIOS[name](size)
    plan.seed = seed
    began_s = time.perf_counter()
    found = Save(plan).run()
    return {"scenario": name, **found, "simulated in seconds": round(time.perf_counter() - began_s, 1)}


if __name__ == "__main__":
    import json
    import sys

    for size in map(int, sys.argv[1:]):
        for name in SCENARIOS:
            print(json.dumps(one_save(name, size), indent=1), flush=True)
        print(json.dumps(agreement(size), indent=1), flush=True)
