"""Single tensors by name, without the object around them and without pickle."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.storage import UntypedStorage

from fastckpt.errors import CheckpointError, CorruptCheckpointError, Damage, UnknownTensorError, UnsupportedFormatError
from fastckpt.format.directory import TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.format.tensor_names import Key, dotted
from fastckpt.options import Options
from fastckpt.reader import Reader, summary
from fastckpt.restore import StorageLoader, check_size
from fastckpt.state.invariants import require_fit
from fastckpt.state.naming import Named, named_tensors

_MOST_COMPARED = 1000  # milliseconds


class TensorReader(Mapping[str, Any]):
    """Names → tensors of one container. Tensors are fetched and verified when asked for; each has memory of its own.

    Names are dotted ("model.wte.weight"); where two look alike, the tuple of keys ("state", 0, "exp_avg") tells them apart.
    Use from one thread, as a context manager or with close().
    """

    def __init__(self, reader: Reader, options: Options) -> None:
        self._reader = reader
        self._options = options
        self._entries: dict[str, list[TensorEntry]] = {}
        for entry in reader.directory.tensors:
            self._entries.setdefault(dotted(entry.name), []).append(entry)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._reader.source.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def entry(self, name: str | tuple[Key, ...]) -> TensorEntry:
        """dtype, shape and stride of a tensor, without its data. UnknownTensorError for no such name, or several."""
        if isinstance(name, str):
            found = self._entries.get(name, [])
        else:
            found = [entry for entry in self._reader.directory.tensors if entry.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(entry.name) for entry in found)
            raise UnknownTensorError(f"{name!r} is the name of {len(found)} tensors: ask for one of {names}")
        near = [known for known in self._entries if str(name).rpartition(".")[2] == known.rpartition(".")[2]][:3]
        near = near or difflib.get_close_matches(str(name), list(self._entries)[:_MOST_COMPARED], 3)
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise UnknownTensorError(f"{self._reader.source.name} has no tensor {name!r} ({len(self)} names{hint})")

    def __getitem__(self, name: str | tuple[Key, ...]) -> Any:
        """The tensor (or NumPy array), in host memory."""
        entry = self.entry(name)
        if entry.kind == "quantized":
            raise UnsupportedFormatError(f"{name!r} is quantized: its scales are in the skeleton, use fastckpt.load")
        self._reader.require_readable()
        storage_entry = self._reader.directory.storages[entry.storage]
        check_size(self._reader, storage_entry.n_bytes, self._options.max_load_bytes)
        try:
            if storage_entry.extents is None:
                dtype = getattr(torch, entry.dtype)
                return torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device="meta")
            with StorageLoader(self._reader, self._options.threads, 0) as loader:
                return _view(entry, loader.take(entry.storage))
        except (RuntimeError, ValueError, OverflowError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            # Only a hostile directory gets here: a shape with a 0 in it may stand anywhere, and torch and NumPy have limits.
            damage = Damage("directory", f"tensor {dotted(entry.name)!r}", "a tensor that can be made", str(error))
            raise CorruptCheckpointError(self._reader.source.name, [damage]) from error

    def load_into(self, state: Any, *, strict: bool = True) -> list[str]:
        """Copy the tensors of this checkpoint into those of the same name in `state`, in place; returns the names copied.

        strict: every tensor of `state` must be here in the same shape and dtype; UnknownTensorError lists all that are not, and nothing is
        copied. Damage found on the way raises CorruptCheckpointError; tensors copied before it keep their new values. Indices and offsets
        that do not fit the sparse or jagged tensor of the state raise it, too, before anything is copied.
        """
        wanted = [named for named in named_tensors(state) if isinstance(named.value, torch.Tensor)]
        here = {entry.name: entry for entry in self._reader.directory.tensors}
        problems, plan = [], []
        for named in wanted:
            entry = here.get(named.name)
            value = named.value
            assert isinstance(value, torch.Tensor)
            dtype = str(value.dtype).removeprefix("torch.")
            if entry is None:
                problems.append(f"{dotted(named.name)}: not in the checkpoint")
            elif entry.shape != tuple(value.shape) or entry.dtype != dtype:
                problems.append(
                    f"{dotted(named.name)}: {entry.dtype} {list(entry.shape)} in the checkpoint, {dtype} {list(value.shape)} in the state"
                )
            else:
                plan.append(named)
        if problems and strict:
            raise UnknownTensorError(f"{self._reader.source.name} does not fit the state:\n  " + "\n  ".join(problems))
        with torch.no_grad():
            # Where kernels of sparse and jagged tensors read and write.
            places = [named for named in plan if named.owner is not None and not _tensor_of(named).is_floating_point()]
            self._copy_places(places)
            for named in plan:
                if named not in places:
                    _tensor_of(named).copy_(self[named.name])
        return [dotted(named.name) for named in plan]

    def _copy_places(self, places: Sequence[Named]) -> None:
        """Copy indices and offsets of composite tensors; if they would not fit, put back what was there."""
        before = [_tensor_of(named).clone() for named in places]
        try:
            for named in places:
                _tensor_of(named).copy_(self[named.name])
            require_fit([named.owner for named in places], self._reader.source.name)
        except BaseException:
            for named, value in zip(places, before, strict=True):
                _tensor_of(named).copy_(value)
            raise

    @property
    def summary(self) -> dict[str, Any]:
        """container_bytes, raw_bytes, chunks, tensors, storages."""
        return summary(self._reader)


def _tensor_of(named: Named) -> torch.Tensor:
    assert isinstance(named.value, torch.Tensor)
    return named.value


def _view(entry: TensorEntry, storage: UntypedStorage) -> Any:
    """The tensor or array that an entry describes, over its storage."""
    if not entry.dtype.startswith(NUMPY_PREFIX):
        empty = torch.empty(0, dtype=getattr(torch, entry.dtype), device="cpu")
        return empty.set_(storage, entry.offset, entry.shape, entry.stride)
    n_bytes = storage.nbytes()
    flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (n_bytes,), (1,)).numpy()
    dtype = np.dtype(entry.dtype.removeprefix(NUMPY_PREFIX))
    strides = tuple(step * dtype.itemsize for step in entry.stride)
    return np.ndarray(entry.shape, dtype, flat, entry.offset * dtype.itemsize, strides)
