"""What saves of a run move through: made together, closed together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

from fastckpt.errors import SupersededError
from fastckpt.events import logger
from fastckpt.options import Options
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.snapshot import Stager
from fastckpt.store.base import Store
from fastckpt.store.open import open_store
from fastckpt.training.fence import Fence
from fastckpt.training.live_state import LiveState
from fastckpt.training.save_queue import SaveQueue
from fastckpt.training.torn import TornSaves


class Engine(NamedTuple):
    """See the module. Knows nothing of when a save is due, and of notices only that there is no time for retention then."""

    live: LiveState
    fence: Fence
    stager: Stager
    queue: SaveQueue
    torn: TornSaves
    incarnation: Incarnation
    options: Options
    """As they are used with this store."""
    owned: Store | None
    """The store, if it was opened here: then it is closed here."""

    @classmethod
    def start(
        cls,
        url: str | os.PathLike[str] | Store,
        live: LiveState,
        options: Options,
        keep: Keep | None,
        grace_s: float,
        in_a_hurry: Callable[[], bool],
        *,
        hooked: bool,
    ) -> Engine:
        """hooked: whether optimizers call the fence: where nothing is saved they need not. StoreError; SaveError if nothing can be written
        to `spill_dir`.
        """
        store = url if isinstance(url, Store) else open_store(url)
        owned = None if store is url else store
        with contextlib.ExitStack() as failed:
            if owned is not None:
                failed.callback(owned.close)
            options = options.for_store(store.useful_connections)
            stager = Stager(
                options.snapshot_bytes,
                options.threads,
                store.url,
                options.max_stall_s,
                options.verify_snapshot,
                options.spill_dir,
            )
            incarnation = Incarnation(Repository(store), options)
            queue = SaveQueue(incarnation, keep, grace_s, in_a_hurry)
            # "first" and "off" leave the decision to the user: there is no sample to compare with.
            proven = options.verify_snapshot in ("first", "off")
            fence = Fence(live.optimizers if hooked else [], queue, proven=proven)
            torn = TornSaves(queue, incarnation, fence.distrust)
            failed.pop_all()
        return cls(live, fence, stager, queue, torn, incarnation, options, owned)

    @property
    def repository(self) -> Repository:
        return self.incarnation.repository

    def open(self, *, read_only: bool) -> None:
        """Read the repository's marker; make it, and probe the store, unless this only reads. RepositoryError, StoreError."""
        if read_only:
            self.repository.require()
            return
        self.repository.initialise()
        for words in self.repository.store.harmful_rules():
            logger.warning("%s: %s (docs/stores.md, Lifecycle rules)", self.repository.url, words)

    def raise_failures(self, *, torn: bool = False) -> None:
        """Raise what has failed since the last call; of several errors the others are logged. torn: also what was torn and has not been
        made good.
        """
        failures = self.queue.take_failures()
        self.torn.look()
        if torn and (error := self.torn.take_error()) is not None:
            failures.append(error)
        if not failures:
            return
        first = next((f for f in failures if isinstance(f, SupersededError)), failures[0])
        for other in failures:
            if other is not first:
                logger.error("another save failed too: %s: %s", type(other).__name__, other)
        raise first

    def close(self) -> None:
        """Let go of all, whatever fails on the way."""
        with contextlib.ExitStack() as last_first:
            idle = self.queue.retaining.halt(0)
            if (
                self.owned is not None and idle and not len(self.queue)
            ):  # what was given up may still be in its last request
                last_first.callback(self.owned.close)
            last_first.callback(self.incarnation.close)
            last_first.callback(self.stager.pool.drop_free)
            last_first.callback(self.stager.stop_preparing)
            last_first.callback(self.fence.hooks.remove)
