"""Reads the newest checkpoint of a repository, or that of a step, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fastckpt.errors import (
    CorruptCheckpointError,
    NoCheckpointError,
    ObjectNotFoundError,
    RestoreError,
    RetiredError,
)
from fastckpt.format import keys
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.merged_reader import merge
from fastckpt.repository.catalog import Catalog, Which
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store

T = TypeVar("T")


def is_repository(store: Store) -> bool:
    """Whether a repository is there: it has its marker or, if that is gone, commits. StoreError."""
    try:
        store.head(keys.MARKER)
    except ObjectNotFoundError:
        return any(keys.parse_commit(info.key) is not None for info in store.list(keys.COMMITS))
    return True


def read_checkpoint(store: Store, step: Which, read: Callable[[Reader], T]) -> T:
    """Return the result of `read` for a checkpoint. Sends only GET, HEAD and LIST, so it disturbs nobody.

    If retention removes the checkpoint meanwhile and no step was asked for, the then newest checkpoint is read, once; otherwise
    RetiredError. NoCheckpointError, RestoreError for a checkpoint of several ranks, CorruptCheckpointError, StoreError.
    """
    try:
        return _read(store, step, read)
    except RetiredError:
        if not isinstance(step, str):
            raise
    return _read(store, step, read)


def _read(store: Store, step: Which, read: Callable[[Reader], T]) -> T:
    catalog = Catalog(Repository(store))
    choice = catalog.choose(step)
    if choice is None:
        raise NoCheckpointError(f"{store.url} has no checkpoint yet: there is nothing to read")
    commit = choice.commit
    if commit.world != 1:
        raise RestoreError(
            f"{catalog.repository.location(commit.checkpoint)} was saved by {commit.world} ranks; this version reads those of one. "
            "`fastckpt restore --rank` exports each rank's state"
        )
    try:
        assert choice.reader is not None
        return read(merge(choice.reader, {}))  # its own shares, which one rank has all of
    except (CorruptCheckpointError, ObjectNotFoundError) as error:
        raise catalog.blame(commit.checkpoint, error) from error
