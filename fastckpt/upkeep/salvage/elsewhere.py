"""Finds lost tensors in the other checkpoints of the repository."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastckpt.errors import CheckpointError, CorruptCheckpointError, ObjectNotFoundError, StoreError
from fastckpt.format.keys import CheckpointId
from fastckpt.format.repository_records import Commit
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.rank_reader import open_rank
from fastckpt.repository.repository import Repository
from fastckpt.upkeep.salvage.chunks import bad_chunks
from fastckpt.upkeep.salvage.report import FoundIn, LostTensor


class Elsewhere:
    """Searches the other living checkpoints: first those of the history, each time from the newest to the oldest. Reads indexes when they
    are needed.
    """

    def __init__(self, repository: Repository, but: CheckpointId, world: int, options: Options) -> None:
        self._repository = repository
        self._but = but
        self._world = world
        self._options = options
        self._commits: list[Commit] | None = None

    def _others(self) -> Iterator[Commit]:
        if self._commits is None:
            self._commits = []
            for checkpoint in _newest_first(Catalog(self._repository)):
                if checkpoint != self._but:
                    try:
                        commit = self._repository.commit(checkpoint)
                    except CheckpointError as error:
                        _raise_if_store_failed(error)
                        continue
                    if isinstance(commit, Commit):
                        self._commits.append(commit)
        return iter(self._commits)

    def _readers(self, commit: Commit, rank: int) -> Iterator[tuple[int, Reader]]:
        """Open the same rank's index. If the number of ranks differs, open those of all ranks: a shard is identified by its place in the
        whole tensor.
        """
        for other in [rank] if commit.world == self._world else range(commit.world):
            try:
                yield other, open_rank(self._repository.store, commit, other)
            except CheckpointError as error:
                _raise_if_store_failed(error)

    def expected(self, rank: int, why: tuple[str, ...]) -> list[LostTensor]:
        """Guess the losses of a rank without an index: the rank's tensors in the newest other checkpoint with as many ranks."""
        for commit in self._others():
            if commit.world == self._world:
                for _, reader in self._readers(commit, rank):
                    return [
                        LostTensor(e.name, e.dtype, e.shape, why, assumed=True, place=e.place)
                        for e in reader.directory.tensors
                    ]
        return []

    def find(self, rank: int, lost: Sequence[LostTensor]) -> None:
        """Search for lost tensors, verify them there, and note where each was found."""
        missing = [tensor for tensor in lost if tensor.found_in is None]
        for commit in self._others() if missing else ():
            for other, reader in self._readers(commit, rank):
                self._find_in(reader, FoundIn(commit.checkpoint, other), missing)
                missing = [tensor for tensor in missing if tensor.found_in is None]
                if not missing:
                    return

    def _find_in(self, reader: Reader, where: FoundIn, missing: Sequence[LostTensor]) -> None:
        there = {entry.name: entry for entry in reader.directory.tensors}
        fits = []
        for tensor in missing:
            entry = there.get(tensor.name)
            if entry is not None:
                same = (entry.dtype, entry.shape, entry.place) == (tensor.dtype, tensor.shape, tensor.place)
                fits += [(tensor, entry)] if same else []
        needed = sorted({chunk for _, entry in fits for chunk, *_ in reader.pieces(entry.storage)})
        bad = bad_chunks(reader, needed, self._options.threads) if needed else {}
        for tensor, entry in fits:
            if not any(chunk in bad for chunk, *_ in reader.pieces(entry.storage)):
                tensor.found_in = where


def _raise_if_store_failed(error: CheckpointError) -> None:
    """Raise if the store failed: a checkpoint that cannot be read is skipped, but a store without an answer is not the checkpoint's
    fault.
    """
    if isinstance(error, StoreError) and not isinstance(error, ObjectNotFoundError):
        raise error


def _newest_first(catalog: Catalog) -> list[CheckpointId]:
    """Checkpoints of the history, then all others; if the history cannot be known, all by epoch and step."""
    try:
        inside = list(catalog.history())
    except CorruptCheckpointError:
        inside = []
    return [*inside, *(c for c in reversed(catalog.listing.commits) if c not in set(inside))]
