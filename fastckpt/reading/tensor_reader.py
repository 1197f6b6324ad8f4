"""Reads single tensors by name, without unpickling the object around them."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.storage import UntypedStorage

from fastckpt.errors import CorruptCheckpointError, Damage, UnknownTensorError, UnsupportedFormatError
from fastckpt.format.directory import TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.format.tensor_names import Key, Name, dotted
from fastckpt.host.torch_names import storage_behind
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader, summary
from fastckpt.reading.storage_loader import DEVICE_WINDOW_BYTES, LastChunk, StorageLoader, check_size
from fastckpt.state.invariants import require_fit
from fastckpt.state.naming import Named, named_tensors

_MOST_COMPARED = 1000  # takes milliseconds


class _Lent(NamedTuple):
    """A storage that was handed out, and the names under which it was handed out."""

    reference: StorageWeakRef
    names: set[Name]

    def storage(self) -> UntypedStorage | None:
        """The storage, if it is still alive."""
        found: UntypedStorage | None = storage_behind(self.reference)
        return found


class _Copy(NamedTuple):
    """One copy: its source and its target."""

    named: Named
    entry: TensorEntry

    @property
    def target(self) -> torch.Tensor:
        assert isinstance(self.named.value, torch.Tensor)
        return self.named.value


class TensorReader(Mapping[str, Any]):
    """Names → tensors of one container. Tensors are read and verified when they are asked for; the reader keeps no tensor alive.

    Tensors that shared memory when they were saved (views of one storage, tied weights) share it again, as after fastckpt.load, while one
    of them is alive: `{name: reader[name] for name in reader}` takes only as much memory as the file. A name that is asked for again is
    read again.

    Names are dotted ("model.wte.weight"); if two names look the same, the tuple of keys ("state", 0, "exp_avg") distinguishes them. Use
    from one thread, as a context manager or with close().
    """

    def __init__(self, reader: Reader, options: Options, closed: Callable[[], None] = lambda: None) -> None:
        """closed: called by `close`, to release whatever is behind the reader."""
        self._reader, self._closed = reader, closed
        self._options = options
        self._entries: dict[str, list[TensorEntry]] = {}
        self._by_keys: dict[Name, list[TensorEntry]] = {}
        for entry in reader.directory.tensors:
            self._entries.setdefault(dotted(entry.name), []).append(entry)
            self._by_keys.setdefault(entry.name, []).append(entry)
        names_of = Counter(entry.storage for entry in reader.directory.tensors)
        self._lent: dict[int, _Lent | None] = {number: None for number, n in names_of.items() if n > 1}
        """Storages that have several names."""
        self._last_chunk = LastChunk()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._last_chunk.release()
        self._reader.source.close()
        self._closed()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def entry(self, name: str | tuple[Key, ...]) -> TensorEntry:
        """Look up the dtype, shape and stride of a tensor, without its data.

        Args:
            name: dotted, or the tuple of keys.

        Raises:
            UnknownTensorError: no tensor has this name, or several have.
        """
        found = self._entries.get(name, []) if isinstance(name, str) else self._by_keys.get(name, [])
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
        self._require_fetchable([entry])
        storage = self._lend(entry)
        if storage is None:
            with self._loader([entry.storage]) as loader:
                storage = self._take(loader, entry)
            if storage is not None and entry.storage in self._lent:
                self._lent[entry.storage] = _Lent(StorageWeakRef(storage), {entry.name})
        return self._made(entry, storage)

    def _require_fetchable(self, entries: Sequence[TensorEntry]) -> None:
        """UnsupportedFormatError or TooLargeError, before anything is read."""
        for entry in entries:
            if entry.kind == "quantized":
                raise UnsupportedFormatError(
                    f"{dotted(entry.name)!r} is quantized: its scales are in the skeleton, use fastckpt.load"
                )
            n_bytes = self._reader.directory.storages[entry.storage].n_bytes
            check_size(self._reader, n_bytes, self._options.max_load_bytes)
        self._reader.require_readable()

    def _lend(self, entry: TensorEntry) -> UntypedStorage | None:
        """The storage that is shared with a tensor of another name, if one of those is alive."""
        lent = self._lent.get(entry.storage)
        if lent is None or entry.name in lent.names:
            return None
        storage = lent.storage()
        if storage is not None:
            lent.names.add(entry.name)
        return storage

    def _loader(self, storages: Sequence[int]) -> StorageLoader:
        window_bytes = DEVICE_WINDOW_BYTES if len(storages) > 1 else 0
        return StorageLoader(self._reader, self._options.threads, window_bytes, storages, self._last_chunk)

    def _take(self, loader: StorageLoader, entry: TensorEntry) -> UntypedStorage | None:
        """Load a storage; None for a meta tensor's storage."""
        return loader.take(entry.storage) if loader.has_data(entry.storage) else None

    def _made(self, entry: TensorEntry, storage: UntypedStorage | None) -> Any:
        try:
            if storage is None:
                dtype = getattr(torch, entry.dtype)
                return torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device="meta")
            return _view(entry, storage)
        except (RuntimeError, ValueError, OverflowError, AttributeError) as error:
            # Only a hostile directory gets here: a shape that contains a 0 may have any stride, and torch and NumPy have limits.
            damage = Damage("directory", f"tensor {dotted(entry.name)!r}", "a tensor that can be made", str(error))
            raise CorruptCheckpointError(self._reader.source.name, [damage]) from error

    def load_into(self, state: Any, *, strict: bool = True) -> list[str]:
        """Copy the tensors of this checkpoint into those of the same name in `state`, in place.

        A module's tensors have the names of its state dict; the checkpoint may hold the module or its state dict. A dotted name is enough
        if only one tensor of the checkpoint has it.

        Args:
            state: a module, or an object with tensors in it, such as a state dict.
            strict: every tensor of `state` must be in the checkpoint, with the same shape and dtype. False: tensors that are not keep their
                values.

        Returns:
            The dotted names that were copied.

        Raises:
            UnknownTensorError: with `strict`: lists all missing tensors; nothing is copied.
            CorruptCheckpointError: damage was found; tensors copied before keep their new values. Also if indices and offsets do not fit a
                sparse or jagged tensor of the state; then nothing was copied.
            UnsupportedFormatError, TooLargeError: before anything is copied.
        """
        wanted = [named for named in named_tensors(state) if isinstance(named.value, torch.Tensor)]
        problems, plan = [], []
        for named in wanted:
            # In a state dict "0.weight" is one key; in a module the same name has two.
            entry = self.entry(named.name) if named.name in self._by_keys else self._only(dotted(named.name))
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
                plan.append(_Copy(named, entry))
        if problems and strict:
            raise UnknownTensorError(f"{self._reader.source.name} does not fit the state:\n  " + "\n  ".join(problems))
        self._require_fetchable([copy.entry for copy in plan])
        # Indices and offsets: they decide where kernels of sparse and jagged tensors read and write.
        places = [copy for copy in plan if copy.named.owner is not None and not copy.target.is_floating_point()]
        of_places = {id(copy) for copy in places}
        with torch.no_grad():
            self._copy_places(places)
            self._copy([copy for copy in plan if id(copy) not in of_places])
        return [dotted(copy.entry.name) for copy in plan]

    def _copy(self, plan: Sequence[_Copy]) -> None:
        """Read each storage once, even if several tensors view it, and drop it before the next."""
        in_order = sorted(plan, key=lambda copy: copy.entry.storage)
        with self._loader(list(dict.fromkeys(copy.entry.storage for copy in in_order))) as loader:
            for _, group in itertools.groupby(in_order, lambda copy: copy.entry.storage):
                copies = list(group)
                storage = self._take(loader, copies[0].entry)
                for copy in copies:
                    copy.target.copy_(self._made(copy.entry, storage))

    def _copy_places(self, places: Sequence[_Copy]) -> None:
        """Copy indices and offsets of composite tensors; if they would not fit, restore the old values."""
        before = [copy.target.clone() for copy in places]
        try:
            self._copy(places)
            require_fit([copy.named.owner for copy in places], self._reader.source.name)
        except BaseException:
            for copy, value in zip(places, before, strict=True):
                copy.target.copy_(value)
            raise

    def _only(self, name: str) -> TensorEntry | None:
        found = self._entries.get(name, [])
        return found[0] if len(found) == 1 else None

    @property
    def summary(self) -> dict[str, Any]:
        """A dictionary with container_bytes, raw_bytes, chunks, tensors and storages."""
        return summary(self._reader)


def _view(entry: TensorEntry, storage: UntypedStorage) -> Any:
    """Make the tensor or array of an entry over its storage."""
    if not entry.dtype.startswith(NUMPY_PREFIX):
        empty = torch.empty(0, dtype=getattr(torch, entry.dtype), device="cpu")
        return empty.set_(storage, entry.offset, entry.shape, entry.stride)
    n_bytes = storage.nbytes()
    flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage, 0, (n_bytes,), (1,)).numpy()
    dtype = np.dtype(entry.dtype.removeprefix(NUMPY_PREFIX))
    strides = tuple(step * dtype.itemsize for step in entry.stride)
    return np.ndarray(entry.shape, dtype, flat, entry.offset * dtype.itemsize, strides)
