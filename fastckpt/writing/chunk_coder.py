"""What is stored of one chunk of a rank: as it is alone, or by what a save may refer to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastckpt import codec
from fastckpt._types import U8
from fastckpt.format.sealed_state import SealedState
from fastckpt.writing.casting import Casting
from fastckpt.writing.deltas import Against, Deltas, Kept
from fastckpt.writing.index_rows import CastRow


class Cast(NamedTuple):
    """A chunk of which nothing is stored, because its numbers are those of masters."""

    rows: tuple[CastRow, ...]


Coded = Against | Kept | Cast


class ChunkCoder:
    """Encodes the chunks of one save. Any thread; each chunk by one."""

    def __init__(self, sealed: SealedState, deltas: Deltas | None = None, casting: Casting | None = None) -> None:
        """deltas: None: the save has no base. casting: None: masters are not looked for."""
        self._sealed, self._deltas, self._casting = sealed, deltas, casting
        self._lock = threading.Lock()
        self._casts: Counter[str] = Counter()
        """How many chunks were cast, and their raw bytes."""

    @property
    def order(self) -> Sequence[int]:
        """The order in which chunks are best encoded: copies while their masters are in memory, then what tells most about the others."""
        copies = [] if self._casting is None else sorted(self._casting.chunks)
        scouts = [] if self._deltas is None else self._deltas.scouts
        return list(dict.fromkeys([*copies, *scouts, *range(len(self._sealed.chunks))]))

    @property
    def expected_bytes(self) -> Sequence[int] | None:
        """Of each chunk what it is likely to store; None: nothing is known."""
        return None if self._deltas is None else self._deltas.expected_bytes

    @property
    def outcome(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """How many chunks, and how many raw bytes, became what: equal, difference, cast, full."""
        chunks, raw_bytes = ({}, {}) if self._deltas is None else (self._deltas.chunks, self._deltas.raw_bytes)
        return {**chunks, "cast": self._casts["chunks"]}, {**raw_bytes, "cast": self._casts["bytes"]}

    def known(self, number: int) -> Kept | None:
        """A chunk that the source has not copied, because it equals the base's. None: it has bytes. SaveError."""
        if self._deltas is None:
            return None
        found = self._sealed.source.known(number)
        return None if found is None else self._deltas.keep_known(number, found)

    def encode(self, number: int, raw: U8, out: U8, effort: codec.Effort) -> Coded:
        """Encode a chunk. out: where its stored bytes go, as in `codec.encode_into`."""
        if self._casting is not None and number in self._casting.chunks and effort > codec.Effort.NONE:
            rows = self._casting.rows(number, raw)
            if rows is not None:
                return self._cast(number, rows)
        if self._deltas is not None:
            return self._deltas.encode(number, raw, out, effort)
        element = self._sealed.chunks[number].element
        found = codec.encode_into(raw, element.const_lane_bytes, element.float_lane_bytes, out, effort=effort)
        return Against(found, None)

    def _cast(self, number: int, rows: tuple[CastRow, ...]) -> Cast:
        if self._deltas is not None:
            self._deltas.is_cast(number)
        with self._lock:
            self._casts["chunks"] += 1
            self._casts["bytes"] += self._sealed.chunks[number].n_bytes
        return Cast(rows)
