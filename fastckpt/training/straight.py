"""Finds the storages of a checkpoint that may be read straight into memory that live objects have, or are about to take. Changes nothing.

A storage goes straight only where every object ends with what a copy of loaded memory would have given it, and nobody else sees a change:
each of its tensors lies in the checkpoint as the live one does, and the object that takes it copies it to where it is already. That is seen
in an outline: the loaded state without data. What cannot be seen in it goes the other way: it is loaded, and then copied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.storage import UntypedStorage

from fastckpt.format.directory import Directory, TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX
from fastckpt.format.tensor_names import Name
from fastckpt.host.torch_names import has_storage, identity
from fastckpt.state.chunking import BUNDLE_BYTES
from fastckpt.state.naming import named_tensors
from fastckpt.state.shards import is_box
from fastckpt.training.exact import SavedPlaces, takes_the_given
from fastckpt.training.filling import Filling, has_a_place_for_each_element
from fastckpt.training.placement import PlacementPlan, has_plain_memory, parameter_groups, part_of, takes_in_place
from fastckpt.training.seen_through import is_seen_through

MOST_SMALL_BYTES = 16 << 20
"""Small storages are loaded first, up to this many bytes: they share chunks, and a load of them leaves the objects alone if it fails."""

_Tensors = dict[Name, torch.Tensor]
_PLAIN = ("tensor", "parameter")


class Straight(NamedTuple):
    """What is read straight."""

    storages: Mapping[int, UntypedStorage] = {}
    """Number of a storage → the memory that it is read into."""
    rows: Mapping[Name, TensorEntry] = {}
    """The tensors in these storages, as the checkpoint lists them."""
    live: Sequence[torch.Tensor] = ()
    """The tensors that lie there now."""
    states: frozenset[int] = frozenset()
    """Which of the storages are state of optimizers, which no forward pass needs."""

    def holds(self, loaded: Any) -> bool:
        """Whether the tensors of a loaded state that lie over these storages are those of `rows`, and no others."""
        numbers = {identity(storage): number for number, storage in self.storages.items()}
        found = set()
        for name, tensor in _tensors_in(loaded):
            number = numbers.get(identity(tensor.untyped_storage())) if has_storage(tensor) else None
            if number is not None:
                row = self.rows.get(name)
                if row is None or row.storage != number or not _is_as_saved(tensor, row):
                    return False
                found.add(name)
        return found == self.rows.keys()


NOTHING = Straight()


def find_straight(
    targets: Mapping[str, Any],
    directory: Directory,
    plan: PlacementPlan,
    outline: Callable[[Sequence[int]], Any],
    *,
    new_on_host: bool,
) -> Straight:
    """What of a checkpoint goes straight into the objects.

    Args:
        targets: the objects.
        directory, plan: of the checkpoint.
        outline: loads its state with the data of these storages only; other tensors are meta tensors.
        new_on_host: whether optimizers, too, that have no state yet get host memory to be read into later. On a device they always do.
    """
    rows: dict[int, list[TensorEntry]] = defaultdict(list)
    for row in directory.tensors:
        if not is_box(row):
            rows[row.storage].append(row)
    found = _filled_now(targets, directory, rows, plan)
    new = _new_state(targets, directory, rows, plan, found, on_host=new_on_host)
    for number in _small(directory, [*found, *new]):
        found.pop(number, None)
        new.pop(number, None)
    if not found and not new:
        return NOTHING
    needs_data = [n for n in range(len(directory.storages)) if not _may_be_outlined(directory, n, rows.get(n, ()))]
    confirmed = _confirmed(targets, outline(needs_data), plan, found, new)
    storages = {
        number: next(iter(found[number].values())).untyped_storage()
        if number in found
        else torch.empty(directory.storages[number].n_bytes, dtype=torch.uint8, device=new[number]).untyped_storage()
        for number in confirmed
    }
    return Straight(
        storages=storages,
        rows={row.name: row for number in confirmed for row in rows[number]},
        live=[tensor for number in confirmed for tensor in found.get(number, {}).values()],
        states=frozenset(n for n in confirmed if n in new or any(row.name in plan.states for row in rows[n])),
    )


def are_taken(straight: Straight, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether what is read straight for optimizers is read into their state."""
    memories = {
        identity(part_of(named.value).untyped_storage())
        for optimizer in optimizers
        for named in named_tensors(list(optimizer.state.values()))
        if isinstance(named.value, torch.Tensor) and has_storage(part_of(named.value))
    }
    return {identity(straight.storages[number]) for number in straight.states} <= memories


def _filled_now(
    targets: Mapping[str, Any], directory: Directory, rows: Mapping[int, Sequence[TensorEntry]], plan: PlacementPlan
) -> dict[int, _Tensors]:
    """Number of a storage → the live tensors that lie in one memory as the saved ones lie in it."""
    live = dict(_own_memory(targets, plan))
    found: dict[int, _Tensors] = {}
    for number, some in rows.items():
        tensors = {row.name: live[row.name] for row in some if row.name in live and _is_as_saved(live[row.name], row)}
        if len(tensors) < len(some) or directory.storages[number].extents is None:
            continue
        memories = {identity(tensor.untyped_storage()) for tensor in tensors.values()}
        n_bytes = directory.storages[number].n_bytes
        first = next(iter(tensors.values()))
        if (
            len(memories) == 1
            and first.untyped_storage().nbytes() == n_bytes
            and _cover(list(tensors.values()), n_bytes)
        ):
            found[number] = tensors
    return found


def _cover(tensors: Sequence[torch.Tensor], n_bytes: int) -> bool:
    """Whether tensors of one memory leave nothing of it to somebody who did not give it to us."""
    end = 0
    for tensor in sorted(tensors, key=lambda one: one.storage_offset() * one.itemsize):
        start = int(tensor.storage_offset()) * tensor.itemsize
        if start > end or not _is_dense(tensor):
            return False
        end = max(end, start + int(tensor.nbytes))
    return end == n_bytes


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order: each has a place of its own, and the last is where it can be first."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == reach + 1


def _own_memory(targets: Mapping[str, Any], plan: PlacementPlan) -> Iterator[tuple[Name, torch.Tensor]]:
    """The tensors whose memory may be written: of DTensors, this process's parts."""
    takes = {
        key
        for key, target in targets.items()
        if takes_in_place(target) or isinstance(target, (torch.Tensor, dict, list)) or takes_the_given(target)
    }
    apart = plan.sole | plan.tied
    for name, whole in (*plan.live.items(), *plan.states.items()):
        tensor = part_of(whole)
        if name[0] in takes and id(tensor) in apart and _can_be_written(tensor):
            yield name, tensor


def _can_be_written(tensor: torch.Tensor) -> bool:
    with torch.no_grad():
        return (
            has_plain_memory(tensor)
            and not (
                tensor.is_meta or tensor.is_inference() or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
            )
            and _is_reachable(tensor.device)
            and has_a_place_for_each_element(tensor)
        )


def _is_reachable(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return current is not None and current.type == device.type


def _is_as_saved(tensor: torch.Tensor, row: TensorEntry) -> bool:
    return (
        row.kind in _PLAIN
        and _is_of_type(tensor, row)
        and (tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
        == (row.shape, row.stride, row.offset)
    )


def _new_state(
    targets: Mapping[str, Any],
    directory: Directory,
    rows: Mapping[int, Sequence[TensorEntry]],
    plan: PlacementPlan,
    found: Mapping[int, object],
    *,
    on_host: bool,
) -> dict[int, torch.device]:
    """Number of a storage → the device of the parameter that it is state of, where an optimizer takes what it is given as it is.

    on_host: whether to look for those on the host, too.
    """
    optimizers = {key: target for key, target in targets.items() if takes_the_given(target)}
    parameters = {
        key: [p for group in parameter_groups(target) for p in group["params"]] for key, target in optimizers.items()
    }
    places, saved = {key: SavedPlaces(key, plan) for key in optimizers}, plan.saved_parameters()
    new: dict[int, torch.device] = {}
    for number, some in rows.items():
        name, storage = some[0].name, directory.storages[number]
        if len(some) > 1 or number in found or len(name) != 4 or name[1] != "state" or name[3] == "step":
            continue
        key, index, mine = str(name[0]), name[2], parameters.get(str(name[0]), [])
        if not isinstance(index, int) or not 0 <= index < len(mine) or storage.extents is None:
            continue
        row, device = saved.get(id(mine[index])), part_of(mine[index]).device
        if not _fills_alone(some[0], storage.n_bytes) or (row is not None and not _is_of_type(mine[index], row)):
            continue
        if device.type == "cpu":
            usable = on_host
        else:  # some optimizers keep state on the host on purpose
            host = storage.location == "cpu" and places[key].was_on_device(index, row)
            usable = _is_reachable(device) and not host
        if usable:
            new[number] = device
    return new


def _fills_alone(row: TensorEntry, n_bytes: int) -> bool:
    """Whether a tensor is contiguous and all that its storage has."""
    dtype = getattr(torch, row.dtype, None)
    if row.kind not in _PLAIN or not isinstance(dtype, torch.dtype) or row.offset:
        return False
    like = torch.empty(row.shape, dtype=dtype, device="meta")
    return like.nbytes == n_bytes and tuple(like.stride()) == row.stride


def _is_of_type(tensor: torch.Tensor, row: TensorEntry) -> bool:
    """Whether a parameter has the element type that it was saved with. Otherwise its state follows it, by a copy."""
    return str(tensor.dtype) == f"torch.{row.dtype}"


def _small(directory: Directory, numbers: Sequence[int]) -> list[int]:
    small, total = [], 0
    for number in sorted(numbers, key=lambda n: directory.storages[n].n_bytes):
        n_bytes = directory.storages[number].n_bytes
        total += n_bytes
        if n_bytes >= BUNDLE_BYTES or total > MOST_SMALL_BYTES:
            break
        small.append(number)
    return small


def _may_be_outlined(directory: Directory, number: int, rows: Sequence[TensorEntry]) -> bool:
    """Whether objects can be made without these data: not so arrays, and tensors that are made of others."""
    return (
        bool(rows)
        and not directory.storages[number].dtype.startswith(NUMPY_PREFIX)
        and all(r.kind in _PLAIN for r in rows)
    )


def _confirmed(
    targets: Mapping[str, Any],
    outline: Any,
    plan: PlacementPlan,
    found: Mapping[int, _Tensors],
    new: Mapping[int, object],
) -> list[int]:
    """The storages of which each tensor will be taken as expected."""
    if not isinstance(outline, dict) or not is_seen_through(outline):
        return []
    copied = _copies(targets, outline, plan)
    wrong: set[int] = set()
    taken: set[Name] = set()
    for name, tensor in _tensors_in(outline):
        row = plan.entries.get(name)
        if not tensor.is_meta:
            continue
        if row is None:
            return []
        live = found.get(row.storage, {}).get(name)
        into = copied.get(id(tensor), live)
        if _is_as_saved(tensor, row) and into is live and (live is not None or row.storage in new):
            taken.add(name)
        else:
            wrong.add(row.storage)
    seen = {plan.entries[name].storage for name in taken}
    return [n for n in found if n not in wrong and found[n].keys() <= taken] + [
        n for n in new if n not in wrong and n in seen
    ]


def _copies(targets: Mapping[str, Any], outline: Mapping[Any, Any], plan: PlacementPlan) -> dict[int, Any]:
    """id() of a tensor in the states of dictionaries, lists and tensors → the live tensor that it will be copied into; None: it replaces
    one.
    """
    copied: dict[int, Any] = {}
    for key, target in targets.items():
        value = outline.get(key)
        if any(isinstance(target, kind) and isinstance(value, kind) for kind in (dict, list)):
            trial = Filling(plan, tries=True)
            trial.fill_top(target, value)
            copied |= dict.fromkeys((id(tensor) for _, tensor in _tensors_in({key: value})))
            copied |= {id(content): into for into, content in trial.copies}
    return copied


def _tensors_in(state: Any) -> Iterator[tuple[Name, torch.Tensor]]:
    """Names → tensors of a state, with all names that a tensor has."""
    for key, value in state.items() if isinstance(state, dict) else ():
        for named in named_tensors(value, (key,)):
            if isinstance(named.value, torch.Tensor):
                yield named.name, named.value
