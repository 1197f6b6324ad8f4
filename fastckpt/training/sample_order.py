"""The order of an epoch's samples: a permutation that is computed place by place, from nothing but length, seed and epoch.

A generalised Feistel network over a rectangle of about √length by √length cells: each round shifts one coordinate by a hash of the other
one, which can be undone whatever the hash is, so every cell goes to exactly one cell. A place that lands outside of the length goes round
again. No list is kept, so 10⁹ samples need no memory, and an epoch is entered anywhere. Integer arithmetic alone: the order is the same
with every version of torch and NumPy, and must stay so, or a resumed run would see samples twice (docs/decisions/0011).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

MAX_LENGTH = 1 << 62
"""The rectangle, which is a little larger, fits 64 bits."""
_ROUNDS = 12
_Words = Any  # np.ndarray of uint64; NumPy's own annotation differs between its versions


class SampleOrder:
    """One epoch's order. Threads: any."""

    def __init__(self, length: int, *, shuffle: bool, seed: int, epoch: int) -> None:
        """length: samples in the epoch, 1 to `MAX_LENGTH`. Without `shuffle` the order is 0, 1, 2, …, whatever seed and epoch are."""
        self._length, self._shuffle = length, shuffle
        self._columns = math.isqrt(length - 1) + 1
        self._rows = -(-length // self._columns)
        self._keys = [_key(seed, epoch, number) for number in range(_ROUNDS)]

    def samples(self, start: int, stop: int) -> list[int]:
        """The samples at the places from `start` to `stop`, without `stop`."""
        if not self._shuffle:
            return list(range(start, stop))
        found = self._walk(np.arange(start, stop, dtype=np.uint64))
        outside = np.flatnonzero(found >= self._length)
        while len(outside):
            found[outside] = self._walk(found[outside])
            outside = outside[found[outside] >= self._length]
        samples: list[int] = found.tolist()
        return samples

    def _walk(self, places: _Words) -> _Words:
        """Where the cells of the rectangle go, once."""
        columns, rows = np.uint64(self._columns), np.uint64(self._rows)
        row, column = places // columns, places % columns
        for number, key in enumerate(self._keys):
            if number % 2:
                row = (row + _mixed(column + key) % rows) % rows
            else:
                column = (column + _mixed(row + key) % columns) % columns
        return row * columns + column


def _key(seed: int, epoch: int, number: int) -> np.uint64:
    text = f"fastckpt order 1, seed {seed}, epoch {epoch}, round {number}"
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def _mixed(words: _Words) -> _Words:
    """The finaliser of SplitMix64: every bit of a word changes every other one with a probability of about one half."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
