"""A checkpoint for another layout: other ranks, other parallelism. Each rank puts its own part together, and asks nobody.

    skeleton of one saved rank ──→ objects with meta tensors where a tensor was, or is to be, spread over ranks
    directories of all ranks ────→ wholes ──→ for each such tensor the blocks that this rank needs ──→ assemble ──→ in their places

What each saved rank had for itself (generators, positions in data) has no place on other ranks: see `differing.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastckpt.errors import RestoreError
from fastckpt.format.directory import Directory, GlobalPlace, StorageEntry, TensorEntry
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.format.wholes import Box, Whole, Wholes, touches
from fastckpt.host.torch_names import dtensor_class, local_of
from fastckpt.options import Options
from fastckpt.reading.alike import unlike
from fastckpt.reading.assembly import Target, contiguous, is_whole, moves_of
from fastckpt.reading.ranks import assemble_from
from fastckpt.repository.saved_ranks import SavedRanks
from fastckpt.state.naming import named_tensors
from fastckpt.state.sharding import boxes_of
from fastckpt.state.shards import is_box, placed
from fastckpt.training.fitting import refuse_misfits
from fastckpt.training.partly import load_partly, replaced
from fastckpt.training.placement import PlacementPlan, live_and_sharded, parameter_groups, plan_placement
from fastckpt.training.restore_asked import RestoreAsked
from fastckpt.training.sharded import was_spread

_PLAIN = ("tensor", "parameter")
_Entries = Mapping[Name, TensorEntry]


class _Part(NamedTuple):
    """A tensor that this rank puts together, or has to find fault with."""

    whole: TensorEntry
    """The tensor as a whole, in the storage that the base rank has a part of it in."""
    rows: tuple[TensorEntry, ...]
    """What a directory of this rank would list of it."""
    boxes: tuple[tuple[Box, tuple[int, ...]], ...]
    """The blocks of it that this rank needs, and where they begin in its own tensor; none if it does not fit."""
    identity: Any
    """Equal for two names of one tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this rank's own tensor."""
        return self.rows[0].shape


class _Optimizer(NamedTuple):
    """A live one."""

    parameters: Sequence[torch.Tensor]
    state: Mapping[Any, Any]
    spread: Collection[int]
    """id() of those that were DTensors in the checkpoint, too: what was plain beside them stays so."""


class Resharding:
    """One restore of one rank. Used by the thread that trains."""

    def __init__(
        self,
        targets: Mapping[str, Any],
        ranks: SavedRanks,
        base: int,
        options: Options,
        where: str,
        asked: RestoreAsked,
    ) -> None:
        """base: the saved rank whose objects, and all in them that is no tensor, this rank gets."""
        self._targets, self._ranks, self._base = targets, ranks, base
        self._options, self._where, self._asked = options, where, asked
        self._threads = options.load_threads
        self.assembled: Mapping[Name, Whole] = {}
        """What `load` has put together from blocks, whatever `given` has."""

    def load(
        self, given: Mapping[str, Any], left: Collection[str] = (), saved_parts: Collection[int] = ()
    ) -> tuple[Any, PlacementPlan]:
        """Read this rank's part. Returns the state, and the plan by which it is put into the objects.

        Args:
            given: for some of the objects, by name, the state that is taken instead of the saved one.
            saved_parts: id() of tensors in `given` that are a saved rank's parts of DTensors: for these, this rank's are put together.
            left: names of objects in the checkpoint that stay as they are.

        Raises:
            RestoreError: the checkpoint does not fit the objects, or no rank has saved what this one needs. CorruptCheckpointError and
                others as `load_object`.
        """
        base = self._ranks.whole(self._base)
        targets = {key: target for key, target in self._targets.items() if key not in given}
        # What has no place here is refused, or passed over: it is not read.
        wholes_here = _as_wholes(base.directory, self._targets)
        together = self._together(given, saved_parts, wholes_here)
        entries = {n: e for n, e in wholes_here.items() if (n[0] in targets and n[0] not in left) or n in together}
        _, patterns = live_and_sharded(self._targets, wholes_here)
        boxes: dict[Name, tuple[Box, ...]] = {}
        for name, pattern in patterns.items():
            boxes[name] = tuple((box.offset, box.shape) for box in boxes_of(pattern))

        def wanted(name: Name, box: Box) -> bool:
            return name not in boxes or touches(box, boxes[name])

        wholes = Wholes(wanted)
        self._ranks.list_in(wholes, self._base)
        if wholes.problems:
            raise RestoreError(
                f"{self._where}: the votes of its ranks contradict each other: {'; '.join(wholes.problems[:20])}"
            )
        parts = dict(_parts(entries, wholes.found, patterns, targets, base.directory))
        self.assembled = {name: wholes.found[name] for name in parts}
        known = {entry.name for entry in base.directory.tensors}
        of_others = {name: wholes.found[name] for name in parts if wholes.found[name].was_spread or name not in known}
        self._refuse_several(of_others)
        without = {n for n in wholes_here if n[0] in given and (n in patterns or wholes_here[n].place is not None)}
        plan = plan_placement(self._targets, _listed(base.directory, parts, without), self._where)
        state = self._state(parts, plan)
        if isinstance(state, dict):
            state = {key: given.get(key, value) for key, value in state.items() if key not in left}
        self._refuse_other_parts(given, together, plan)
        shapes = {name: torch.empty(part.shape, dtype=_dtype(part), device="meta") for name, part in parts.items()}
        refuse_misfits(self._targets, replaced(state, shapes), self._where, plan, strict=self._asked.strict)
        return replaced(state, self._assembled(parts, wholes.found, plan)), plan

    def _together(self, given: Mapping[str, Any], saved_parts: Collection[int], wholes: _Entries) -> set[Name]:
        """Names of given tensors that a saved rank had a part of. RestoreError for those that the base rank had none of."""
        found = {name for name, tensor in _tensors_in(given) if id(tensor) in saved_parts}
        lost = sorted(dotted(name) for name in found if name not in wholes or wholes[name].place is None)
        if lost:
            raise RestoreError(
                f"{self._where}: `reassign` has given a rank's parts of {', '.join(lost[:20])}, which cannot be put together: rank "
                f"{self._base} had none. Nothing was changed. Restore on {self._ranks.commit.world} ranks in the same layout"
            )
        return found

    def _refuse_other_parts(self, given: Mapping[str, Any], together: Collection[Name], plan: PlacementPlan) -> None:
        """RestoreError for plain tensors that `reassign` has made for DTensors and that are no parts of them."""
        wrong = [
            f"{dotted(name)} is {list(tensor.shape)}, and this rank's part is {list(part.shape)}"
            for name, tensor in _tensors_in(given)
            if name not in together
            and local_of(tensor) is None
            and (part := local_of(plan.sharded.get(name))) is not None
            and part.shape != tensor.shape
        ]
        if wrong:
            raise RestoreError(
                f"{self._where}: `reassign` has given tensors that do not fit DTensors: {'; '.join(wrong[:20])}. Nothing was changed. "
                "Return a state as it was saved, of which parts are put together, or parts of that shape"
            )

    def _refuse_several(self, of_others: Mapping[Name, Whole]) -> None:
        """RestoreError for DTensors of which ranks have parts of different ones: pipeline stages number theirs alike. Also for what the
        base rank does not have, where others have each its own: buffers.
        """
        different = unlike(self._ranks, of_others, self._options, self._threads)
        found = sorted(map(dotted, different | {name for name, whole in of_others.items() if whole.is_contradicted}))
        if found:
            raise RestoreError(
                f"{self._where}: of {', '.join(found[:20])} ranks had parts of different tensors, or different ones. Nothing was changed. "
                f"Restore on {self._ranks.commit.world} ranks in the same layout"
            )

    def _state(self, parts: Mapping[Name, _Part], plan: PlacementPlan) -> Any:
        """The base rank's objects, with meta tensors for the parts."""
        base = self._ranks.whole(self._base)
        moved = {part.whole.storage for part in parts.values()}
        kept = [number for number in range(len(base.directory.storages)) if number not in moved]
        state = load_partly(
            base,
            kept,
            self._options,
            self._threads,
            places=plan.places,
            map_location=plan.map_location,
            weights_only=self._asked.weights_only,
        )
        known = {entry.name for entry in base.directory.tensors}
        for name, part in parts.items():  # layers that other ranks had
            if (
                name not in known
                and len(name) == 2
                and isinstance(state, dict)
                and isinstance(state.get(name[0]), dict)
            ):
                state[name[0]][name[1]] = torch.empty(part.shape, dtype=_dtype(part), device="meta")
        return state

    def _assembled(
        self, parts: Mapping[Name, _Part], wholes: Mapping[Name, Whole], plan: PlacementPlan
    ) -> dict[Name, torch.Tensor]:
        targets, lacking = [], []
        firsts: dict[Any, Name] = {}
        """Of tensors that were one when they were saved, and are one here."""
        for name, part in parts.items():
            first = firsts.setdefault((part.identity, part.whole.dtype, part.shape, part.boxes), name)
            if first is not name:
                continue
            moves = tuple(moves_of(wholes[name].blocks, part.boxes))
            targets.append(Target(part.whole.dtype, part.shape, moves, name))
            if not is_whole(targets[-1]):
                lacking.append(name)
        if lacking:
            raise RestoreError(
                f"{self._where}: no rank has saved all that this one needs of {', '.join(map(dotted, lacking[:20]))}"
                f"{f' and {len(lacking) - 20} more' if len(lacking) > 20 else ''}. Nothing was changed"
            )
        made: dict[Name, torch.Tensor] = {}
        for target, tensor in zip(
            targets, assemble_from(self._ranks, targets, self._options, self._threads), strict=True
        ):
            place = plan.places[plan.entries[target.name].storage]
            made[target.name] = tensor if place == "cpu" else tensor.to(place)
        return {
            name: made[firsts[(part.identity, part.whole.dtype, part.shape, part.boxes)]]
            for name, part in parts.items()
        }


def is_to_be_spread(targets: Mapping[str, Any], plan: PlacementPlan) -> bool:
    """Whether a saved rank has a plain tensor for what is to be a DTensor here, as its parameter is: state of an optimizer."""
    optimizers = _optimizers(targets, plan.live, plan.entries)
    return bool(optimizers) and any(e.place is None and _follows(e, optimizers) for e in plan.entries.values())


def _as_wholes(listed: Directory, targets: Mapping[str, Any]) -> dict[Name, TensorEntry]:
    """What a saved rank lists, each tensor as the whole that it was a part of. With a place: it was spread, or is to be."""
    found: dict[Name, TensorEntry] = {}
    places = {entry.name[:-2]: entry.place for entry in listed.tensors if is_box(entry)}
    known = {entry.name: entry for entry in listed.tensors}
    optimizers = _optimizers(targets, live_and_sharded(targets, known)[0], known)
    for entry in listed.tensors:
        if is_box(entry):
            continue
        place = places.get(entry.name, entry.place)
        if place is not None:
            found[entry.name] = _whole(entry, place.shape)
        else:
            found[entry.name] = _whole(entry, entry.shape) if _follows(entry, optimizers) else entry
    return found


def _optimizers(
    targets: Mapping[str, Any], live: Mapping[Name, torch.Tensor], entries: _Entries
) -> dict[str, _Optimizer]:
    """None where there are no DTensors."""
    if dtensor_class() is None:
        return {}
    spread = {id(tensor) for name, tensor in live.items() if name in entries and was_spread(name, entries)}
    return {
        key: _Optimizer(
            [p for group in parameter_groups(target) for p in group["params"]], getattr(target, "state", {}), spread
        )
        for key, target in targets.items()
        if isinstance(target, torch.optim.Optimizer)
    }


def _whole(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    place = GlobalPlace(shape, (0,) * len(shape))
    return entry._replace(shape=shape, stride=contiguous(shape), offset=0, place=place)


def _follows(entry: TensorEntry, optimizers: Mapping[str, _Optimizer]) -> bool:
    """Whether this is state of an optimizer that is to be spread as its parameter is."""
    optimizer = optimizers.get(str(entry.name[0]))
    if optimizer is None or entry.name[1:2] != ("state",) or len(entry.name) < 4:
        return False
    number, word = entry.name[2:4]
    if not isinstance(number, int) or not 0 <= number < len(optimizer.parameters):
        return False
    parameter = optimizer.parameters[number]
    if local_of(parameter) is None or tuple(parameter.shape) != entry.shape or id(parameter) in optimizer.spread:
        return False
    live = optimizer.state.get(parameter, {}).get(word) if len(entry.name) == 4 else None
    if isinstance(live, torch.Tensor):
        return local_of(live) is not None
    return entry.shape != () or word != "step"  # of a parameter of one number, its step has the same shape


def _parts(
    entries: _Entries,
    wholes: Mapping[Name, Whole],
    patterns: Mapping[Name, Any],
    targets: Mapping[str, Any],
    listed: Directory,
) -> Iterator[tuple[Name, _Part]]:
    """What this rank puts together: what was spread, or is to be, and what shares memory with that; and of modules what other ranks had."""
    saved = {entry.name for entry in listed.tensors}
    moved = {entry.storage for name, entry in entries.items() if name in patterns or wholes[name].was_spread}
    for name, entry in entries.items():
        if entry.storage in moved:
            # Not by what the base rank has: its parts without elements may all lie at one place of one storage.
            yield name, _part(entry, patterns.get(name), tuple(wholes[name].blocks) or name)
    for name, whole in wholes.items():
        is_of_module = len(name) == 2 and isinstance(targets.get(str(name[0])), torch.nn.Module)
        if is_of_module and name not in saved and whole.kind in _PLAIN:
            stride, nowhere = contiguous(whole.shape), len(listed.storages)
            entry = TensorEntry(name, whole.dtype, whole.shape, stride, 0, nowhere, whole.kind, whole.requires_grad)
            yield name, _part(entry, patterns.get(name), name)


def _part(entry: TensorEntry, pattern: Any, identity: Any) -> _Part:
    local = None if pattern is None else local_of(pattern)
    if local is None:
        nothing = (0,) * len(entry.shape)
        return _Part(entry, (entry._replace(place=None),), (((nothing, entry.shape), nothing),), identity)
    boxes = boxes_of(pattern)
    if tuple(pattern.shape) != entry.shape or not boxes or entry.kind not in _PLAIN:
        return _Part(entry, (entry,), (), identity)
    shape = tuple(local.shape)
    _, rows = placed(entry._replace(shape=shape, stride=contiguous(shape), offset=0, place=None), pattern)
    needed = tuple(((box.offset, box.shape), box.local_offset) for box in boxes if 0 not in box.shape)
    return _Part(entry, tuple(rows), needed, identity)


def _tensors_in(given: Mapping[str, Any]) -> Iterator[tuple[Name, torch.Tensor]]:
    for key, state in given.items():
        for named in named_tensors(state, (key,)):
            if isinstance(named.value, torch.Tensor):
                yield named.name, named.value


def _listed(base: Directory, parts: Mapping[Name, _Part], without: Collection[Name]) -> Directory:
    """What a directory of this rank would list. without: names that have no row, unless they are of a part."""
    storages = list(base.storages)
    others = {*parts, *without}
    tensors = [entry for entry in base.tensors if (entry.name[:-2] if is_box(entry) else entry.name) not in others]
    for part in parts.values():
        old = part.whole.storage
        location = base.storages[old].location if old < len(base.storages) else "cpu"
        tensors += [row._replace(storage=len(storages)) for row in part.rows]
        storages.append(StorageEntry(part.whole.dtype, 0, location, ()))
    return replace(base, storages=tuple(storages), tensors=tuple(tensors))


def _dtype(part: _Part) -> torch.dtype:
    found: torch.dtype = getattr(torch, part.whole.dtype)
    return found
