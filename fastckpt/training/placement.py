"""Chooses where loaded data goes: inspects the live objects before anything is read, and gives each storage of the checkpoint a location.

Modules and optimizers copy their state to the device of their parameters, so it is loaded to the host for them. Tensors in dictionaries,
lists and other objects go to the device of the live tensor of the same name. Without such a tensor they go to the device that they were
saved from, and if this machine does not have that, to the CPU, with a warning.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.storage import UntypedStorage

from fastckpt.errors import RestoreError
from fastckpt.events import logger
from fastckpt.format.directory import Directory, TensorEntry
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.host.torch_names import dtensor_class, has_storage, identity, local_of
from fastckpt.state.naming import named_tensors
from fastckpt.state.shards import is_box
from fastckpt.state.wrappers import names_inside
from fastckpt.training.rng import RNGState
from fastckpt.training.sharded import dtensors_in, patterns_of_state

_FSDP = "torch.distributed.fsdp._fully_shard."


@dataclass(frozen=True)
class PlacementPlan:
    """Facts about the live objects and the checkpoint that a restore needs. Made before anything is changed."""

    places: Sequence[str]
    """For each storage its location, in torch's spelling."""
    elsewhere: Mapping[str, str]
    """Locations that this machine does not have → the location used instead."""
    entries: Mapping[Name, TensorEntry]
    locations: Mapping[Name, str]
    """For each name the location that it was saved from."""
    live: Mapping[Name, torch.Tensor]
    """Of modules, tensors, dictionaries and lists."""
    sharded: Mapping[Name, Any]
    """The DTensors among the tensors of all objects; for state that an optimizer does not have yet, how it is to be spread."""
    alone: frozenset[int]
    """id() of live tensors whose memory no other object of the state uses; of a DTensor, of its local tensor."""
    tied: frozenset[int]
    """id() of live tensors that share memory with others, and share it in the checkpoint in the same way."""
    states: Mapping[Name, torch.Tensor]
    """The state that optimizers have now; of DTensors, this process's part."""
    sole: frozenset[int]
    """id() of tensors, in `live` (of a DTensor, of its part) or `states`, each of which has one name, and fills its memory."""

    @property
    def map_location(self) -> dict[Any, str]:
        """torch's `map_location`, for tensors without a storage of their own (wrapper subclasses)."""
        return {**self.elsewhere, **{_device(place): to for place, to in self.elsewhere.items()}}

    def saved_parameters(self) -> dict[int, TensorEntry]:
        """id() of a live tensor of a module → its entry in the checkpoint."""
        return {id(tensor): self.entries[name] for name, tensor in self.live.items() if name in self.entries}


def copies_its_state(target: Any) -> bool:
    """Whether an object is a module that copies a given state into its own parameters, as torch's modules do."""
    return (
        isinstance(target, torch.nn.Module)
        and type(target).load_state_dict is torch.nn.Module.load_state_dict
        and "load_state_dict" not in vars(target)
    )


def copies_plainly(target: torch.nn.Module) -> bool:
    """Whether, in addition, the module keeps its names and shapes: no hook and no overridden method can change what it takes."""
    return _takes_what_it_is_given(target, lambda _: False)


def takes_in_place(target: Any) -> bool:
    """Whether a module copies each given value to where it is already, if it is there: hooks of FSDP only bring its parameters into the
    form in which they are saved.
    """
    return copies_its_state(target) and _takes_what_it_is_given(
        target, lambda hook: str(getattr(hook, "__module__", "")).startswith(_FSDP)
    )


def _takes_what_it_is_given(target: torch.nn.Module, harmless: Callable[[Any], bool]) -> bool:
    names = ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    return copies_its_state(target) and not any(
        any(
            not harmless(getattr(hook, "hook", hook))
            for name in names
            for hook in (getattr(module, name, None) or {}).values()
        )
        or not getattr(type(module), "_load_from_state_dict").__module__.startswith("torch.")  # noqa: B009 - private, named once
        for module in target.modules()
    )


def live_and_sharded(
    targets: Mapping[str, Any], entries: Mapping[Name, TensorEntry]
) -> tuple[dict[Name, torch.Tensor], dict[Name, Any]]:
    """Names as in a checkpoint → the tensors that the objects have now; and → DTensors, see `PlacementPlan.sharded`."""
    live = {name: tensor for key in targets for name, tensor in _live_tensors(key, targets[key], entries)}
    sharded = {name: tensor for key in targets for name, tensor in _sharded(key, targets[key], live, entries)}
    return live, sharded


def plan_placement(targets: Mapping[str, Any], directory: Directory, where: str) -> PlacementPlan:
    """The plan for a checkpoint. RestoreError if a live object is on the meta device: such an object can hold no values."""
    entries = {entry.name: entry for entry in directory.tensors}
    locations = {entry.name: directory.storages[entry.storage].location for entry in directory.tensors}
    live, sharded = live_and_sharded(targets, entries)
    states = {name: tensor for key in targets for name, tensor in _state_of_optimizer(key, targets[key])}
    alone, tied, sole = _sharing(targets, live, states, entries)
    problems = [problem for key in targets for problem in _on_meta(key, targets[key], live, locations)]
    if problems:
        raise RestoreError(
            f"{where} cannot be restored into tensors without memory (device 'meta'):\n  "
            + "\n  ".join(problems)
            + "\nNothing was changed. Call module.to_empty(device=…) before you make the optimizer and the Checkpointer"
        )
    places = [storage.location for storage in directory.storages]
    for number, wanted in _wanted(targets, directory, live).items():
        places[number] = wanted
    elsewhere = {place: "cpu" for place in {*places, *locations.values()} if not _is_here(place)}
    missing = sorted(elsewhere.keys() & set(places))
    if missing:
        names = sorted({dotted(e.name) for e in directory.tensors if places[e.storage] in elsewhere})
        logger.warning(
            "%s: tensors of %s, which this machine does not have, are restored to the CPU: %s",
            where,
            ", ".join(missing),
            _some(names),
        )
    return PlacementPlan(
        places=[elsewhere.get(place, place) for place in places],
        elsewhere=elsewhere,
        entries=entries,
        locations=locations,
        # Tensors that other objects made for their state_dict() may be temporary.
        live={name: tensor for name, tensor in live.items() if _is_plain(targets[str(name[0])])},
        sharded=sharded,
        alone=alone,
        tied=tied,
        states=states,
        sole=sole,
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def parameter_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """An optimizer's groups; an empty list if a wrapper refuses them until its framework has prepared it."""
    try:
        return optimizer.param_groups
    except Exception as error:
        logger.info("an optimizer cannot say yet what it trains: %s: %s", type(error).__name__, error)
        return []


def _live_tensors(key: str, target: Any, entries: Mapping[Name, TensorEntry]) -> Iterator[tuple[Name, torch.Tensor]]:
    """Names as in a checkpoint → the tensors that an object has now."""
    if isinstance(target, RNGState):
        return
    if isinstance(target, torch.nn.Module):
        name_of = saved_names(key, target, entries)
        for name, tensor in (
            *target.named_parameters(remove_duplicate=False),
            *target.named_buffers(remove_duplicate=False),
        ):
            if not torch.nn.parameter.is_lazy(tensor):
                yield (key, name_of(name)), tensor
        return
    if isinstance(target, torch.optim.Optimizer):
        groups = [{word: value for word, value in g.items() if word != "params"} for g in parameter_groups(target)]
        state: Any = {"param_groups": groups}
    elif _is_plain(target):
        state = target
    elif may_be_asked(key, target, entries):
        try:
            state = target.state_dict()
        except (
            Exception
        ) as error:  # some objects cannot give a state before they have got one; this one is about to get it
            logger.info("%r cannot say yet where its tensors are: %s: %s", key, type(error).__name__, error)
            return
    else:
        return
    yield from dtensors_in(state, (key,))


def saved_names(key: str, module: torch.nn.Module, entries: Mapping[Name, TensorEntry]) -> Callable[[str], str]:
    """A module's own names → those of a checkpoint: without wrappers, or as older checkpoints have them."""
    inside = names_inside(module)
    if inside is None:
        return str
    names = inside

    def name_of(own: str) -> str:
        without = names.name(own)
        return own if (key, own) in entries and (key, without) not in entries else without

    return name_of


def _sharded(
    key: str, target: Any, live: Mapping[Name, torch.Tensor], entries: Mapping[Name, TensorEntry]
) -> Iterator[tuple[Name, Any]]:
    if dtensor_class() is None:
        return
    yield from ((name, tensor) for name, tensor in live.items() if name[0] == key and local_of(tensor) is not None)
    if isinstance(target, torch.optim.Optimizer):
        parameters = [p for group in parameter_groups(target) for p in group["params"]]
        yield from patterns_of_state(key, parameters, getattr(target, "state", {}), entries)


def may_be_asked(key: str, target: Any, entries: Mapping[Name, TensorEntry]) -> bool:
    """Whether an object may be asked for its state outside of a save. True if the checkpoint has tensors of it (random
    generators apart) and it is not a source of data: such a source may start workers when it is asked.
    """
    return not hasattr(type(target), "__iter__") and any(
        name[0] == key and entry.dtype != "uint8" for name, entry in entries.items()
    )


def _is_plain(target: Any) -> bool:
    return isinstance(target, (torch.nn.Module, torch.Tensor, dict, list))


def _on_meta(key: str, target: Any, live: Mapping[Name, torch.Tensor], locations: Mapping[Name, str]) -> Iterator[str]:
    if copies_its_state(target) or isinstance(target, torch.Tensor):
        for name, tensor in live.items():
            if name[0] == key and tensor.is_meta and locations.get(name, "meta") != "meta":
                yield dotted(name)
    elif isinstance(target, torch.optim.Optimizer):
        parameters = [p for group in parameter_groups(target) for p in group["params"]]
        saved = any(name[:2] == (key, "state") and place != "meta" for name, place in locations.items())
        if saved and any(parameter.is_meta for parameter in parameters):
            yield f"the parameters of {key!r}"


def _wanted(targets: Mapping[str, Any], directory: Directory, live: Mapping[Name, torch.Tensor]) -> dict[int, str]:
    """Number of a storage → its location, where that differs from the one it was saved from. A storage goes to a device if any of its
    tensors needs it there.
    """
    wanted: dict[int, str] = {}
    for entry in directory.tensors:
        if directory.storages[entry.storage].extents is None or is_box(entry):
            continue
        place = _place(targets.get(str(entry.name[0])) if entry.name else None, entry.name, live)
        if place is None:
            place = directory.storages[entry.storage].location
        if wanted.get(entry.storage, "cpu") == "cpu":
            wanted[entry.storage] = place
    return wanted


def _place(target: Any, name: Name, live: Mapping[Name, torch.Tensor]) -> str | None:
    """The location for one name. None: the location that it was saved from."""
    if isinstance(target, (RNGState, torch.Tensor)):
        return "cpu"
    if copies_its_state(target):
        return "cpu" if name in live else None
    if (
        isinstance(target, torch.optim.Optimizer)
        and type(target).load_state_dict is torch.optim.Optimizer.load_state_dict
        and name[1:2] == ("state",)
        and isinstance(name[2], int)
    ):
        return "cpu"  # the optimizer copies it to the device of its parameter
    tensor = live.get(name)
    return None if tensor is None or tensor.is_meta else str(tensor.device)


def _is_here(location: str) -> bool:
    try:
        torch.serialization.default_restore_location(UntypedStorage(0), location)
    except Exception:  # each backend raises its own exception for a device that is not there
        return False
    return True


def _device(location: str) -> Any:
    try:
        return torch.device(location)
    except RuntimeError:  # not the name of a device
        return location


def _state_of_optimizer(key: str, target: Any) -> Iterator[tuple[Name, torch.Tensor]]:
    """Names as in a checkpoint → tensors of the state that an optimizer has for its parameters."""
    if not isinstance(target, torch.optim.Optimizer):
        return
    parameters = [p for group in parameter_groups(target) for p in group["params"]]
    state: Mapping[Any, Any] = getattr(target, "state", {})
    for number, parameter in enumerate(parameters):
        for name, tensor in dtensors_in(state.get(parameter, {}), (key, "state", number)):
            yield name, part_of(tensor)


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """Of a DTensor, this process's part; other tensors as they are."""
    local = local_of(tensor)
    return tensor if local is None else local


def _sharing(
    targets: Mapping[str, Any],
    live: Mapping[Name, torch.Tensor],
    states: Mapping[Name, torch.Tensor],
    entries: Mapping[Name, TensorEntry],
) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
    """Compute `alone`, `tied` and `sole` of a plan."""
    groups: dict[int, list[tuple[Name, torch.Tensor]]] = defaultdict(list)
    for name, whole in live.items():
        tensor = part_of(whole)
        if has_plain_memory(tensor):
            groups[identity(tensor.untyped_storage())].append((name, tensor))
    held = {
        identity(tensor.untyped_storage())
        for target in targets.values()
        if isinstance(target, torch.optim.Optimizer)
        for tensor in _tensors_of(target)
        if has_plain_memory(tensor)
    }
    alone, tied = set(), set()
    for storage, group in groups.items():
        if len(group) == 1:
            _, tensor = group[0]
            # A view of a larger storage: the rest of that memory belongs to somebody who did not give it to us.
            if storage not in held and tensor.nbytes == tensor.untyped_storage().nbytes():
                alone.add(id(tensor))
        elif _is_shared_alike(group, entries):
            tied |= {id(tensor) for _, tensor in group}
    for name, tensor in states.items():
        if has_plain_memory(tensor):
            groups[identity(tensor.untyped_storage())].append((name, tensor))
    only = [group[0][1] for group in groups.values() if len(group) == 1]
    sole = {id(tensor) for tensor in only if tensor.nbytes == tensor.untyped_storage().nbytes()}
    return frozenset(alone), frozenset(tied), frozenset(sole)


def _is_shared_alike(group: Sequence[tuple[Name, torch.Tensor]], entries: Mapping[Name, TensorEntry]) -> bool:
    """Whether the checkpoint, too, has all of these tensors in one storage, at the same places."""
    storages = set()
    for name, tensor in group:
        entry = entries.get(name)
        if entry is None or (entry.offset, entry.stride) != (tensor.storage_offset(), tuple(tensor.stride())):
            return False
        storages.add(entry.storage)
    return len(storages) == 1


def has_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary one, strided and with a storage of its own."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and has_storage(tensor)
    )


def _tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """An optimizer's parameters and the tensors of their state."""
    state = list(optimizer.state.values())
    parameters = [p for group in parameter_groups(optimizer) for p in group["params"]]
    for named in named_tensors([parameters, state]):
        if isinstance(named.value, torch.Tensor):
            yield named.value
