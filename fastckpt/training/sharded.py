"""DTensors of live objects take the plain tensors of a checkpoint: this process's parts, put where they were. No collectives."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastckpt.format.directory import TensorEntry
from fastckpt.format.tensor_names import BOX, Name, dotted, key_of
from fastckpt.host.torch_names import dtensor_around, local_of, replicated_like
from fastckpt.state.local_state import copy_of, localised, sequence_of
from fastckpt.state.naming import named_tensors
from fastckpt.state.sharding import boxes_of
from fastckpt.state.shards import is_box

_Entries = Mapping[Name, TensorEntry]
_Part = tuple[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]
"""The shape of the whole; offset and shape of each block."""


def dtensors_in(state: Any, prefix: Name) -> Iterator[tuple[Name, torch.Tensor]]:
    """Names as in a checkpoint → tensors in a state, with DTensors whole."""
    local = localised(state, prefix, exact=False)
    for named in named_tensors(local.state, prefix):
        if isinstance(named.value, torch.Tensor):
            yield named.name, local.dtensors.get(id(named.value), named.value)


def patterns_of_state(
    key: str, parameters: Sequence[torch.Tensor], state: Mapping[Any, Any], entries: _Entries
) -> Iterator[tuple[Name, Any]]:
    """Names of an optimizer's state → DTensors that are spread as it is to be: those that are there, else, for what was a shard when it was
    saved, its parameter.
    """
    saved: dict[Any, list[Name]] = {}
    for name in entries:
        if name[:2] == (key, "state") and len(name) > 3:
            saved.setdefault(name[2], []).append(name)
    for number, parameter in enumerate(parameters):
        prefix = (key, "state", number)
        live = {name: t for name, t in dtensors_in(state.get(parameter, {}), prefix) if local_of(t) is not None}
        yield from live.items()
        if local_of(parameter) is None:
            continue
        for name in saved.get(number, []):
            if name not in live and not is_box(entries[name]) and was_spread(name, entries):
                yield name, _pattern(entries[name], parameter)


def _pattern(entry: TensorEntry, parameter: Any) -> Any:
    """As the parameter; for what every rank had all of, and is of another shape, the parameter's mesh."""
    whole = None if entry.place is None else entry.place.shape
    if whole == entry.shape and whole != tuple(parameter.shape):
        return replicated_like(torch.empty(entry.shape, device="meta"), parameter)
    return parameter


def was_spread(name: Name, entries: _Entries) -> bool:
    """Whether a tensor stood for a part of a DTensor when it was saved."""
    return entries[name].place is not None or (*name, BOX, 0) in entries


def _saved_part(name: Name, entries: _Entries) -> _Part:
    """A plain tensor is a whole."""
    entry = entries[name]
    if entry.place is not None:
        return entry.place.shape, [(entry.place.offset, entry.shape)]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    while (row := entries.get((*name, BOX, len(boxes)))) is not None and row.place is not None:
        whole = row.place.shape
        boxes.append((row.place.offset, row.shape))
    return (whole, boxes) if boxes else (entry.shape, [((0,) * len(entry.shape), entry.shape)])


def misfits(
    sharded: Mapping[Name, Any], live: Mapping[Name, torch.Tensor], entries: _Entries, optimizers: Collection[str]
) -> list[str]:
    """Words for each tensor that was spread over ranks in another way than it is here. optimizers: names of those in the state."""
    found: list[str] = []
    for name, dtensor in sharded.items():
        if name in entries:
            found += _misfit(name, dtensor, entries)
    for name in _shards(entries):
        if name not in sharded and (name in live or (name[0] in optimizers and name[1:2] == ("state",))):
            here = f"{list(live[name].shape)}, whole," if name in live else "whole"
            found.append(f"{dotted(name)} is {here} here and {_words(_saved_part(name, entries))} in the checkpoint")
    return found


def without_pattern(sharded: Mapping[Name, Any], entries: _Entries) -> list[Name]:
    """Shards for which no live DTensor says how they are spread: plain tensors come back for them."""
    return [name for name in _shards(entries) if name not in sharded]


def _shards(entries: _Entries) -> Iterator[Name]:
    """Names of what was less than the whole when it was saved."""
    for name, entry in entries.items():
        of_its_own = not is_box(entry) and name[-1:] != ("_local_tensor",)  # no row beside that of a DTensor
        if of_its_own and was_spread(name, entries) and not _is_whole(_saved_part(name, entries)):
            yield name


def _misfit(name: Name, dtensor: Any, entries: _Entries) -> Iterator[str]:
    local = local_of(dtensor)
    assert local is not None
    saved = _saved_part(name, entries)
    boxes = boxes_of(dtensor)
    here: _Part = (tuple(dtensor.shape), [(box.offset, box.shape) for box in boxes] or saved[1])
    fits = tuple(local.shape) == entries[name].shape and here[0] == saved[0]
    if fits and (here[1] == saved[1] or 0 in local.shape):
        return
    yield f"{dotted(name)} is {_words(here)} here and {_words(saved)} in the checkpoint"


def _is_whole(part: _Part) -> bool:
    whole, blocks = part
    return [shape for _, shape in blocks] == [whole]


def _words(part: _Part) -> str:
    whole, blocks = part
    if _is_whole(part):
        return f"{list(whole)}, whole,"
    return " and ".join(f"{list(shape)} at {list(offset)}" for offset, shape in blocks) + f" of {list(whole)}"


def into_dtensors(value: Any, name: Name, sharded: Mapping[Name, Any]) -> Any:
    """A loaded state with DTensors, spread as those of `sharded`, in place of plain tensors. What has none in it is not copied.

    Args:
        value: of the object.
        name: the object's.
        sharded: names → DTensors of the live object.
    """
    if not any(known[: len(name)] == name for known in sharded):
        return value
    return _into(value, name, sharded, {})


def _into(value: Any, name: Name, sharded: Mapping[Name, Any], made: dict[int, Any]) -> Any:
    """made: id() of loaded objects → what stands for them. One that is there twice stays one."""
    if id(value) in made:
        return made[id(value)]
    found = value
    if isinstance(value, torch.Tensor):
        if name in sharded and local_of(value) is None:
            found = _around(value, sharded[name])
    elif isinstance(value, dict):
        found = copy_of(value)
        for key, child in value.items():
            found[key] = _into(child, (*name, key_of(key)), sharded, made)
    elif isinstance(value, (list, tuple)):
        found = sequence_of(value, [_into(c, (*name, number), sharded, made) for number, c in enumerate(value)])
    made[id(value)] = found
    return found


def _around(local: torch.Tensor, like: Any) -> Any:
    tensor = dtensor_around(local, like)
    if isinstance(local, torch.nn.Parameter):
        return torch.nn.Parameter(tensor, requires_grad=local.requires_grad)
    return tensor.requires_grad_(local.requires_grad)
