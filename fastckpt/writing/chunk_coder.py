"""What is stored of one chunk of a rank: as it is alone, or by what a save may refer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastckpt import codec
from fastckpt._types import U8
from fastckpt.format.sealed_state import SealedState
from fastckpt.writing.deltas import Against, Deltas, Kept

Coded = Against | Kept


class ChunkCoder:
    """Encodes the chunks of one save. Any thread; each chunk by one."""

    def __init__(self, sealed: SealedState, deltas: Deltas | None = None) -> None:
        """deltas: None: the save has no base."""
        self._sealed, self._deltas = sealed, deltas

    @property
    def expected_bytes(self) -> Sequence[int] | None:
        """Of each chunk what it is likely to store; None: nothing is known."""
        return None if self._deltas is None else self._deltas.expected_bytes

    @property
    def outcome(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """How many chunks, and how many raw bytes, became what: equal, difference, full."""
        return ({}, {}) if self._deltas is None else (self._deltas.chunks, self._deltas.raw_bytes)

    def known(self, number: int) -> Kept | None:
        """A chunk that the source has not copied, because it equals the base's. None: it has bytes. SaveError."""
        if self._deltas is None:
            return None
        found = self._sealed.source.known(number)
        return None if found is None else self._deltas.keep_known(number, found)

    def encode(self, number: int, raw: U8, out: U8, effort: codec.Effort) -> Coded:
        """Encode a chunk. out: where its stored bytes go, as in `codec.encode_into`."""
        if self._deltas is not None:
            return self._deltas.encode(number, raw, out, effort)
        element = self._sealed.chunks[number].element
        found = codec.encode_into(raw, element.const_lane_bytes, element.float_lane_bytes, out, effort=effort)
        return Against(found, None)
