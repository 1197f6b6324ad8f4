"""Reads single tensors by name, without unpickling the object around them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.storage import UntypedStorage

from fastckpt.errors import CorruptCheckpointError, Damage, UnknownTensorError, UnsupportedFormatError
from fastckpt.format.directory import TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.format.shares import some_ranks
from fastckpt.format.tensor_names import Key, Name, dotted
from fastckpt.host.torch_names import negative_view, storage_behind
from fastckpt.reading.contents import Contents, Storages
from fastckpt.reading.copy_into import CopyInto

_MOST_COMPARED = 1000  # takes milliseconds


class _Lent(NamedTuple):
    """A storage that was handed out, and the names under which it was handed out."""

    reference: StorageWeakRef
    names: set[Name]

    def storage(self) -> UntypedStorage | None:
        """The storage, if it is still alive."""
        found: UntypedStorage | None = storage_behind(self.reference)
        return found


class TensorReader(Mapping[str, Any]):
    """Names → tensors of one checkpoint. Tensors are read and verified when they are asked for; the reader keeps no tensor alive.

    Tensors that shared memory when they were saved (views of one storage, tied weights) share it again, as after fastckpt.load, while one
    of them is alive: `{name: reader[name] for name in reader}` takes only as much memory as the file. A name that is asked for again is
    read again.

    Names are dotted ("model.wte.weight"); if two names look the same, the tuple of keys ("state", 0, "exp_avg") distinguishes them. Use
    from one thread, as a context manager or with close().
    """

    def __init__(self, contents: Contents, closed: Callable[[], None] = lambda: None) -> None:
        """closed: called by `close`, to release whatever is behind the contents."""
        self._contents, self._closed = contents, closed
        self._entries: dict[str, list[TensorEntry]] = {}
        self._by_keys: dict[Name, list[TensorEntry]] = {}
        for entry in contents.directory.tensors:
            self._entries.setdefault(dotted(entry.name), []).append(entry)
            self._by_keys.setdefault(entry.name, []).append(entry)
        names_of = Counter(entry.storage for entry in contents.directory.tensors)
        self._lent: dict[int, _Lent | None] = {number: None for number, n in names_of.items() if n > 1}
        """Storages that have several names."""

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._contents.close()
        self._closed()

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._entries if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        found = self._entries.get(name, []) if isinstance(name, str) else []
        return any(not self._contents.ranks_of(entry.name) for entry in found)

    @property
    def of_each_rank(self) -> dict[str, tuple[int, ...]]:
        """Dotted names of what several ranks had, each its own → these ranks; {} for a checkpoint of one.

        They cannot be read here, and iteration leaves them out: `fastckpt.open(url, rank=…)` reads them.
        """
        named = ((name, self._contents.ranks_of(e.name)) for name, found in self._entries.items() for e in found)
        return {name: ranks for name, ranks in named if ranks}

    def entry(self, name: str | tuple[Key, ...]) -> TensorEntry:
        """Look up the dtype, shape and stride of a tensor, without its data.

        Args:
            name: dotted, or the tuple of keys.

        Raises:
            UnknownTensorError: no tensor has this name, or several have.
        """
        found = self._entries.get(name, []) if isinstance(name, str) else self._by_keys.get(name, [])
        if len(found) == 1:
            ranks = self._contents.ranks_of(found[0].name)
            if ranks:
                raise UnknownTensorError(
                    f"{name!r} of {self._contents.name} is not one tensor: {some_ranks(ranks)} had each its own. Read that of one of "
                    f"them: fastckpt.open(…, rank={ranks[0]})"
                )
            return found[0]
        if found:
            names = ", ".join(str(entry.name) for entry in found)
            raise UnknownTensorError(f"{name!r} is the name of {len(found)} tensors: ask for one of {names}")
        near = [known for known in self._entries if str(name).rpartition(".")[2] == known.rpartition(".")[2]][:3]
        near = near or difflib.get_close_matches(str(name), list(self._entries)[:_MOST_COMPARED], 3)
        hint = f"; similar: {', '.join(near)}" if near else ""
        raise UnknownTensorError(f"{self._contents.name} has no tensor {name!r} ({len(self._entries)} names{hint})")

    def __getitem__(self, name: str | tuple[Key, ...]) -> Any:
        """The tensor (or NumPy array), in host memory."""
        entry = self.entry(name)
        self._require_fetchable([entry])
        storage = self._lend(entry)
        if storage is None:
            with self._contents.storages([entry.storage]) as loader:
                storage = _take(loader, entry)
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
            self._require_plain(entry)
            self._contents.require_fetchable(self._contents.directory.storages[entry.storage].n_bytes)

    def _require_plain(self, entry: TensorEntry) -> None:
        """UnsupportedFormatError for a tensor whose bytes may not be its values."""
        if self._lazy_kinds(entry) is None:
            raise UnsupportedFormatError(
                f"{dotted(entry.name)!r} may be conjugated or negated when it is read, as c.conj() and c.conj().imag are: only the "
                "skeleton says which tensors of this object are. Use fastckpt.load; or save c.resolve_conj().resolve_neg()"
            )

    def _lazy_kinds(self, entry: TensorEntry) -> frozenset[str] | None:
        """See `reading.lazy_views`. None of what cannot be it."""
        element = None if entry.dtype.startswith(NUMPY_PREFIX) else getattr(torch, entry.dtype, None)
        if element is None or not (element.is_complex or element.is_floating_point):
            return frozenset()
        return self._contents.lazy_kinds_of(entry)

    def _lend(self, entry: TensorEntry) -> UntypedStorage | None:
        """The storage that is shared with a tensor of another name, if one of those is alive."""
        lent = self._lent.get(entry.storage)
        if lent is None or entry.name in lent.names:
            return None
        storage = lent.storage()
        if storage is not None:
            lent.names.add(entry.name)
        return storage

    def _made(self, entry: TensorEntry, storage: UntypedStorage | None) -> Any:
        try:
            if storage is None:
                dtype = getattr(torch, entry.dtype)
                return torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device="meta")
            return _lazily(_view(entry, storage), self._lazy_kinds(entry) or ())
        except (RuntimeError, ValueError, OverflowError, AttributeError) as error:
            # Only a hostile directory gets here: a shape that contains a 0 may have any stride, and torch and NumPy have limits.
            damage = Damage("directory", f"tensor {dotted(entry.name)!r}", "a tensor that can be made", str(error))
            raise CorruptCheckpointError(self._contents.name, [damage]) from error

    def load_into(self, state: Any, *, strict: bool = True) -> list[str]:
        """Copy the tensors of this checkpoint into those of the same name in `state`, in place.

        Of a DTensor in the state, this process's part is filled, whatever the layout was when it was saved: each rank of a job may call
        this with a reader of its own, reads only what it needs, and waits for nobody. A module's tensors have the names of its state dict;
        the checkpoint may hold the module or its state dict. A dotted name is enough if only one tensor of the checkpoint has it.

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
        return CopyInto(self._contents, self._entry_for, self._require_fetchable, self._made).run(state, strict=strict)

    def _entry_for(self, name: Name) -> TensorEntry | str:
        """The entry for a live tensor, or why there is none."""
        # In a state dict "0.weight" is one key; in a module the same name has two.
        found = self._by_keys.get(name) or self._entries.get(dotted(name), [])
        if len(found) != 1:
            return f"the name of {len(found)} tensors of the checkpoint" if found else "not in the checkpoint"
        ranks = self._contents.ranks_of(found[0].name)
        return f"each of {some_ranks(ranks)} had its own" if ranks else found[0]

    @property
    def summary(self) -> dict[str, Any]:
        """A dictionary with container_bytes, raw_bytes, chunks, tensors and storages."""
        return self._contents.summary


def _take(storages: Storages, entry: TensorEntry) -> UntypedStorage | None:
    """A storage; None for a meta tensor's."""
    return storages.take(entry.storage) if storages.has_data(entry.storage) else None


def _lazily(tensor: Any, kinds: Collection[str]) -> Any:
    """As the saved tensor was: over the same memory, computed when it is read."""
    if "conj" in kinds:
        tensor = tensor.conj()
    return negative_view(tensor) if "neg" in kinds else tensor


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
