"""The objects of a checkpoint of many ranks, in one process: those of rank 0, with every tensor whole.

skeleton of rank 0 ──→ its objects, with meta tensors where a DTensor was ──→ each is swapped for the tensor that is put together
modules' state dicts ──→ tensors of layers that only other ranks had are added
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.storage import UntypedStorage

from fastckpt.errors import RestoreError
from fastckpt.events import logger
from fastckpt.format.directory import Directory, TensorEntry
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.host.torch_names import fake_mode, is_meta_location, restore_location
from fastckpt.options import Options
from fastckpt.reading.alike import values_of, values_unlike
from fastckpt.reading.assembly import as_computed
from fastckpt.reading.object_loader import load_object
from fastckpt.reading.ranks import Ranks
from fastckpt.reading.whole_contents import WholeContents
from fastckpt.state.naming import named_tensors
from fastckpt.state.shards import is_box

_SHOWN = 5
_ELSE = "Read single tensors with fastckpt.open(url), or what one rank had: fastckpt.open(url, rank=…), `fastckpt restore --rank`"
Fill = Callable[[Sequence[int]], Mapping[int, UntypedStorage | None]]
"""Makes some storages of the contents, by number. None: one without data."""


class Swaps(NamedTuple):
    """Which tensors of a loaded state are swapped for others."""

    unread: frozenset[int]
    """Storages of rank 0 that are not read with its objects."""
    names: Mapping[Name, TensorEntry]
    """Of all tensors over these: their entries in the contents."""
    added: Mapping[Name, TensorEntry]
    """Of tensors that only other ranks had."""


def load_checkpoint(ranks: Ranks, where: str, options: Options, **how: Any) -> Any:
    """Load the objects of a checkpoint, of one rank or of many. Errors as those of `load_whole`.

    Args:
        ranks: the checkpoint.
        where: where it is, for errors.
        options: threads, connections and limits.
        how: further arguments of `load_object`.
    """
    if ranks.world > 1:
        return load_whole(WholeContents(ranks, options, where), **how)
    return load_object(ranks.whole(0), options, options.load_threads, **how)


def load_whole(contents: WholeContents, *, map_location: Any, **how: Any) -> Any:
    """Load rank 0's objects, with whole tensors. One warning names what each rank had for itself.

    Args:
        contents: the checkpoint.
        map_location: as for torch.load.
        how: further arguments of `load_object`.

    Raises:
        RestoreError: a tensor is in an object where it cannot be replaced, or no rank has saved all of it. Others as `load_object`.
    """
    if fake_mode() is not None:
        raise RestoreError(
            f"{contents.name} was saved by {contents.ranks.world} ranks, and cannot be loaded under a FakeTensorMode: its tensors are put "
            'together from data. Load it outside, with map_location="meta" if you need shapes alone'
        )
    ranks, options, threads = contents.ranks, contents.options, contents.threads
    own = ranks.whole(0)
    swaps = swaps_for(contents, own.directory)
    storages = contents.directory.storages
    if not is_meta_location(map_location):
        contents.require_fetchable(sum(storage.n_bytes for storage in storages if storage.extents is not None))
    wanted = [n for n in range(len(own.directory.storages)) if n not in swaps.unread]
    state = load_object(own, options, threads, map_location=map_location, wanted=wanted, **how)
    put_in(contents, state, swaps, lambda numbers: _filled(contents, numbers, map_location))
    words = left_out(contents, state, swaps, **how)
    if words:
        logger.warning("%s: %s", contents.name, words)
    return state


def swaps_for(
    contents: WholeContents, own: Directory, also: Callable[[TensorEntry], bool] = lambda entry: False
) -> Swaps:
    """What is to be swapped: DTensors, what shares memory with them, and storages if `also` says so of all tensors over them.

    RestoreError for DTensors that are no tensor as a whole.
    """
    mine = [entry for entry in own.tensors if not is_box(entry)]
    spread = {entry.storage for entry in mine if contents.wholes[entry.name].was_spread}
    chosen = spread | ({entry.storage for entry in mine} - {entry.storage for entry in mine if not also(entry)})
    listed = {entry.name: entry for entry in contents.directory.tensors}
    names = {entry.name: listed[entry.name] for entry in mine if entry.storage in chosen}
    several = [dotted(name) for name in names if contents.wholes[name].was_spread and contents.ranks_of(name)]
    if several:
        raise RestoreError(
            f"{contents.name}: of {_some(several)} ranks had parts of different tensors, so none of them is whole. {_ELSE}"
        )
    known = {entry.name for entry in mine}
    added = {n: entry for n, entry in listed.items() if n not in known and not contents.ranks_of(n)}
    return Swaps(frozenset(chosen), names, added)


def put_in(contents: WholeContents, state: Any, swaps: Swaps, fill: Fill) -> None:
    """Swap the tensors of a loaded state, and add what other ranks had to the state dicts of modules."""
    found: dict[Name, torch.Tensor] = {}
    for name, value, *_ in named_tensors(state):
        if name in swaps.names and isinstance(value, torch.Tensor):
            found[name] = value
    lost = [dotted(name) for name in swaps.names if name not in found]
    if lost:
        raise RestoreError(f"{contents.name}: {_some(lost)} cannot be put where the saved objects have them. {_ELSE}")
    modules = {name: module for name in swaps.added if (module := _module_of(state, name)) is not None}
    entries = {**swaps.names, **{name: swaps.added[name] for name in modules}}
    storages = fill(sorted({entry.storage for entry in entries.values()}))
    done: set[int] = set()
    for name, old in found.items():
        if id(old) not in done:  # a tensor that has two names is one
            done.add(id(old))
            torch.utils.swap_tensors(old, _tensor(entries[name], storages[entries[name].storage], old))
    for name, module in modules.items():
        module[name[-1]] = _tensor(entries[name], storages[entries[name].storage], None)


def _module_of(state: Any, name: Name) -> OrderedDict[Any, Any] | None:
    """The state dict of a module in which a tensor that rank 0 did not have belongs."""
    for key in name[:-1]:
        if not isinstance(state, dict) or key not in state:
            return None
        state = state[key]
    return state if type(state) is OrderedDict and hasattr(state, "_metadata") and name[-1] not in state else None


def _filled(contents: WholeContents, numbers: Sequence[int], map_location: Any) -> dict[int, UntypedStorage | None]:
    """Storages read, and put where `map_location` says."""
    if is_meta_location(map_location):
        return dict.fromkeys(numbers)
    locations = [contents.directory.storages[number].location for number in numbers]
    stay = set(locations) <= {"cpu"} if map_location is None else map_location in ("cpu", torch.device("cpu"))
    place = restore_location(map_location)
    with contents.storages(numbers, stay=stay) as read:
        return {
            number: place(read.take(number), location) if read.has_data(number) else None
            for number, location in zip(numbers, locations, strict=True)
        }


def left_out(contents: WholeContents, state: Any, swaps: Swaps, **how: Any) -> str:
    """In words, all that ranks have saved and is not in the loaded state. how: further arguments of `load_object`."""
    ranks, how = contents.ranks, {"map_location": "cpu", **how}
    own = [name for name in contents.wholes if contents.ranks_of(name)]
    of_first = {dotted(name) for name in own if 0 in contents.ranks_of(name)}
    first = values_of(ranks, 0, contents.options, contents.threads, **how)
    for rank in range(1, ranks.world):
        other = values_of(ranks, rank, contents.options, contents.threads, **how)
        of_first |= {dotted(name[:2]) for name in values_unlike(first, other, ())}
    lacking = {dotted(n) for n in swaps.added if _module_of(state, n) is not None or not _holds(state, n)}
    lacking |= {dotted(name) for name in own} - of_first
    return "; ".join(
        [
            *(
                [f"each rank had its own {_some(sorted(of_first))}, of which that of rank 0 was loaded"]
                if of_first
                else []
            ),
            *([f"rank 0 did not have {_some(sorted(lacking))}, which fastckpt.open reads"] if lacking else []),
        ]
    )


def _holds(state: Any, name: Name) -> bool:
    for key in name:
        if not isinstance(state, dict) or key not in state:
            return False
        state = state[key]
    return True


def _tensor(entry: TensorEntry, storage: UntypedStorage | None, old: torch.Tensor | None) -> torch.Tensor:
    dtype = getattr(torch, entry.dtype)
    if storage is None:
        device = "meta" if old is None else old.device
        made = torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device=device)
    else:
        made = torch.empty(0, dtype=dtype, device=storage.device)
        made.set_(storage, entry.offset, entry.shape, entry.stride)
    made = made if old is None else as_computed(made, old)
    requires_grad = entry.requires_grad if old is None else old.requires_grad
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=requires_grad)
    return made.requires_grad_(requires_grad)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


__all__ = ["Swaps", "left_out", "load_checkpoint", "load_whole", "put_in", "swaps_for"]
