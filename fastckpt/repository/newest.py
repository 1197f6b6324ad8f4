"""Reads the newest checkpoint of a repository, or that of a step, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fastckpt.errors import (
    CorruptCheckpointError,
    NoCheckpointError,
    ObjectNotFoundError,
    RetiredError,
)
from fastckpt.format import keys
from fastckpt.repository.catalog import Catalog, Which, open_checked
from fastckpt.repository.repository import Repository
from fastckpt.repository.saved_ranks import NONE, SavedRanks
from fastckpt.store.base import Store

T = TypeVar("T")


def is_repository(store: Store) -> bool:
    """Whether a repository is there: it has its marker or, if that is gone, commits. StoreError."""
    try:
        store.head(keys.MARKER)
    except ObjectNotFoundError:
        return any(keys.parse_commit(info.key) is not None for info in store.list(keys.COMMITS))
    return True


def read_checkpoint(store: Store, step: Which, read: Callable[[SavedRanks, str], T]) -> T:
    """Return the result of `read` for a checkpoint and its location. Sends only GET, HEAD and LIST, so it disturbs nobody.

    If retention removes the checkpoint meanwhile and no step was asked for, the then newest checkpoint is read, once; otherwise
    RetiredError. NoCheckpointError, CorruptCheckpointError, StoreError.
    """
    try:
        return _read(store, step, read)
    except RetiredError:
        if not isinstance(step, str):
            raise
    return _read(store, step, read)


def _read(store: Store, step: Which, read: Callable[[SavedRanks, str], T]) -> T:
    repository = Repository(store)
    catalog = Catalog(repository, checks_votes=False)
    choice = catalog.choose(step)
    if choice is None:
        raise NoCheckpointError(f"{store.url} has no checkpoint yet: there is nothing to read")
    commit = choice.commit
    try:
        # The votes of many ranks are read as far as they are needed.
        opened = {0: open_checked(store, commit)} if commit.world == 1 else NONE
        return read(SavedRanks(store, commit, opened), repository.location(commit.checkpoint))
    except (CorruptCheckpointError, ObjectNotFoundError) as error:
        found = catalog.blame(commit.checkpoint, error)
        raise (Catalog(repository).with_advice(commit.checkpoint, found) if isinstance(step, str) else found) from error
