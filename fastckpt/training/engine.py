"""The parts that saves of a run go through: made together, closed together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from fastckpt.errors import SupersededError
from fastckpt.events import logger
from fastckpt.options import Options
from fastckpt.ranks.team import Team
from fastckpt.ranks.world import ALONE, World
from fastckpt.repository.cached_store import cached
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.object_board import ObjectBoard
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.snapshot import Stager
from fastckpt.store.base import Store
from fastckpt.store.open import open_store
from fastckpt.training.fence import Fence
from fastckpt.training.joint_start import compare, share_repository
from fastckpt.training.live_state import LiveState
from fastckpt.training.positions import Positions
from fastckpt.training.save_queue import SaveQueue
from fastckpt.training.torn import TornSaves


class Engine(NamedTuple):
    """See the module. Does not know when a save is due; of notices it knows only that no time is left for retention then."""

    live: LiveState
    fence: Fence
    stager: Stager
    queue: SaveQueue
    torn: TornSaves
    incarnation: Incarnation
    options: Options
    """The options, adapted to this store."""
    owned: Store | None
    """The store, if it was opened here: then it is closed here."""
    team: Team | None
    """The ranks that save as one; None: this process trains alone."""
    positions: Positions

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
        world: World = ALONE,
    ) -> Engine:
        """world: this process's place among the ranks of its job. hooked: whether optimizers call the fence; not if nothing is saved.

        StoreError; SaveError if nothing can be written to `spill_dir`; ValueError if a sampler has not enough samples for all ranks.
        """
        positions = Positions(live.targets)
        given = isinstance(url, Store)
        store = cached(url if isinstance(url, Store) else open_store(url), options.cache_dir)
        owned = None if given else store
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
                keeps=options.deltas and hooked,
            )
            team = None
            if not world.is_alone:
                objects = ObjectBoard(store, lambda: None if incarnation.epoch is None else incarnation.epoch.number)
                team = Team.of_process_group(world, objects, options.join_timeout_s)
                failed.callback(team.close)
            incarnation = Incarnation(Repository(store), options, team=team, in_a_hurry=in_a_hurry)
            if not world.leads:
                keep = None  # rank 0 retires old checkpoints
            queue = SaveQueue(incarnation, keep, grace_s, in_a_hurry, deltas=options.deltas and hooked)
            # "first" and "off" leave the decision to the user: there is no sample to compare with.
            proven = options.verify_snapshot in ("first", "off")
            fence = Fence(live.optimizers if hooked else [], queue, proven=proven)
            torn = TornSaves(queue, incarnation, fence.distrust)
            failed.pop_all()
        return cls(live, fence, stager, queue, torn, incarnation, options, owned, team, positions)

    @property
    def repository(self) -> Repository:
        return self.incarnation.repository

    def open(self, said: dict[str, Any], *, read_only: bool) -> None:
        """Read the repository's marker; make it, and probe the store, unless `read_only`. RepositoryError, StoreError."""
        if self.team is not None:
            self.team.start()
            compare(self.team, {**said, "read_only": read_only})
        if read_only:
            self.repository.require()
            return
        if self.team is not None:
            share_repository(self.team, self.repository)
            if not self.team.world.leads:
                return
        else:
            self.repository.initialise()
        for words in self.repository.store.harmful_rules():
            logger.warning("%s: %s (docs/stores.md, Lifecycle rules)", self.repository.url, words)

    def raise_failures(self, *, torn: bool = False) -> None:
        """Raise the first error since the last call; further errors are logged. torn: also raise torn saves that no newer save has
        replaced.
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
        """Close all parts, even if one of them fails to close."""
        with contextlib.ExitStack() as last_first:
            idle = self.queue.retaining.halt(0)
            if (
                self.owned is not None and idle and not len(self.queue)
            ):  # a save that was given up may still be in its last request
                last_first.callback(self.owned.close)
            last_first.callback(self.incarnation.close)
            last_first.callback(self.stager.pool.drop_free)
            last_first.callback(self.queue.bases.drop, for_good=True)
            last_first.callback(self.stager.stop_preparing)
            last_first.callback(self.fence.hooks.remove)
            if self.team is not None:
                last_first.callback(self.team.close)
