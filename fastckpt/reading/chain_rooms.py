"""The memory in which one chain is decoded: the places of its wanted chunks, and scratch memory for the rest."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastckpt._types import U8
from fastckpt.format.records import Records
from fastckpt.reading.chains import Base, Chain, Link, rows_of


class ChainRooms:
    """See the module. Used by one thread, once, which goes through the links in order."""

    def __init__(self, chain: Chain, records: Records, places: Mapping[int, U8]) -> None:
        """places: of the wanted chunks, each as long as its raw bytes."""
        self._raw_bytes = records["raw_bytes"]
        self._room_of = {link.row: link.room for link in chain.links}
        self._views = dict(places)

    def out(self, link: Link) -> U8:
        """Where a row's raw bytes belong. Until they are there, it may hold those of its base."""
        if link.room not in self._views:
            self._views[link.room] = np.empty(int(self._raw_bytes[link.room]), np.uint8)
        return self._views[link.room]

    def is_joined(self, base: Base) -> bool:
        """Whether a base lies in two rows, so that it is a copy: both must have been decoded before it is asked for."""
        return len(rows_of(base, int(self._raw_bytes[base.row]))) > 1

    def base(self, link: Link) -> U8 | None:
        """The bytes that a row is relative to, where they lie, or will lie."""
        if link.base is None:
            return None
        rows = rows_of(link.base, int(self._raw_bytes[link.base.row]))
        first = self._view_of(rows[0])[link.base.start :][: link.base.n_bytes]
        return first if len(rows) == 1 else self._joined(link.base, first, rows[1])

    def _joined(self, base: Base, first: U8, second: int) -> U8:
        return np.concatenate([first, self._view_of(second)[: base.n_bytes - first.size]])

    def _view_of(self, row: int) -> U8:
        return self._views[self._room_of[row]]

    def free(self, link: Link) -> None:
        """Let go of what nothing needs after a step."""
        for room in link.frees:
            del self._views[room]
