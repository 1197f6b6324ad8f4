"""Whether a loaded state fits the objects that are to take it: names, shapes, types, and how tensors are spread. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastckpt.errors import RestoreError
from fastckpt.events import logger
from fastckpt.format.tensor_names import Name, dotted
from fastckpt.host.torch_names import local_of
from fastckpt.state.wrappers import names_inside
from fastckpt.training.elastic_sampler import ElasticSampler
from fastckpt.training.placement import PlacementPlan, copies_plainly
from fastckpt.training.sharded import misfits, without_pattern

_SHOWN = 3
_LAZY = (torch.nn.parameter.UninitializedParameter, torch.nn.parameter.UninitializedBuffer)  # these have no shape yet


@dataclass
class _Misfits:
    """In words, one for each name."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)


def spread_otherwise(targets: Mapping[str, Any], plan: PlacementPlan) -> bool:
    """Whether a tensor was spread over ranks in another way than it is here."""
    return bool(misfits(plan.sharded, plan.live, plan.entries, _optimizers(targets)))


def _optimizers(targets: Mapping[str, Any]) -> list[str]:
    return [name for name, target in targets.items() if isinstance(target, torch.optim.Optimizer)]


def refuse_misfits(
    targets: Mapping[str, Any], loaded: Any, where: str, plan: PlacementPlan, *, strict: bool = True
) -> None:
    """RestoreError if a loaded state does not fit the objects: lists all names that are missing, unexpected, or of another shape.

    strict: False lets objects, and tensors of modules, that are missing in the checkpoint stay as they are, and passes over those that
    have no place here, with a warning that lists them, as modules of torch do. What has another shape is refused all the same.
    """
    if not isinstance(loaded, dict):
        raise RestoreError(
            f"{where} holds a {type(loaded).__name__}, not the state of a Checkpointer: fetch it with fastckpt.open"
        )
    found = _Misfits()
    found.missing += [f"{name!r} is not in the checkpoint" for name in sorted(targets.keys() - loaded.keys())]
    for name in sorted(map(str, loaded.keys() - targets.keys())):
        found.unexpected.append(f"{name!r} of the checkpoint has no place here")
    found.unequal += misfits(plan.sharded, plan.live, plan.entries, _optimizers(targets))
    for name in targets:
        if name in loaded:
            _look_for_misfits(name, targets[name], loaded[name], found)
    others = found.missing + found.unexpected
    wrong = others + found.unequal if strict else found.unequal
    if wrong:
        raise RestoreError(
            f"{where} does not fit the Checkpointer's state:\n  "
            + "\n  ".join(wrong)
            + f"\nNothing was changed. {_advice(loaded, found)}"
        )
    if others:
        logger.warning("%s, as far as it fits (strict=False):\n  %s", where, "\n  ".join(others))
    plain = without_pattern(plan.sharded, plan.entries)
    if plain:
        logger.warning(
            "%s: of %s, DTensors when they were saved, plain tensors are restored: this process's parts. No DTensor is there now that says "
            "how they are spread",
            where,
            ", ".join(map(dotted, plain[:_SHOWN]))
            + (f" and {len(plain) - _SHOWN} more" if len(plain) > _SHOWN else ""),
        )


def refuse_untied(targets: Mapping[str, Any], loaded: Mapping[str, Any], where: str) -> None:
    """RestoreError for tensors that are one in a module here, and for which the loaded state has several values: one would be lost."""
    found = [
        words
        for name, target in targets.items()
        if isinstance(target, torch.nn.Module) and isinstance(loaded.get(name), dict) and copies_plainly(target)
        for words in _untied(name, target, loaded[name])
    ]
    if found:
        raise RestoreError(
            f"{where} does not fit the Checkpointer's state:\n  "
            + "\n  ".join(found)
            + "\nNothing was changed. Tie in the module what was "
            "tied when it was saved, and nothing else"
        )


def named_places(targets: Mapping[str, Any], plan: PlacementPlan) -> set[Name]:
    """What a restore of this checkpoint changes: objects, and tensors of modules."""
    inside = {name for name in plan.entries if name and isinstance(targets.get(str(name[0])), torch.nn.Module)}
    return {(key,) for key in targets} | inside


def refuse_leftovers(mixed: Collection[Name], loaded: Mapping[Any, Any], where: str, plan: PlacementPlan) -> None:
    """RestoreError if something that a failed restore has written would stay as it is: the checkpoint has nothing for it.

    mixed: what was written, as `named_places` says it.
    """
    found = [name for name in mixed if name[0] not in loaded or (len(name) > 1 and name not in plan.entries)]
    if found:
        raise RestoreError(
            f"{where} has nothing for {', '.join(sorted(map(dotted, found))[:20])}, which the last restore has changed before it failed. "
            "They would stay a mixture. Restore a checkpoint that has all of them, or make the objects anew"
        )


def _untied(name: str, target: torch.nn.Module, value: dict[str, Any]) -> Iterator[str]:
    live = target.state_dict(keep_vars=True)
    names = names_inside(target)
    value = value if names is None else names.to_own(value, live)
    firsts: dict[int, str] = {}
    for key, tensor in live.items():
        first = firsts.setdefault(id(tensor), key)
        one, other = value.get(first), value.get(key)
        if first == key or not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            continue
        if not _are_alike(one, other):
            yield f"{name}.{first} and {name}.{key} are one tensor here and have different values in the checkpoint"


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit. What cannot be compared so is not looked at: composite tensors, and those without memory."""
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout is torch.strided for t in (one, other))
    if one is other or not plain or one.is_meta or other.is_meta or one.is_nested or one.is_quantized:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return True  # told elsewhere
    bits = [t.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8) for t in (one, other)]
    return torch.equal(*bits)


def _advice(loaded: Mapping[Any, Any], found: _Misfits) -> str:
    if found.unequal:
        return "Make the objects as they were when it was saved, or restore another step"
    return (
        f"Give the Checkpointer a state of {', '.join(map(repr, loaded))}; or call restore(strict=False), which leaves what is not in the "
        "checkpoint as it is, and passes over what has no place; or fetch single tensors with fastckpt.open"
    )


def _look_for_misfits(name: str, target: Any, value: Any, found: _Misfits) -> None:
    """Note what the object would refuse. Only what is certain: a hook may change the state before the object sees it."""
    if isinstance(target, torch.Tensor):
        found.unequal += _misfit(name, target, value, exact=True)
    elif isinstance(target, torch.optim.Optimizer):
        found.unequal += _misfits_of_groups(name, target, value)
    elif isinstance(target, ElasticSampler):
        found.unequal += [f"{name}: {words}" for words in target.misfits(value)]
    elif isinstance(target, torch.nn.Module) and isinstance(value, dict) and copies_plainly(target):
        live = target.state_dict()
        names = names_inside(target)
        if names is not None:
            value = names.to_inside(names.to_own(value, live), repr(name))
            live = names.to_inside(live, repr(name))
        found.missing += [f"{name}.{key} is not in the checkpoint" for key in live if key not in value]
        found.unexpected += [f"{name}.{key} of the checkpoint has no place here" for key in value if key not in live]
        for key, now in live.items():
            if key in value:
                found.unequal += _misfit(f"{name}.{key}", now, value[key])


def _misfit(place: str, now: Any, saved: Any, *, exact: bool = False) -> list[str]:
    if not isinstance(saved, torch.Tensor) or not isinstance(now, torch.Tensor) or isinstance(now, _LAZY):
        return []
    is_part = local_of(now) is not None and local_of(saved) is None  # which one is the business of `misfits`
    if (
        not is_part and saved.shape != now.shape and (exact or saved.dim() + now.dim() > 1)
    ):  # torch takes one number for another
        return [f"{place} is {list(now.shape)} here and {list(saved.shape)} in the checkpoint"]
    if exact and saved.dtype != now.dtype:
        return [f"{place} is {now.dtype} here and {saved.dtype} in the checkpoint"]
    return []


def _misfits_of_groups(name: str, target: torch.optim.Optimizer, value: Any) -> list[str]:
    groups = value.get("param_groups") if isinstance(value, dict) else None
    hooked = getattr(target, "_optimizer_load_state_dict_pre_hooks", None)
    if (
        hooked
        or type(target).load_state_dict is not torch.optim.Optimizer.load_state_dict
        or not isinstance(groups, list)
    ):
        return []
    now = [len(group["params"]) for group in target.param_groups]
    saved = [
        len(group["params"]) for group in groups if isinstance(group, dict) and isinstance(group.get("params"), list)
    ]
    if now == saved:
        return []
    return [f"{name} has groups of {now} parameters here and of {saved} in the checkpoint"]
