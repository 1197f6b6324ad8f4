"""The objects that a Checkpointer saves and restores: reads their state as plain values, and puts a loaded state back into them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from fastckpt.errors import PartialRestoreError
from fastckpt.events import logger
from fastckpt.format.tensor_names import dotted
from fastckpt.host.torch_names import local_of
from fastckpt.state.local_state import LocalState, localised
from fastckpt.state.wrappers import names_inside
from fastckpt.training.changes import changes
from fastckpt.training.collective import refusals
from fastckpt.training.elastic_sampler import ElasticSampler
from fastckpt.training.exact import load_exactly
from fastckpt.training.filling import Filling
from fastckpt.training.placement import PlacementPlan, copies_plainly, may_be_asked, saved_names
from fastckpt.training.rng import RNGState
from fastckpt.training.sharded import into_dtensors

_SHOWN = 3


def check_targets(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the mapping. TypeError lists every object that cannot be restored in place."""
    problems = []
    if not isinstance(state, Mapping) or not state:
        raise TypeError(
            f"state is {type(state).__name__}: expected a mapping of names to objects, such as {{'model': model}}"
        )
    for name, target in state.items():
        if not isinstance(name, str) or not name:
            problems.append(f"{name!r}: expected a name (a string)")
        elif not (_stateful(target) or isinstance(target, (torch.Tensor, dict, list))):
            problems.append(
                f"{name!r} is {type(target).__name__}: expected an object with state_dict and load_state_dict, a tensor, a dict or a list"
            )
        else:
            problems += refusals(name, target)
    if problems:
        raise TypeError("this state cannot be saved and restored in place: " + "; ".join(problems))
    return dict(state)


def _stateful(target: Any) -> bool:
    return callable(getattr(target, "state_dict", None)) and callable(getattr(target, "load_state_dict", None))


_WITHOUT_CONSEQUENCES = (
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.GradScaler,
    torch.Tensor,
    ElasticSampler,
    dict,
    list,
)


def may_be_looked_at(target: Any) -> bool:
    """Whether an object can be asked for its state without side effects: a data loader may start workers, or draw random numbers, when it
    is asked.
    """
    return isinstance(target, _WITHOUT_CONSEQUENCES)


def state_of(targets: Mapping[str, Any]) -> LocalState:
    """What is saved: for each name the state dict, or the tensor, dict or list itself, with this process's parts of DTensors.

    SaveError for what has no such part.
    """
    return localised({name: _state_of(name, target) for name, target in targets.items()})


def _state_of(name: str, target: Any) -> Any:
    if not _stateful(target):
        return target
    state = target.state_dict()
    names = names_inside(target) if isinstance(target, torch.nn.Module) else None
    return state if names is None else names.to_inside(state, repr(name))


def apply(targets: Mapping[str, Any], loaded: Any, where: str, plan: PlacementPlan, *, strict: bool = True) -> None:
    """Put a loaded and checked state into the objects. A warning names each value that an object did not take as it was saved.

    strict: see `fitting.refuse_misfits`. PartialRestoreError if an object refuses its state.
    """
    targets = {name: target for name, target in targets.items() if strict or name in loaded}
    # Generators last: numbers that other objects draw while they load must not count.
    order = sorted(targets, key=lambda name: isinstance(targets[name], RNGState))
    for position, name in enumerate(order):
        try:
            changed = _put(name, targets[name], loaded[name], plan, strict)
        except Exception as error:
            done = ", ".join(order[:position]) or "nothing"
            raise PartialRestoreError(
                f"{where}: {name!r} did not take its state ({type(error).__name__}: {error}). Restored so far: {done}; the state is a "
                "mixture and must not be trained. Make the objects fit the checkpoint, or restore another step"
            ) from error
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            logger.warning("%s: %r is not what was saved: %s%s", where, name, "; ".join(changed[:_SHOWN]), more)


def _put(name: str, target: Any, value: Any, plan: PlacementPlan, strict: bool) -> list[str]:
    """Words for what has become another."""
    value = into_dtensors(value, (name,), plan.sharded)
    if isinstance(target, RNGState):
        target.load_state_dict(value)
    elif isinstance(target, torch.nn.Module):
        return _put_into_module(name, target, value, plan, strict)
    elif isinstance(target, torch.optim.Optimizer):
        followed = load_exactly(target, value, name, plan)
        if followed is None:
            return list(changes(value, target.state_dict()))
        return followed
    elif _stateful(target):
        target.load_state_dict(value)
        if may_be_asked(name, target, plan.entries):
            return list(changes(value, target.state_dict()))
    elif isinstance(target, torch.Tensor):
        if not isinstance(value, torch.Tensor) or value.shape != target.shape or value.dtype != target.dtype:
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"expected {target.dtype} {list(target.shape)}, found {found}")
        with torch.no_grad():
            _fill(target, value)
    elif any(isinstance(target, kind) and isinstance(value, kind) for kind in (dict, list)):
        Filling(plan).fill_top(target, value)
    else:
        raise TypeError(f"expected a {type(target).__name__}, found a {type(value).__name__}")
    return []


def _fill(target: torch.Tensor, value: torch.Tensor) -> None:
    """As `copy_`; of a DTensor, this process's part. Of an expanded tensor's elements, which torch does not write, one stands for all:
    TypeError if they are not alike.
    """
    part, content = local_of(target), local_of(value)
    if part is not None and content is not None:
        target, value = part, content
    if target.layout is not torch.strided or 0 not in target.stride():
        target.copy_(value)
        return
    once = tuple(slice(1 if stride == 0 else None) for stride in target.stride())
    target[once].copy_(value[once])
    if list(changes(value, target)):
        raise TypeError("it is expanded here, and was not when it was saved")


def _with_expanded(module: torch.nn.Module, value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state for a module whose expanded tensors (a buffer of one row for all) have got their values: torch writes no such tensor."""
    live = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}
    expanded = [
        name
        for name, tensor in live.items()
        if tensor.layout is torch.strided and 0 in tensor.stride() and tensor.numel() and name in value
    ]
    if not expanded:
        return value
    value = copy.copy(value)  # with torch's `_metadata`
    for name in expanded:
        if value[name].shape == live[name].shape:
            with torch.no_grad():
                _fill(live[name], value[name])
            value[name] = live[name]  # type: ignore[index]
    return value


def _put_into_module(name: str, module: torch.nn.Module, value: Any, plan: PlacementPlan, strict: bool) -> list[str]:
    names = names_inside(module)
    value = value if names is None else names.to_own(value, module.state_dict())
    value = _with_expanded(module, value) if copies_plainly(module) else value
    # Without the word where it is not needed: a module may have a `load_state_dict` of its own that does not know it.
    module.load_state_dict(value, **({} if strict else {"strict": False}))
    name_of = saved_names(name, module, plan.entries)
    now = {(name, name_of(key)): t for key, t in (*module.named_parameters(), *module.named_buffers())}
    saved = {key: (plan.entries[key], tensor) for key, tensor in now.items() if key in plan.entries}
    empty = [dotted(key) for key, (_, tensor) in saved.items() if tensor.is_meta and plan.locations[key] != "meta"]
    if empty:
        raise TypeError(f"{', '.join(empty[:_SHOWN])}: still without memory (device 'meta')")
    types = {key: (entry.dtype, str(tensor.dtype).removeprefix("torch.")) for key, (entry, tensor) in saved.items()}
    return [f"{dotted(key)}: {one} became {other}" for key, (one, other) in types.items() if one != other]
