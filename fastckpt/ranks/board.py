"""Where ranks tell each other small things: keys and bytes, seen by all of a job.

Nothing here waits for another rank: whoever expects a key looks again. So a rank that dies keeps nobody waiting, and one connection serves
all threads of a rank.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import queue
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from fastckpt.errors import CheckpointError

T = TypeVar("T")
ANSWER_S = 2.0
"""How long a store may take for one answer. It takes 0.1 ms; a machine whose cores are all busy, some 100 ms."""
SLOW_S = 1.0
_random = random.Random()  # of our own: drawing from the global one would change what training draws
_AT_ONCE = 1024
"""Keys of one request."""
_DELETED_AT_ONCE = 256
"""Each is a request of its own, of 0.1 ms or more, and all have to be over within ANSWER_S."""


class BoardLostError(CheckpointError):
    """The board does not answer: its host is gone, or cannot be reached."""


def member_key(group: str, member: int) -> str:
    """The key of one member of a group."""
    return f"{group}/{member}"


class Board(Protocol):
    """See the module. Any thread. Every method may raise BoardLostError; then it is not known whether a write was seen."""

    def put(self, key: str, value: bytes) -> None:
        """Write a key, which may have been written before."""
        ...

    def put_once(self, key: str, value: bytes) -> bytes:
        """Write a key unless somebody has: the value that stands, of whoever was first."""
        ...

    def get(self, key: str) -> bytes | None:
        """The value of a key; None where there is none yet."""
        ...

    def get_all(self, keys: Sequence[str]) -> list[bytes] | None:
        """Values of keys; None if one of them is not there yet."""
        ...

    def has_all(self, keys: Sequence[str]) -> bool:
        """Whether all these keys are there."""
        ...

    def join(self, group: str, member: int, value: bytes) -> None:
        """Write the key `member_key(group, member)`, which is then counted. Written again, it may be counted again."""
        ...

    def n_joined(self, group: str) -> int:
        """How many members have joined a group: exact, or too many after answers that were lost, or too few if a member has died between
        its value and its count: then `missing_members` names nobody.
        """
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Remove keys that nobody reads any more."""
        ...


def missing_members(board: Board, group: str, size: int, most: int) -> list[int]:
    """The first `most` members of a group that have written nothing, by halves: some ten requests for each."""
    found: list[int] = []
    parts = [range(first, min(size, first + _AT_ONCE)) for first in range(0, size, _AT_ONCE)]
    parts.reverse()
    while parts and len(found) < most:
        part = parts.pop()
        if board.has_all([member_key(group, member) for member in part]):
            continue
        if len(part) == 1:
            found.append(part[0])
        else:
            half = len(part) // 2
            parts += [part[half:], part[:half]]
    return found


class StoreBoard:
    """A board on a store of torch.distributed. Its requests run in a thread of its own, which is left behind if the store hangs."""

    def __init__(self, store: Any, prefix: str, answer_s: float = ANSWER_S) -> None:
        """Begin to use a store.

        Args:
            store: of torch.distributed; used by nobody else from now on, or safe to be used by several threads.
            prefix: of all keys: a job may have several boards in one store.
            answer_s: seconds after which a request that has no answer is given up.
        """
        self._store, self._prefix, self._answer_s = store, prefix, answer_s
        self._requests: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stuck = threading.Event()
        """A request was given up and has had no answer yet: those behind it would wait for it."""
        threading.Thread(target=_serve, args=(self._requests,), name="fastckpt-board", daemon=True).start()
        self._end = weakref.finalize(self, self._requests.put, None)
        self._owner: StoreBoard | None = None
        """Whose thread this uses; None: its own."""

    def beside(self, prefix: str) -> StoreBoard:
        """Another board in the same store, by the same connection and thread, which end with this one."""
        other = copy.copy(self)
        other._prefix, other._owner = prefix, self
        return other

    def put(self, key: str, value: bytes) -> None:
        self._ask(lambda store: store.set(self._prefix + key, value))

    def put_once(self, key: str, value: bytes) -> bytes:
        # A key that is not there equals "", and nobody writes an empty value.
        return bytes(self._ask(lambda store: store.compare_set(self._prefix + key, "", value)))

    def get(self, key: str) -> bytes | None:
        found = self.get_all([key])
        return None if found is None else found[0]

    def get_all(self, keys: Sequence[str]) -> list[bytes] | None:
        found: list[bytes] = []
        for first in range(0, len(keys), _AT_ONCE):
            part = [self._prefix + key for key in keys[first : first + _AT_ONCE]]
            values = self._ask(functools.partial(_values, keys=part))
            if values is None:
                return None
            found += values
        return found

    def has_all(self, keys: Sequence[str]) -> bool:
        named = [self._prefix + key for key in keys]
        parts = [named[first : first + _AT_ONCE] for first in range(0, len(named), _AT_ONCE)]
        return all(self._ask(functools.partial(_are_there, keys=part)) for part in parts)

    def join(self, group: str, member: int, value: bytes) -> None:
        self.put(member_key(group, member), value)
        self._ask(lambda store: store.add(f"{self._prefix}{group}/joined", 1))

    def n_joined(self, group: str) -> int:
        return int(self._ask(lambda store: store.add(f"{self._prefix}{group}/joined", 0)))

    def delete(self, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), _DELETED_AT_ONCE):
            part = [self._prefix + key for key in keys[first : first + _DELETED_AT_ONCE]]
            self._ask(functools.partial(_delete, keys=part))

    def close(self) -> None:
        """End the thread, after what it is doing. May be called twice."""
        self._end()

    def _ask(self, request: Callable[[Any], T]) -> T:
        if self._stuck.is_set():
            raise BoardLostError("the store of the process group has not answered an earlier request yet")
        done = threading.Event()
        answer: list[T] = []
        error: list[BaseException] = []
        given_up: list[bool] = []

        def run() -> None:
            try:
                answer.append(request(self._store))
            except BaseException as raised:
                error.append(raised)
            done.set()
            if given_up:
                self._stuck.clear()

        self._requests.put(run)
        if not done.wait(self._answer_s):
            given_up.append(True)
            if not done.is_set():
                self._stuck.set()
                if done.is_set():  # it came between the two
                    self._stuck.clear()
                raise BoardLostError(f"the store of the process group has not answered within {self._answer_s:g} s")
        if error:
            raise BoardLostError(
                f"the store of the process group does not answer: {type(error[0]).__name__}: {error[0]}"
            ) from error[0]
        return answer[0]


def _serve(requests: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (request := requests.get()) is not None:
        request()


def _values(store: Any, keys: list[str]) -> list[bytes] | None:
    # `get` waits for a key that is not there, and with it everybody who uses this connection.
    return [bytes(value) for value in store.multi_get(keys)] if store.check(keys) else None


def _are_there(store: Any, keys: list[str]) -> bool:
    return bool(store.check(keys))


def _delete(store: Any, keys: list[str]) -> None:
    for key in keys:
        store.delete_key(key)


class FallbackBoard:
    """A board, and a slower one for when it is lost. For one thread.

    A rank that still reaches the first one cannot know that another does not: if it lacks answers, it is in `doubt`, and uses both.
    """

    def __init__(self, first: Board, second: Board, clock: Callable[[], float], slow_s: float = SLOW_S) -> None:
        """clock: seconds. slow_s: between two looks for the same key on the second board."""
        self._first, self._second, self._clock, self._slow_s = first, second, clock, slow_s
        self.doubts = False
        """Whether the second one is used as well."""
        self._asked_s: dict[str, float] = {}
        """Keys that were not on the second board, and when that was found."""
        self._missed: list[Callable[[Board], object]] = []
        """What was written to the second board alone: rounds are counted, and whoever was not cut off has to count them too."""

    def put(self, key: str, value: bytes) -> None:
        self._write(lambda board: board.put(key, value))

    def put_once(self, key: str, value: bytes) -> bytes:
        return self._write(lambda board: board.put_once(key, value))

    def join(self, group: str, member: int, value: bytes) -> None:
        self._write(lambda board: board.join(group, member, value))

    def delete(self, keys: Sequence[str]) -> None:
        self._write(lambda board: board.delete(keys))

    def get(self, key: str) -> bytes | None:
        lost = None
        try:
            self._catch_up()
            found = self._first.get(key)
        except BoardLostError as error:
            found, lost = None, error
        if found is None and (lost or self.doubts):
            found = self._slowly(key)
        return found

    def get_all(self, keys: Sequence[str]) -> list[bytes] | None:
        if not self.doubts:
            with contextlib.suppress(BoardLostError):
                self._catch_up()
                return self._first.get_all(keys)
        found = [self.get(key) for key in keys]
        return None if None in found else [value for value in found if value is not None]

    def has_all(self, keys: Sequence[str]) -> bool:
        if not self.doubts:
            with contextlib.suppress(BoardLostError):
                return self._first.has_all(keys)
        return all(self.get(key) is not None for key in keys)

    def n_joined(self, group: str) -> int:
        try:
            found = self._first.n_joined(group)
        except BoardLostError:
            return self._second.n_joined(group)
        # Some may have joined here and some there: who reads them all finds out.
        return found + self._second.n_joined(group) if self.doubts else found

    def _write(self, write: Callable[[Board], T]) -> T:
        try:
            self._catch_up()
            result = write(self._first)
        except BoardLostError:
            result = write(self._second)
            self._missed.append(write)
            return result
        if self.doubts:
            write(self._second)
        return result

    def _catch_up(self) -> None:
        while self._missed:
            self._missed[0](self._first)
            self._missed.pop(0)

    def _slowly(self, key: str) -> bytes | None:
        """From the second board, whose requests cost money."""
        now_s = self._clock()
        if (
            self._slow_s > SLOW_S and key not in self._asked_s
        ):  # thousands of ranks have lost the first at the same moment
            self._asked_s[key] = now_s - self._slow_s * _random.random()
        if now_s - self._asked_s.get(key, -self._slow_s) < self._slow_s:
            return None
        found = self._second.get(key)
        self._asked_s = {} if found is not None or len(self._asked_s) > _AT_ONCE else {**self._asked_s, key: now_s}
        return found


class MemoryBoard:
    """A board for ranks that are threads of one process: for tests and simulations."""

    def __init__(self) -> None:
        """Make an empty one."""
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        self._joined: dict[str, int] = {}
        self.requests = 0
        """How many there have been."""

    def put(self, key: str, value: bytes) -> None:
        with self._lock:
            self.requests += 1
            self._values[key] = value

    def put_once(self, key: str, value: bytes) -> bytes:
        with self._lock:
            self.requests += 1
            return self._values.setdefault(key, value)

    def get(self, key: str) -> bytes | None:
        with self._lock:
            self.requests += 1
            return self._values.get(key)

    def get_all(self, keys: Sequence[str]) -> list[bytes] | None:
        with self._lock:
            self.requests += 1
            found = [self._values[key] for key in keys if key in self._values]
        return found if len(found) == len(keys) else None

    def has_all(self, keys: Sequence[str]) -> bool:
        with self._lock:
            self.requests += 1
            return all(key in self._values for key in keys)

    def join(self, group: str, member: int, value: bytes) -> None:
        self.put(member_key(group, member), value)
        self.count(group)

    def count(self, group: str) -> None:
        """Count one more member: the second half of `join`."""
        with self._lock:
            self._joined[group] = self._joined.get(group, 0) + 1

    def n_joined(self, group: str) -> int:
        with self._lock:
            self.requests += 1
            return self._joined.get(group, 0)

    def delete(self, keys: Sequence[str]) -> None:
        with self._lock:
            self.requests += 1
            for key in keys:
                self._values.pop(key, None)

    def close(self) -> None:
        """Nothing to do."""
