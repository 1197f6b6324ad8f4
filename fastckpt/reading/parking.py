"""Stored bytes that have come before the others of their chain: kept, as far as there is room, until the chain can be decoded.

    range 1 (deltas) ── keep copies ──┐
    range 2 (bases)  ─────────────────┴─→ whole: each chain for the thread that brought its last row

Nobody waits: a row for which there is no room counts as come, and whoever decodes the chain reads it again.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from fastckpt._types import U8
from fastckpt.reading.ranges import Range


class _Kept:
    """A copy of stored bytes, and the number of chains that will need it."""

    def __init__(self, view: U8, takers: int) -> None:
        self.view, self.takers = view, takers


class Parking:
    """See the module. Any number of threads at once."""

    def __init__(self, ranges: Sequence[Range], limit_bytes: int) -> None:
        """ranges: all that will come, each once. limit_bytes: most memory of what is kept."""
        self._lock = threading.Lock()
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._missing = Counter(chain for one in ranges for part in one.parts for chain, _ in part.takers)
        """Rows of each chain that have not come."""
        self._kept: dict[int, dict[int, _Kept]] = defaultdict(dict)

    def bring(self, range_: Range, stored: Mapping[int, U8]) -> dict[int, dict[int, U8]]:
        """A range has come.

        Args:
            range_: the range.
            stored: bytes of its parts, by row; valid until the caller lets them go. Without those that could not be read.

        Returns:
            Chains that are whole now, and stored bytes of their rows; what is missing there has to be read. `forget` them when they are
            decoded.
        """
        mine = Counter(chain for part in range_.parts for chain, _ in part.takers)
        with self._lock:
            whole = [chain for chain, n in mine.items() if self._missing[chain] == n]
            for chain in whole:
                self._missing[chain] = 0
            waiting = mine.keys() - set(whole)
            copies = self._reserve(range_, stored, waiting)
        for kept, view in copies.values():
            np.copyto(kept.view, view)
        with self._lock:
            for part in range_.parts:
                for chain, row in part.takers:
                    if chain in waiting and part.row in copies:
                        self._kept[chain][row] = copies[part.row][0]
            for chain in waiting:
                self._missing[chain] -= mine[chain]
                if not self._missing[chain]:
                    whole.append(chain)
            found = {chain: {row: kept.view for row, kept in self._kept.get(chain, {}).items()} for chain in whole}
        for part in range_.parts:
            for chain, row in part.takers:
                if chain in found and part.row in stored:
                    found[chain][row] = stored[part.row]
        return found

    def _reserve(self, range_: Range, stored: Mapping[int, U8], waiting: set[int]) -> dict[int, tuple[_Kept, U8]]:
        """Room for copies of the parts that some chains wait with, as far as there is any."""
        found = {}
        for part in range_.parts:
            n = sum(chain in waiting for chain, _ in part.takers)
            view = stored.get(part.row)
            if n and view is not None and self._held_bytes + view.size <= self._limit_bytes:
                self._held_bytes += view.size
                found[part.row] = _Kept(np.empty(view.size, np.uint8), n), view
        return found

    def forget(self, chain: int) -> None:
        """Let go of what was kept for a chain."""
        with self._lock:
            for kept in self._kept.pop(chain, {}).values():
                kept.takers -= 1
                if not kept.takers:
                    self._held_bytes -= kept.view.size
