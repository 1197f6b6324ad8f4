"""Copies tensors of a checkpoint into live ones of the same name, in place. Of a DTensor each rank copies its own part, and asks nobody."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.storage import UntypedStorage

from fastckpt.errors import UnknownTensorError
from fastckpt.format.directory import TensorEntry
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.format.wholes import Box
from fastckpt.host.torch_names import local_of, persistent_buffers
from fastckpt.reading.assembly import Target, is_whole, moves_of
from fastckpt.reading.contents import Contents
from fastckpt.state.invariants import require_fit
from fastckpt.state.naming import Named, named_tensors
from fastckpt.state.sharding import Box as Part
from fastckpt.state.sharding import boxes_of, has_partial_sums
from fastckpt.state.wrappers import names_inside

_LOCAL = "_local_tensor"
"""The name that a DTensor's part has in it."""


class Copy(NamedTuple):
    """One copy: its source and its target."""

    named: Named
    entry: TensorEntry
    part: Target | None = None
    """Of a DTensor: what this rank has of it."""

    @property
    def target(self) -> torch.Tensor:
        """The live tensor."""
        assert isinstance(self.named.value, torch.Tensor)
        return self.named.value


class CopyInto:
    """One call of `TensorReader.load_into`."""

    def __init__(
        self,
        contents: Contents,
        find: Callable[[Name], TensorEntry | str],
        require: Callable[[Sequence[TensorEntry]], None],
        make: Callable[[TensorEntry, UntypedStorage | None], Any],
    ) -> None:
        """find: the entry for the name of a live tensor, or why there is none. require: raises unless these can be read. make: makes the
        tensor of an entry over its storage.
        """
        self._contents, self._find, self._require, self._make = contents, find, require, make

    def run(self, state: Any, *, strict: bool) -> list[str]:
        """See `TensorReader.load_into`."""
        plan, problems = [], []
        for named in named_tensors(_with_registered(state)):
            if isinstance(named.value, torch.Tensor):
                found = self._copy_for(named)
                if isinstance(found, str):
                    problems.append(f"{dotted(_name_of(named))}: {found}")
                else:
                    plan.append(found)
        if problems and strict:
            raise UnknownTensorError(f"{self._contents.name} does not fit the state:\n  " + "\n  ".join(problems))
        self._require([copy.entry for copy in plan if copy.part is None])
        parts = [copy for copy in plan if copy.part is not None]
        plain = [copy for copy in plan if copy.part is None]
        # Indices and offsets: they decide where kernels of sparse and jagged tensors read and write.
        places = [copy for copy in plain if copy.named.owner is not None and not copy.target.is_floating_point()]
        of_places = {id(copy) for copy in places}
        with torch.no_grad():
            self._copy_places(places)
            self._copy([copy for copy in plain if id(copy) not in of_places])
            targets = [copy.part for copy in parts if copy.part is not None]
            for copy, tensor in zip(parts, self._contents.assemble(targets), strict=True):
                copy.target.copy_(tensor)
        return [dotted(copy.entry.name) for copy in plan]

    def _copy_for(self, named: Named) -> Copy | str:
        """How a live tensor is filled, or why it cannot be."""
        value = named.value
        assert isinstance(value, torch.Tensor)
        entry = self._find(_name_of(named))
        if isinstance(entry, str):
            return entry
        owner = _dtensor_of(named)
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape if owner is None else owner.shape)
        saved = self._contents.wholes.get(entry.name)
        if owner is None or saved is None:
            if (entry.dtype, entry.shape) != (dtype, shape):
                return f"{entry.dtype} {list(entry.shape)} in the checkpoint, {dtype} {list(shape)} in the state"
            return Copy(named, entry)
        if (saved.dtype, saved.shape) != (dtype, shape):
            return (
                f"{saved.dtype} {list(saved.shape)} in the checkpoint, {dtype} {list(shape)}, a DTensor, in the state"
            )
        boxes = () if has_partial_sums(owner) else boxes_of(owner)
        if not boxes:
            return f"nobody can tell what this rank has of it: its placements are {tuple(owner.placements)}"
        part = Target(saved.dtype, tuple(value.shape), tuple(moves_of(saved.blocks, _wanted(boxes))), entry.name)
        if not is_whole(part):
            at = " and ".join(f"{list(box.shape)} at {list(box.offset)}" for box in boxes)
            return f"the checkpoint does not have all of {at} of {list(shape)}, which is this rank's part"
        return Copy(named, entry, part)

    def _copy(self, plan: Sequence[Copy]) -> None:
        """Read each storage once, even if several tensors view it, and drop it before the next."""
        in_order = sorted(plan, key=lambda copy: copy.entry.storage)
        with self._contents.storages(list(dict.fromkeys(copy.entry.storage for copy in in_order))) as storages:
            for number, group in itertools.groupby(in_order, lambda copy: copy.entry.storage):
                storage = storages.take(number) if storages.has_data(number) else None
                for copy in group:
                    copy.target.copy_(self._make(copy.entry, storage))

    def _copy_places(self, places: Sequence[Copy]) -> None:
        """Copy indices and offsets of composite tensors; if they would not fit, restore the old values."""
        before = [copy.target.clone() for copy in places]
        try:
            self._copy(places)
            require_fit([copy.named.owner for copy in places], self._contents.name)
        except BaseException:
            for copy, value in zip(places, before, strict=True):
                copy.target.copy_(value)
            raise


def _with_registered(value: Any) -> Any:
    """The state with dictionaries in place of modules: the tensors that a module's state dict has, by the names without wrappers. What a
    framework keeps beside them (FSDP has flat copies) is nobody's to load.
    """
    if isinstance(value, torch.nn.Module):
        inside = names_inside(value)
        own: dict[str, torch.Tensor] = dict(value.named_parameters(remove_duplicate=False))
        buffers = dict(value.named_buffers(remove_duplicate=False))
        for path, module in value.named_modules(remove_duplicate=False):
            names = (f"{path}.{name}" if path else name for name in persistent_buffers(module))
            own |= {name: buffers[name] for name in names if name in buffers}
        return own if inside is None else {inside.name(name): tensor for name, tensor in own.items()}
    kind = type(value)
    if kind in (dict, OrderedDict):
        made = {key: _with_registered(child) for key, child in value.items()}
        return value if all(made[key] is child for key, child in value.items()) else made
    if kind in (list, tuple):
        items = [_with_registered(child) for child in value]
        return value if all(one is other for one, other in zip(items, value, strict=True)) else items
    return value


def _dtensor_of(named: Named) -> Any:
    """The DTensor that a live tensor is the part of; None if it is none."""
    is_part = named.owner is not None and named.name[-1] == _LOCAL and local_of(named.owner) is not None
    return named.owner if is_part else None


def _name_of(named: Named) -> Name:
    """The name of a live tensor; of a DTensor's part, that of the DTensor."""
    return named.name if _dtensor_of(named) is None else named.name[:-1]


def _wanted(boxes: Sequence[Part]) -> Iterator[tuple[Box, tuple[int, ...]]]:
    return (((box.offset, box.shape), box.local_offset) for box in boxes if 0 not in box.shape)


__all__ = ["CopyInto"]
