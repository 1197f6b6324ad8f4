"""Tells what a reader's path, URL or file object is: a container, or a repository of checkpoints."""

from __future__ import annotations

import os
from typing import Any

from fastckpt.errors import ObjectNotFoundError, SaveError, StoreAccessError, StoreError, StoreUnavailableError
from fastckpt.events import logger
from fastckpt.options import Options
from fastckpt.reading.opening import open_source
from fastckpt.reading.sources import Source
from fastckpt.repository.cached_store import cached
from fastckpt.repository.newest import is_repository
from fastckpt.store.base import Store
from fastckpt.store.location import is_url, location
from fastckpt.store.open import open_store


def locate(f: Any, *, repository: bool = False) -> Source | Store:
    """The bytes that `f` names, or the store of a repository, which the caller closes. If an object has that name, it is taken, unless
    `repository` is True.
    """
    where = location(f) if isinstance(f, (str, os.PathLike)) else None
    if where is None:
        return open_source(f)
    if not is_url(where):
        return (_repository(where) if os.path.isdir(where) else None) or open_source(f)
    if repository:
        return _repository(where) or open_source(f)
    try:
        return open_source(f)
    except (ObjectNotFoundError, StoreAccessError, SaveError, FileNotFoundError) as error:
        # The right to read a prefix does not include the right to read the object of the same name; and a whole bucket is no object.
        store = _repository(where, error)
        if store is None:
            raise
        return store


def _repository(where: str, object_error: Exception | None = None) -> Store | None:
    """The store of a repository; None if no repository can be seen there.

    object_error: what was said of the object of that name. If that is only that there is none, it must not hide that the repository could
    not be asked for: StoreAccessError, StoreUnavailableError.
    """
    store = None
    try:
        store = open_store(where)
        if is_repository(store):
            return cached(store, Options.from_env().cache_dir)
    except StoreError as error:  # the caller's own error says more
        is_answer = not isinstance(error, (StoreAccessError, StoreUnavailableError))
        if isinstance(object_error, ObjectNotFoundError) and not is_answer:
            if store is not None:
                store.close()
            raise error from object_error
        logger.debug("looking for a repository at %s: %s", where, error)
    except BaseException:
        if store is not None:
            store.close()
        raise
    if store is not None:
        store.close()
    return None
