"""Which storages of a state several ranks hold alike, and so who writes which bytes. Asks nobody: each rank comes to the same answer.

    what                                                     who holds the same bytes
    a DTensor's part                                         the ranks along the mesh dimensions that replicate it
    parameters in DistributedDataParallel                    the ranks of its process group
    what an optimizer keeps of each of these                 the same
    buffers in it                                            those of the group's first rank stand for all, as it broadcasts them
    what the user says (`Checkpointer(replicated=…)`)        all ranks

All else is a rank's own: also a storage without a name, and one that is only in part what is listed here.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from fastckpt.events import logger
from fastckpt.format.digest import digest
from fastckpt.format.directory import Share, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.shares import GroupClaim
from fastckpt.format.tensor_names import Name, canonical, dotted
from fastckpt.host.torch_names import gradient_hooks
from fastckpt.ranks.ownership import Replicated, share_out
from fastckpt.ranks.world import ALONE, World
from fastckpt.state import Captured
from fastckpt.state.chunking import chunk_bytes
from fastckpt.state.chunks import storage_shapes
from fastckpt.state.prints import prints_of
from fastckpt.state.shards import is_box
from fastckpt.state.wrappers import names_inside
from fastckpt.training.placement import parameter_groups


class _Holders(NamedTuple):
    group: tuple[int, ...]
    only_first: bool = False


def check_replicated(replicated: Any, targets: Collection[str]) -> tuple[str, ...]:
    """The names that a user declares, as a tuple. TypeError for what cannot be names, ValueError for those of no object."""
    if isinstance(replicated, str) or not isinstance(replicated, Sequence):
        raise TypeError(f"replicated is {replicated!r}: expected names, such as ('model', 'optim.state')")
    wrong = [name for name in replicated if not isinstance(name, str)]
    if wrong:
        raise TypeError(
            f"replicated has {', '.join(map(repr, wrong))}: expected names, such as ('model', 'optim.state')"
        )
    unknown = [name for name in replicated if not any(is_in(name, target) for target in targets)]
    if unknown:
        raise ValueError(
            f"replicated names {', '.join(map(repr, unknown))}, which is in no object of the state: its names begin with "
            f"{', '.join(map(repr, targets))}"
        )
    return tuple(replicated)


class Replicas:
    """Used by the thread that trains."""

    def __init__(self, targets: Mapping[str, Any], declared: Sequence[str] = (), world: World = ALONE) -> None:
        """declared: names, and beginnings of names up to a dot, of what is the same on all ranks. world: those that save together."""
        self._targets, self.declared, self._world = targets, tuple(declared), world
        self._form: object = None
        self._shares: dict[int, tuple[Share, ...]] = {}
        self._groups: dict[tuple[int, ...], list[int]] = {}
        """Ranks → the numbers of the storages that they hold alike with this one."""
        self._claims: tuple[GroupClaim, ...] = ()
        self._names: dict[int, Any] = {}
        """Of those storages."""
        self._broadcast: set[int] = set()
        """Those that differ from rank to rank until the next forward: buffers."""
        self._unmatched = set(declared)

    def share(self, captured: Captured) -> None:
        """Say in a captured state who writes what of it. Decided anew only when its form has changed."""
        here = self._world
        if here.is_alone:
            return
        if captured.form is not self._form:
            self._shares, self._form = self._decide(captured, here.rank, here.size), captured.form
            self._claims = tuple(self._claim(captured, ranks) for ranks in self._groups)
        captured.rank, captured.shares = here.rank, self._shares
        captured.groups = self._claims

    def verify(self, captured: Captured) -> None:
        """Enter in a captured state, shared by now, the digests of all bytes that other ranks should hold alike. Reads all of them."""
        padded = {
            entry.storage for entry in captured.tensors if entry.name in captured.shards and _is_padded(entry, captured)
        }
        checked = [n for numbers in self._groups.values() for n in numbers if n not in self._broadcast | padded]
        captured.prints = prints_of(captured, checked)
        captured.groups = tuple(self._claim(captured, ranks) for ranks in self._groups)

    def _claim(self, captured: Captured, ranks: tuple[int, ...]) -> GroupClaim:
        rows = [
            f"{self._names[number]!r} {captured.storages[number].dtype} {captured.storages[number].n_bytes} "
            f"{[tuple(share) for share in self._shares[number]]} {captured.prints.get(number, '')}"
            for number in self._groups[ranks]
        ]
        return GroupClaim(ranks, digest("\n".join(sorted(rows)).encode()).hex())

    def _decide(self, captured: Captured, rank: int, world: int) -> dict[int, tuple[Share, ...]]:
        views: dict[int, list[TensorEntry]] = defaultdict(list)
        for entry in captured.tensors:
            if not is_box(entry):
                views[entry.storage].append(entry)
        holders = self._holders(captured, world)
        numbers, found = [], []
        for shape in storage_shapes(captured):
            who = _common([holders.get(entry.name) for entry in views[shape.number]])
            if who is None or shape.name is None or not shape.n_bytes or rank not in who.group or len(who.group) == 1:
                continue
            if not _covers(views[shape.number], shape.n_bytes, captured):
                continue
            numbers.append(shape.number)
            first_byte = shape.first_element * shape.element.n_bytes
            unit = chunk_bytes(shape.element)
            found.append(Replicated(canonical(shape.name), shape.n_bytes, unit, who.group, who.only_first, first_byte))
        # Ranks find each other's storages by their first names.
        names = Counter(one.key for one in found)
        unique = [n for n, one in enumerate(found) if names[one.key] == 1 and not _has_text_for_people(one.key)]
        shares = share_out([found[n] for n in unique])
        self._groups, self._names = {}, {}
        self._broadcast = {numbers[n] for n in unique if found[n].only_first}
        for n, own in zip(unique, shares, strict=True):
            if own:
                self._groups.setdefault(found[n].group, []).append(numbers[n])
                self._names[numbers[n]] = found[n].key
        return {numbers[n]: own for n, own in zip(unique, shares, strict=True) if own}

    def _holders(self, captured: Captured, world: int) -> dict[Name, _Holders]:
        """Of each name, by whom it is held, as far as others than this rank do."""
        found: dict[Name, _Holders] = {}
        everybody = _Holders(tuple(range(world)))
        for entry in captured.tensors:
            if self._declares(dotted(entry.name)) and entry.name not in captured.shards:
                found[entry.name] = everybody
        of_parameters: dict[int, _Holders] = {}
        for key, target in self._targets.items():
            if isinstance(target, torch.nn.Module):
                for name, tensor, who in _in_data_parallel(key, target):
                    found[name] = who
                    if not who.only_first:
                        of_parameters[id(tensor)] = who
        for key, target in self._targets.items():
            if of_parameters and isinstance(target, torch.optim.Optimizer) and _says_its_state_plainly(target):
                found.update(_of_optimizer(key, target, of_parameters, captured.tensors))
        for name, shard in captured.shards.items():
            if len(shard.group) > 1:  # else it may still be in DistributedDataParallel
                found[name] = _Holders(shard.group)
        if self._unmatched:
            logger.warning(
                "replicated names %s, and no tensor of the state has a name that begins so",
                ", ".join(sorted(self._unmatched)),
            )
            self._unmatched = set()
        return found

    def _declares(self, name: str) -> bool:
        matching = [declared for declared in self.declared if is_in(name, declared)]
        self._unmatched.difference_update(matching)
        return bool(matching)


def _is_padded(entry: TensorEntry, captured: Captured) -> bool:
    """Whether a storage holds more than its tensor: what lies there means nothing, and differs."""
    element = element_type(entry.dtype)
    return element is None or math.prod(entry.shape) * element.n_bytes < captured.storages[entry.storage].n_bytes


def is_in(name: str, beginning: str) -> bool:
    """Whether a dotted name is this one, or begins with it up to a dot."""
    return name == beginning or name.startswith(f"{beginning}.")


def _in_data_parallel(key: str, module: torch.nn.Module) -> Iterator[tuple[Name, torch.Tensor, _Holders]]:
    """Names in a checkpoint of what DistributedDataParallel modules keep alike, in a module or around it."""
    inside = names_inside(module)
    for path, one in module.named_modules(remove_duplicate=False):
        if not isinstance(one, DistributedDataParallel) or inside is None or not _averages_over_all(one):
            continue
        group = tuple(sorted(torch.distributed.get_process_group_ranks(one.process_group)))
        tensors = [(name, tensor, False) for name, tensor in one.module.named_parameters(remove_duplicate=False)]
        if one.broadcast_buffers:
            tensors += [(name, tensor, True) for name, tensor in one.module.named_buffers(remove_duplicate=False)]
        for name, tensor, only_first in tensors:
            if name not in one.parameters_to_ignore:
                own = f"{path}.module.{name}" if path else f"module.{name}"
                yield (key, inside.name(own)), tensor, _Holders(group, only_first)


def _averages_over_all(module: DistributedDataParallel) -> bool:
    """Whether its parameters are alike after each step. With hooks of somebody's own, or those of local SGD, they need not be."""
    known = "torch.distributed.algorithms.ddp_comm_hooks."
    unlike = (f"{known}post_localSGD_hook", f"{known}debugging_hooks")
    return all(
        getattr(hook, "__module__", "").startswith(known) and hook.__module__ not in unlike
        for hook in gradient_hooks(module)
    )


def _says_its_state_plainly(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state dict is torch's, which numbers parameters in the order of the groups."""
    return (
        type(optimizer).state_dict is torch.optim.Optimizer.state_dict
        and "state_dict" not in vars(optimizer)
        and not getattr(optimizer, "_optimizer_state_dict_post_hooks", None)
    )


def _of_optimizer(
    key: str, optimizer: torch.optim.Optimizer, of_parameters: Mapping[int, _Holders], entries: Sequence[TensorEntry]
) -> Iterator[tuple[Name, _Holders]]:
    parameters = [p for group in parameter_groups(optimizer) for p in group["params"]]
    who: dict[Any, _Holders | None] = {
        number: of_parameters.get(id(parameter)) for number, parameter in enumerate(parameters)
    }
    for entry in entries:
        if entry.name[:2] == (key, "state") and len(entry.name) > 3:
            held = who.get(entry.name[2])
            if held is not None:
                yield entry.name, held


def _common(holders: Sequence[_Holders | None]) -> _Holders | None:
    """What is true of all views of a storage."""
    return holders[0] if holders and all(one == holders[0] for one in holders) else None


def _covers(views: Sequence[TensorEntry], n_bytes: int, captured: Captured) -> bool:
    """Whether nothing else lies in a storage than these, padding aside."""
    if any(view.name in captured.shards and captured.shards[view.name].owns_storage for view in views):
        return True
    end = 0
    for start, stop in sorted(map(_stretch, views)):
        if start > end:
            return False
        end = max(end, stop)
    return end >= n_bytes


def _stretch(entry: TensorEntry) -> tuple[int, int]:
    """First byte and end of a tensor in its storage; (0, 0) unless its elements lie there without gaps, in whatever order."""
    element, n_elements = element_type(entry.dtype), 1
    for step, size in sorted(zip(entry.stride, entry.shape, strict=True)):
        if size != 1 and step != n_elements:
            return 0, 0
        n_elements *= size
    if element is None or entry.kind == "quantized":
        return 0, 0
    return entry.offset * element.n_bytes, (entry.offset + n_elements) * element.n_bytes


def _has_text_for_people(key: Any) -> bool:
    """Whether a canonical name has a key that only its text stands for, which is not unique."""
    return any(kind == 2 for kind, _, _ in key)
