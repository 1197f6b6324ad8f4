"""FastckptWriter: the storage that `dcp.save` and `dcp.async_save` write to."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from fastckpt.errors import SaveError
from fastckpt.format.keys import VoteName
from fastckpt.format.repository_records import Parent
from fastckpt.format.vote import Vote
from fastckpt.integrations.dcp.items import captured_of, meta_of
from fastckpt.integrations.dcp.places import rank_url, require_url
from fastckpt.integrations.dcp.staging import WriterBase
from fastckpt.integrations.dcp.turns import Assignment, begin, commit, follow, retire_others, step_of
from fastckpt.options import Options
from fastckpt.state.sealing import seal
from fastckpt.store.base import Store
from fastckpt.store.open import open_store
from fastckpt.writing.rank import SaveAsked, SaveRequest, upload


class FastckptWriter(StorageWriter, WriterBase):  # type: ignore[misc]
    """Writes checkpoints of torch.distributed.checkpoint as fastckpt repositories. One instance may write many, one at a time.

    A checkpoint exists as soon as all ranks have written their parts and the coordinator has committed it; until then, and after any
    failure, an older one at the same place can still be read. An instance can be pickled (`AsyncCheckpointerType.PROCESS`). The methods are
    torch's and are called by torch.

    Args:
        url: A directory, or `s3://bucket/prefix`. None: `dcp.save(…, checkpoint_id=…)` names it, which it may do in any case.
        overwrite: Whether a checkpoint at the same place may be replaced. It is retired once the new one is committed.
        options: None: `Options()` of the process that writes.

    Raises:
        StoreError: The URL is none.
    """

    def __init__(
        self, url: str | os.PathLike[str] | None = None, *, overwrite: bool = True, options: Options | None = None
    ) -> None:
        StorageWriter.__init__(self)
        WriterBase.__init__(self)
        self._url = None if url is None else require_url(url)
        self._overwrite, self._options = overwrite, options
        self._save_id = str(uuid.uuid4())
        self._rank: int | None = None
        self._alone = False
        """Every rank saves for itself (`use_collectives=False`)."""
        self._turn: Assignment | None = None
        """What the coordinator has claimed, from its plan to its commit."""
        self._vote: Vote | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_turn": None, "_vote": None}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save. StoreError if checkpoint_id names no place."""
        if checkpoint_id:
            self._url = require_url(checkpoint_id)
        self._save_id = str(uuid.uuid4())
        self._turn = self._vote = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the rank. torch passes it only to a method with a parameter called `kwargs`, since 2.7."""
        self._rank = kwargs.get("rank")
        self._alone = self._rank is not None and not kwargs.get("use_collectives", True)
        self._turn = self._vote = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Claim an epoch (on the coordinator), and tell each rank of it. RepositoryError, StoreError."""
        with self._store() as store:
            turns = begin(store, len(plans), step_of(self._root), self._overwrite)
        self._turn = turns[0]
        return [replace(plan, storage_data=turn) for plan, turn in zip(plans, turns, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's part and place its vote. SaveError, StoreError."""
        options = self._options or Options()
        with self._store() as store:
            turn = self._own_turn(store, plan)
            captured = captured_of(plan, planner)
            parent = None if turn.parent is None else Parent(*turn.parent)
            asked = SaveAsked(turn.save.step, trigger="dcp", meta=meta_of(planner))
            request = SaveRequest(asked=asked, save=turn.save, parent=parent, rank=turn.rank, world=turn.world)
            vote = upload(seal(captured), store, request, options).vote
        captured.release()
        if self._turn is not None:
            self._vote = vote
        index = MetadataIndex(f"the vote of rank {turn.rank}")
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result([WriteResult(index, vote.info.stored_bytes, vote.name)])
        return future

    def _own_turn(self, store: Store, plan: SavePlan) -> Assignment:
        """What this rank has to do."""
        if self._turn is None:
            return follow(store, plan.storage_data, self._rank, step_of(self._root))
        told = plan.storage_data  # perhaps of an earlier save; the rank in it is right
        return self._turn._replace(rank=told.rank if isinstance(told, Assignment) else self._rank or 0)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit (on the coordinator). SaveError, RepositoryError, StoreError: nothing was committed, except where the error says so."""
        if self._turn is None:
            raise SaveError("finish was called without a plan: one FastckptWriter does one save at a time")
        told = [result.storage_data for one in results for result in one if isinstance(result.storage_data, VoteName)]
        with self._store() as store:
            found = commit(store, self._turn, self._vote, told, metadata)
            self._turn = self._vote = None
            retire_others(store, found)
        metadata.storage_data, metadata.storage_meta = {}, self.storage_meta()

    def storage_meta(self) -> StorageMeta:
        """What torch tells its planner of this storage."""
        return StorageMeta(checkpoint_id=self._url, save_id=self._save_id)

    @property
    def checkpoint_id(self) -> str | None:
        """Where the next checkpoint goes."""
        return self._url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether fastckpt has a store for such a place."""
        try:
            return bool(require_url(checkpoint_id))
        except (SaveError, TypeError, ValueError, RuntimeError):
            return False

    @property
    def _root(self) -> str:
        if self._url is None:
            raise SaveError("no place to save to: pass dcp.save(…, checkpoint_id=…), or FastckptWriter(url)")
        return rank_url(self._url, self._rank) if self._alone and self._rank is not None else self._url

    @contextlib.contextmanager
    def _store(self) -> Iterator[Store]:
        store = open_store(self._root)
        try:
            yield store
        finally:
            store.close()
