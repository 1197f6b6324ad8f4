"""FastckptReader: the storage that `dcp.load` reads from."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from fastckpt.errors import CheckpointError, NoCheckpointError, RestoreError, SaveError
from fastckpt.format.keys import CheckpointId
from fastckpt.integrations.dcp.harmless_bytes import load_harmless, made_harmless
from fastckpt.integrations.dcp.layout import metadata_of
from fastckpt.integrations.dcp.nested import nested_state
from fastckpt.integrations.dcp.opened import Opened, batches, block_of, open_checkpoint, wholes_of
from fastckpt.integrations.dcp.places import rank_url, require_url
from fastckpt.options import Options
from fastckpt.reading.assembly import Target


class FastckptReader(StorageReader):
    """Reads checkpoints of FastckptWriter, and the tensors of those that a Checkpointer has saved, with torch.distributed.checkpoint.

    Only the chunks are read that a rank's own blocks lie in; each is verified. The methods are torch's and are called by torch, but
    `read_state_dict`.

    Args:
        url: A directory, or `s3://bucket/prefix`. None: `dcp.load(…, checkpoint_id=…)` names it, which it may do in any case.
        step: Which checkpoint, if several live there, as a Checkpointer leaves them: "latest" or a step.
        weights_only: Refuse objects that could run code while they are loaded, which torch's planners would run. False: trust them.
        options: None: `Options()`, and the folder that FASTCKPT_CACHE_DIR names.

    Raises:
        StoreError: The URL is none.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        step: int | str | CheckpointId = "latest",
        weights_only: bool = True,
        options: Options | None = None,
    ) -> None:
        super().__init__()
        self._url = None if url is None else require_url(url)
        self._step, self._weights_only, self._options = step, weights_only, options
        self._load_id = str(uuid.uuid4())
        self._opened: Opened | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a load. StoreError if checkpoint_id names no place."""
        self._leave()
        if checkpoint_id:
            self._url = require_url(checkpoint_id)
        self._load_id = str(uuid.uuid4())

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read what all ranks' votes list.

        torch asks a second time, with `rank=`, if the first call fails: then for what this rank has saved for itself. It drops the errors
        of both; so any but that nothing is there is raised by whoever looks into the result.
        """
        rank = kwargs.get("rank")
        try:
            metadata = self._read_metadata(rank)
        except NoCheckpointError as error:
            if rank is None:
                raise
            return _Unreadable(error)
        except Exception as error:
            return _Unreadable(error)
        metadata.storage_meta = StorageMeta(checkpoint_id=self._url, load_id=self._load_id)
        return metadata

    def _read_metadata(self, rank: int | None) -> Metadata:
        self._leave()
        if self._url is None:
            raise RestoreError("no place to load from: pass dcp.load(…, checkpoint_id=…), or FastckptReader(url)")
        root = self._url if rank is None else rank_url(self._url, rank)
        try:
            self._opened = open_checkpoint(root, self._step, (self._options or Options.from_env()).cache_dir)
        except NoCheckpointError as error:
            if rank is None:
                raise
            raise NoCheckpointError(f"{error}; nor is there a checkpoint of all ranks at {self._url}") from error
        return metadata_of(self._opened.layout, self._opened.url)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises what `read_metadata` has found to be wrong."""
        if isinstance(metadata, _Unreadable):
            metadata.fail()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read what the plan asks for into the planner's tensors. CorruptCheckpointError, RefusedStateError, RestoreError, StoreError."""
        opened = self._require_opened()
        try:
            wanted = [(item, block_of(opened.layout, item, opened.url)) for item in plan.items]
            wanted.sort(key=lambda pair: pair[1].moves[0].source[:3])
            for (item, target), tensor in zip(
                wanted, self._tensors(opened, [target for _, target in wanted]), strict=True
            ):
                self._hand_over(opened, planner, item, target, tensor)
        except CheckpointError as error:
            raise opened.blame(error) from error
        finally:
            self._leave()
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future

    def _hand_over(
        self, opened: Opened, planner: LoadPlanner, item: ReadItem, target: Target, tensor: torch.Tensor
    ) -> None:
        if item.type == LoadItemType.BYTE_IO:
            fqn, data = item.storage_index.fqn, tensor.numpy().tobytes()
            planner.load_bytes(item, made_harmless(data, fqn, opened.url) if self._weights_only else io.BytesIO(data))
            return
        into = planner.resolve_tensor(item).detach()
        if into.size() != tensor.size():
            raise RestoreError(
                f"{item.dest_index.fqn}: {list(into.size())} to fill where the plan reads {list(tensor.size())} of {opened.url}"
            )
        into.copy_(tensor)
        planner.commit_tensor(item, into)

    def _tensors(self, opened: Opened, targets: Sequence[Target]) -> Iterator[torch.Tensor]:
        options = self._options or Options()
        for batch in batches(targets):
            yield from opened.assemble(batch, options)

    def read_state_dict(self, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """Read a checkpoint into a new, nested state, without any target: tensors whole, in host memory. Not a part of torch's interface.

        Args:
            keys: Names to read: `"model"` means everything below it. None: everything.

        Returns:
            What was saved; as torch flattens it, keys of dictionaries are strings.

        Raises:
            NoCheckpointError, CorruptCheckpointError, RefusedStateError, StoreError: Nothing is returned.
            TooLargeError: It needs more than `options.max_load_bytes`.
        """
        opened = None
        try:
            self._read_metadata(None)
            opened = self._require_opened()
            options = self._options or Options()
            objects, tensors = wholes_of(opened, options, None if keys is None else list(keys))
            values: dict[str, Any] = {}
            for (fqn, target), tensor in zip(
                [*tensors, *objects], self._tensors(opened, [target for _, target in [*tensors, *objects]]), strict=True
            ):
                is_object = fqn in opened.layout.objects
                values[fqn] = self._object(tensor, fqn, opened.url) if is_object else tensor.reshape(target.shape)
            in_order = {fqn: values[fqn] for fqn in opened.layout.names if fqn in values}
            return nested_state(in_order, opened.layout, opened.url, with_empty=keys is None)
        except CheckpointError as error:
            if opened is None:
                raise
            raise opened.blame(error) from error
        finally:
            self._leave()

    def _object(self, tensor: torch.Tensor, fqn: str, url: str) -> Any:
        data = tensor.numpy().tobytes()
        return load_harmless(data, fqn, url) if self._weights_only else torch.load(io.BytesIO(data), weights_only=False)

    @property
    def checkpoint_id(self) -> str | None:
        """Where the next load reads."""
        return self._url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether fastckpt has a store for such a place."""
        try:
            return bool(require_url(checkpoint_id))
        except (SaveError, TypeError, ValueError, RuntimeError):
            return False

    def _require_opened(self) -> Opened:
        if self._opened is None:
            raise RestoreError("read_data was called without read_metadata: one FastckptReader does one load at a time")
        return self._opened

    def _leave(self) -> None:
        """Let go of the checkpoint that was being read."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()


class _Unreadable(Metadata):
    """Stands for metadata that could not be read: raises the reason when they are looked at."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def fail(self) -> NoReturn:
        """Raise the reason."""
        raise self._error

    @property
    def state_dict_metadata(self) -> Any:  # type: ignore[override]
        self.fail()
