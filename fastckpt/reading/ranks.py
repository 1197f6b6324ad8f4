"""The votes of one checkpoint, as whoever puts tensors together from several of them wants to have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from fastckpt.format.directory import Directory
from fastckpt.options import Options
from fastckpt.reading.assembly import Target, assemble, ranks_needed
from fastckpt.reading.chunk_reader import Reader


class Ranks(Protocol):
    """See the module. Used by one thread. Errors of all methods: UnreadableError, StoreError."""

    @property
    def world(self) -> int:
        """How many ranks have saved."""

    @property
    def stored_bytes(self) -> int:
        """Of all of them."""

    def vote(self, rank: int) -> Reader:
        """A rank's index; of what it shares with others only its own share."""

    def whole(self, rank: int) -> Reader:
        """A rank's index, merged with the votes of owners."""

    def directories(self) -> Iterator[tuple[int, Directory]]:
        """Rank and directory of all votes, in order. Extents may be unchecked."""

    def open_votes(self, ranks: Iterable[int]) -> None:
        """Open the votes of these ranks, a few at once, for `vote`."""


def assemble_from(
    ranks: Ranks, targets: Sequence[Target], options: Options, threads: int, *, stay: bool = True
) -> Iterator[torch.Tensor]:
    """Put tensors together from what ranks have saved; their votes are opened before this returns. See `assemble`."""
    sources = {source.rank for target in targets for source, _ in target.moves}
    ranks.open_votes(sources)
    needed = ranks_needed({rank: ranks.vote(rank).directory for rank in sources}, targets)
    needed = {rank for rank in needed if rank < ranks.world}  # what others lack is damage
    ranks.open_votes(needed)
    return assemble({rank: ranks.vote(rank) for rank in needed}, targets, options, threads, stay=stay)


__all__ = ["Ranks", "assemble_from"]
