"""What finished puts say of the way to a store, and what follows for packs and connections. Pure: the caller tells the time.

A put of a pack says how many bytes a second one connection carries. Many puts while all connections are busy say how many all carry
together. With more connections that sum grows as long as each one is held back by something of its own (a window, a server's limit); once
the link itself is full, it does not, and further connections only take memory.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastckpt.options import MAX_PACK_BYTES, MIN_PACK_BYTES

_PACK_S = 2.0
"""How long the put of one pack should take at most: what a retry repeats, and what is lost when a connection breaks."""
_NEW = 0.3
"""The weight of the newest put in the mean."""
_ROUNDS = 3
"""Packs for each connection in one measurement."""
_SHORTEST_S = 0.5
_GROWTH = 1.5
_WORTH = 1.1
"""More connections must carry this many times as much as before; otherwise the link was full already."""
_SAME = 0.97
_REST = 8
"""Measurements between two tries of another number, while the number is right."""


class _Window(NamedTuple):
    """A measurement under way."""

    begun_s: float
    packs: int = 0
    n_bytes: int = 0


class Link:
    """See the module. Used under the lock of its owner."""

    def __init__(self, connections: int, most: int) -> None:
        """connections: the number to begin with. most: the largest number; if it is not larger, the number stays as it is."""
        self.connections = connections
        self._most, self._least = max(most, connections), min(2, connections)
        self._follows = most > connections
        self.connection_bytes_per_s: float | None = None
        """What one connection carries; None: not known yet."""
        self.bytes_per_s: float | None = None
        """What all carry together, as it was measured last while all were busy; None: not known yet."""
        self._window: _Window | None = None
        self._before: tuple[int, float] | None = None
        """The number of connections before the one that is being tried, and what they carried."""
        self._rest, self._upwards = 0, True
        """Measurements until another number is tried, and in which direction the last try was."""

    def put_finished(self, now_s: float, n_bytes: int, seconds: float, *, busy: bool) -> None:
        """A put of a pack has succeeded. busy: all connections had packs to send until now."""
        rate = n_bytes / max(seconds, 1e-6)
        known = self.connection_bytes_per_s
        self.connection_bytes_per_s = rate if known is None else known + _NEW * (rate - known)
        if not busy:
            self._window = None
            return
        window = self._window or _Window(now_s - seconds)
        self._window = window = window._replace(packs=window.packs + 1, n_bytes=window.n_bytes + n_bytes)
        if window.packs >= _ROUNDS * self.connections and now_s - window.begun_s >= _SHORTEST_S:
            self._window = _Window(now_s)
            self._measured(window.n_bytes / (now_s - window.begun_s))

    def _measured(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        if not self._follows:
            return
        if self._before is not None:
            number, before = self._before
            self._before = None
            grown = number < self.connections
            if bytes_per_s < before * (_WORTH if grown else _SAME):
                self.connections, self._rest = number, _REST
            elif grown:
                self._try(math.ceil(self.connections * _GROWTH), bytes_per_s)
            else:
                self._rest = _REST
        elif self._rest:
            self._rest -= 1
            if not self._rest:  # fewer take less memory; more may carry more meanwhile
                self._upwards = not self._upwards
                more = math.ceil(self.connections * _GROWTH)
                self._try(more if self._upwards else math.floor(self.connections / _GROWTH), bytes_per_s)
        else:
            self._try(math.ceil(self.connections * _GROWTH), bytes_per_s)

    def _try(self, number: int, bytes_per_s: float) -> None:
        number = max(self._least, min(number, self._most))
        if number == self.connections:
            self._rest = _REST
            return
        self._before = self.connections, bytes_per_s
        self.connections = number

    @property
    def upcoming(self) -> int:
        """The number of connections that may be tried next."""
        return min(self._most, math.ceil(self.connections * _GROWTH))

    def pack_bytes(self, left_bytes: int, most_bytes: int) -> int:
        """The length of the next pack. left_bytes: all that is still to be sent. most_bytes: what the memory allows.

        Short enough that the connections finish together, that a repeated put costs little, and that the memory holds a pack for each;
        never shorter than one chunk, because a chunk does not cross the border of a pack.
        """
        wanted = min(most_bytes, MAX_PACK_BYTES, left_bytes // (2 * self.connections))
        if self.connection_bytes_per_s is not None:
            wanted = min(wanted, int(_PACK_S * self.connection_bytes_per_s))
        return max(MIN_PACK_BYTES, wanted)
