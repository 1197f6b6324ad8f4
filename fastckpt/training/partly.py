"""Objects of which only some tensors are read: the others are meta tensors, for which something else is put in."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastckpt.errors import RestoreError
from fastckpt.format.tensor_names import Name, dotted, key_of
from fastckpt.options import Options
from fastckpt.reading.assembly import as_computed
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_loader import load_object
from fastckpt.state.local_state import copy_of, sequence_of


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
    return load_object(
        reader,
        options,
        threads,
        map_location=map_location,
        pickle_module=pickle,
        weights_only=weights_only,
        load_args={"encoding": "utf-8"},
        places=places,
        beyond_torch=True,
        wanted=wanted,
    )


def replaced(value: Any, given: Mapping[Name, torch.Tensor]) -> Any:
    """A loaded state with other tensors under some names. Containers in which something changes are copied, the others are kept.

    Args:
        value: nested dictionaries, lists and tuples, and kinds of these.
        given: name → the tensor that stands there. Where a parameter was, it becomes one. A tensor that is given under two names stays one.

    Raises:
        RestoreError: some of the names lie in other objects, where nothing can be put in.
    """
    replacing = _Replacing(given)
    found = replacing.within(value, ())
    lost = sorted(map(dotted, given.keys() - replacing.reached))
    if lost:
        raise RestoreError(
            f"{', '.join(lost[:20])} cannot be put together for another layout, because of the objects that they lie in: only "
            "dictionaries, lists and tuples are copied. Nothing was changed. Restore in the layout that was saved"
        )
    return found


class _Replacing:
    def __init__(self, given: Mapping[Name, torch.Tensor]) -> None:
        self._given = given
        self._above = {name[:length] for name in given for length in range(len(name))}
        """Names of what has something given in it."""
        self._parameters: dict[int, torch.nn.Parameter] = {}
        """id() of a given tensor → the parameter over it."""
        self.reached: set[Name] = set()

    def within(self, value: Any, name: Name) -> Any:
        if name in self._given and isinstance(value, torch.Tensor):
            self.reached.add(name)
            return self._as(value, self._given[name])
        if name not in self._above:
            return value
        if isinstance(value, dict):
            made = copy_of(value)
            for key, child in value.items():
                made[key] = self.within(child, (*name, key_of(key)))
            return made
        if isinstance(value, (list, tuple)):
            return sequence_of(value, [self.within(child, (*name, number)) for number, child in enumerate(value)])
        return value

    def _as(self, old: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        tensor = as_computed(tensor, old)
        if isinstance(old, torch.nn.Parameter):
            found = self._parameters.get(id(tensor))
            if found is None:
                found = self._parameters[id(tensor)] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
            return found
        return tensor.requires_grad_(old.requires_grad)


__all__ = ["load_partly", "replaced"]
