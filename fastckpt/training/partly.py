"""Objects of which only some tensors are read: the others are meta tensors, for which something else is put in."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.storage import UntypedStorage

from fastckpt.format.tensor_names import Name, key_of
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.storage_loader import DEVICE_WINDOW_BYTES, StorageLoader, check_size
from fastckpt.state import Rebuild


class _Some:
    """A StorageProvider of some storages; the others have no data."""

    def __init__(self, loader: StorageLoader, wanted: Sequence[int]) -> None:
        self._loader, self._wanted = loader, frozenset(wanted)

    def n_bytes(self, number: int) -> int | None:
        return self._loader.n_bytes(number)

    def has_data(self, number: int) -> bool:
        return number in self._wanted and self._loader.has_data(number)

    def take(self, number: int) -> UntypedStorage:
        return self._loader.take(number)


def load_partly(
    reader: Reader,
    wanted: Sequence[int],
    options: Options,
    threads: int,
    *,
    places: Sequence[str] | None,
    map_location: Any,
    weights_only: bool,
) -> Any:
    """Unpickle an object, with the data of some of its storages. Of a vote with shares, only storages without them may be wanted.

    Args:
        wanted: numbers of the storages that are read.
        places: see `Rebuild`.

    Raises:
        As `load_object`.
    """
    storages = reader.directory.storages
    check_size(reader, sum(storages[n].n_bytes for n in wanted), options.max_load_bytes)
    reader.require_readable()
    stays = places is None or all(places[n] in ("cpu", "meta") for n in wanted)
    with StorageLoader(reader, threads, None if stays else DEVICE_WINDOW_BYTES, wanted) as loader:
        return Rebuild(
            reader.skeleton,
            _Some(loader, wanted),
            reader.source.name,
            map_location,
            weights_only,
            pickle,
            {"encoding": "utf-8"},
            places,
            beyond_torch=True,
        ).run()


def replaced(value: Any, given: Mapping[Name, torch.Tensor]) -> Any:
    """A loaded state with other tensors under some names. Containers in which something changes are copied, the others are kept.

    Args:
        value: dictionaries, lists and tuples, as a restricted load makes them.
        given: name → the tensor that stands there. Where a parameter was, it becomes one. A tensor that is given under two names stays one.
    """
    return _Replacing(given).within(value, ())


class _Replacing:
    def __init__(self, given: Mapping[Name, torch.Tensor]) -> None:
        self._given = given
        self._above = {name[:length] for name in given for length in range(len(name))}
        """Names of what has something given in it."""
        self._parameters: dict[int, torch.nn.Parameter] = {}
        """id() of a given tensor → the parameter over it."""

    def within(self, value: Any, name: Name) -> Any:
        if name in self._given:
            return self._as(value, self._given[name])
        if name not in self._above:
            return value
        kind = type(value)
        if kind in (dict, OrderedDict):
            made = kind((key, self.within(child, (*name, key_of(key)))) for key, child in value.items())
            if kind is OrderedDict:  # a module's state dict has `_metadata`
                made.__dict__.update(value.__dict__)
            return made
        if kind in (list, tuple):
            return kind(self.within(child, (*name, number)) for number, child in enumerate(value))
        return value

    def _as(self, old: Any, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(old, torch.nn.Parameter):
            found = self._parameters.get(id(tensor))
            if found is None:
                found = self._parameters[id(tensor)] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
            return found
        return tensor.requires_grad_(old.requires_grad) if isinstance(old, torch.Tensor) else tensor


__all__ = ["load_partly", "replaced"]
