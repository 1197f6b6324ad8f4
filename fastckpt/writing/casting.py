"""Finds bfloat16 chunks that are copies of float32 numbers of the same state: then nothing of them is stored.

casts.candidates ─→ the master's bytes, peeked at ─→ every number compared ─→ a row that names the master's
"""

from __future__ import annotations

import bisect
import operator
import threading
from collections.abc import Iterator, MutableMapping

from fastckpt._types import U8
from fastckpt.format.sealed_state import SealedState
from fastckpt.format.shares import first_entries
from fastckpt.format.tensor_names import Name
from fastckpt.host.pages import fresh_pages
from fastckpt.kernels import kernels
from fastckpt.kernels.checksums import digest
from fastckpt.kernels.transform import MAX_RAW_BYTES
from fastckpt.writing.casts import candidates
from fastckpt.writing.index_rows import CastRow
from fastckpt.writing.matching import pieces_of

_MOST_PIECES = 4096
"""Of a bundle; each becomes a row."""


class _Piece:
    """A stretch of a storage in a chunk."""

    __slots__ = ("chunk", "n_bytes", "offset", "start", "storage")

    def __init__(self, chunk: int, storage: int, start: int, n_bytes: int, offset: int) -> None:
        self.chunk, self.storage, self.start, self.n_bytes, self.offset = chunk, storage, start, n_bytes, offset


class _Scratch(threading.local):
    """A thread's memory for chunks that are peeked at."""

    def __init__(self) -> None:
        self.memory: U8 | None = None

    def get(self) -> U8:
        if self.memory is None:
            self.memory = fresh_pages(MAX_RAW_BYTES)
        return self.memory


class Casting:
    """See the module. Any thread; each chunk by one."""

    def __init__(self, sealed: SealedState, known: MutableMapping[Name, Name], rank: int = 0) -> None:
        """known: first names of copies → those of their masters: kept from save to save, and added to here."""
        self._sealed, self._known = sealed, known
        self._candidates = candidates(sealed, known) if sealed.source.any_order else {}
        self._pieces: dict[int, list[_Piece]] = {}
        self._masters: dict[int, list[_Piece]] = {}
        """The pieces of each float32 storage that may be a master, in order."""
        self._first: dict[int, _Piece] = {}
        """The first piece of each copy."""
        self._names: dict[int, Name] = {}
        self._scratch = _Scratch()
        if self._candidates:
            self._find_pieces(rank)
        self.chunks = frozenset(
            chunk
            for chunk, pieces in self._pieces.items()
            if len(pieces) <= _MOST_PIECES and all(piece.storage in self._candidates for piece in pieces)
        )
        """Those that may be copies: better encoded before the others, while their masters are in memory."""

    def _find_pieces(self, rank: int) -> None:
        wanted = {master for masters in self._candidates.values() for master in masters}
        entries = first_entries(self._sealed.tensors, wanted | self._candidates.keys())
        self._names = {number: entry.name for number, entry in entries.items()}
        for row in zip(*(column.tolist() for column in pieces_of(self._sealed, rank)), strict=True):
            piece = _Piece(*row)
            if piece.storage in wanted:
                self._masters.setdefault(piece.storage, []).append(piece)
            elif self._sealed.storages[piece.storage].dtype == "bfloat16":
                self._pieces.setdefault(piece.chunk, []).append(piece)
                self._first.setdefault(piece.storage, piece)

    def rows(self, number: int, raw: U8) -> tuple[CastRow, ...] | None:
        """The rows of a chunk all of whose pieces are copies; None: one of them is none, or a master is not in memory."""
        found = []
        for piece in self._pieces[number]:
            row = self._row(piece, raw[piece.offset : piece.offset + piece.n_bytes])
            if row is None:
                return None
            found.append(row)
        return tuple(found)

    def _row(self, piece: _Piece, raw: U8) -> CastRow | None:
        copy = self._names[piece.storage]
        for master in self._candidates[piece.storage]:
            stretches = list(self._stretches(master, 2 * piece.start, 2 * piece.n_bytes))
            if self._is_cast(stretches, raw):
                self._known[copy] = self._names[master]
                return CastRow(piece.n_bytes, digest(raw), *stretches[0][:2])
            is_first = piece is self._first[piece.storage]
            if is_first and self._known.get(copy) != self._names[master]:  # most likely the others are none, either
                left = [other for other in self._candidates[piece.storage] if other != master]
                self._candidates[piece.storage] = left
        return None

    def _stretches(self, master: int, start: int, n_bytes: int) -> Iterator[tuple[int, int, int]]:
        """(chunk, first byte in it, length) of bytes of a storage."""
        pieces = self._masters.get(master, [])
        first = bisect.bisect_right(pieces, start, key=operator.attrgetter("start")) - 1
        for piece in pieces[max(first, 0) :]:
            if piece.start >= start + n_bytes:
                break
            low, high = max(start, piece.start), min(start + n_bytes, piece.start + piece.n_bytes)
            if low < high:
                yield piece.chunk, piece.offset + low - piece.start, high - low

    def _is_cast(self, stretches: list[tuple[int, int, int]], raw: U8) -> bool:
        if len(stretches) > 2 or any(start % 4 or n_bytes % 4 for _, start, n_bytes in stretches):
            return False
        at = 0
        for chunk, start, n_bytes in stretches:
            with self._sealed.source.peek(chunk, self._scratch.get()) as content:
                if content is None:
                    return False
                copy = raw[at // 2 : (at + n_bytes) // 2]
                if not kernels(n_bytes).cast_equal(copy, content[start : start + n_bytes]):
                    return False
            at += n_bytes
        return at == 2 * raw.size
