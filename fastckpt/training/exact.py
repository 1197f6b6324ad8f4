"""Gives optimizers back exactly what was saved, not what `Optimizer.load_state_dict` makes of it.

torch casts an optimizer's state to the type of its parameters: float32 moments and byte codes of bfloat16 parameters come back as bfloat16
numbers, and text is lost. The saved values are put back after that cast, but before a subclass or a user's hook changes them on purpose.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from fastckpt.format.directory import TensorEntry
from fastckpt.format.tensor_names import Name, dotted, key_of
from fastckpt.training.placement import PlacementPlan


def load_exactly(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], key: str, plan: PlacementPlan
) -> list[str] | None:
    """optimizer.load_state_dict(state), exactly.

    Args:
        optimizer: is changed.
        state: what was saved of it.
        key: its name in the checkpoint.
        plan: of this restore.

    Returns:
        A description of each parameter whose element type is not the saved one: its floating-point state was cast to the new type, as torch
        does it. None if torch's own function was not called, so that nothing is known.

    Raises:
        What `load_state_dict` raises.
    """
    restoring = _Restoring(key, plan)
    hooks = _register(optimizer, restoring)
    try:
        optimizer.load_state_dict(state)
    finally:
        for hook in hooks:
            hook.remove()
    return restoring.followed if restoring.done else None


def takes_the_given(optimizer: Any) -> bool:
    """Whether an optimizer's state will be the tensors that it is given: torch's own `load_state_dict`, and nothing before or after it."""
    return (
        isinstance(optimizer, torch.optim.Optimizer)
        and type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict
        and "load_state_dict" not in vars(optimizer)
        and type(optimizer).__setstate__.__module__.startswith("torch.")
        and not any(getattr(optimizer, f"_optimizer_load_state_dict_{when}_hooks", True) for when in ("pre", "post"))
    )


class SavedPlaces:
    """Where an optimizer's state was when it was saved. key: its name in the checkpoint."""

    def __init__(self, key: str, plan: PlacementPlan) -> None:
        self._locations = plan.locations
        self._on_device = {
            name[2]
            for name, location in plan.locations.items()
            if name[:2] == (key, "state") and len(name) > 2 and location != "cpu"
        }

    def was_on_device(self, number: int, parameter: TensorEntry | None) -> bool:
        """Whether a parameter, whose entry this is, or any state of it was on a device."""
        return number in self._on_device or (
            parameter is not None and self._locations[parameter.name] not in ("cpu", "meta")
        )


def _register(optimizer: Any, restoring: _Restoring) -> list[RemovableHandle]:
    """Register hooks at the optimizer, or at the one that it wraps: accelerate's wrapper has torch's class, but calls no hooks itself."""
    seen = set()
    while isinstance(optimizer, torch.optim.Optimizer) and id(optimizer) not in seen:
        seen.add(id(optimizer))
        try:
            # Registered as the last pre-hook, so that it sees what the other pre-hooks made of the state; and as the first post-hook,
            # because the other post-hooks change the state on purpose.
            before = optimizer.register_load_state_dict_pre_hook(restoring.take)
            return [before, optimizer.register_load_state_dict_post_hook(restoring.put_back, prepend=True)]
        except AttributeError:  # torch's __init__ was never called
            optimizer = vars(optimizer).get("optimizer")
    return []


@dataclass
class _Restoring:
    key: str
    plan: PlacementPlan
    given: Mapping[str, Any] = field(default_factory=dict)
    followed: list[str] = field(default_factory=list)
    done: bool = False

    def take(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        self.given = state

    def put_back(self, optimizer: torch.optim.Optimizer) -> None:
        saved = self.plan.saved_parameters()
        places = SavedPlaces(self.key, self.plan)
        numbers = itertools.chain.from_iterable(group["params"] for group in self.given["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            if number not in self.given["state"] or parameter not in optimizer.state:
                continue
            entry = saved.get(id(parameter))
            changed = entry is not None and entry.dtype != _type(parameter)
            if entry is not None and changed:
                self.followed.append(
                    f"{dotted(entry.name)} was saved as {entry.dtype} and is {_type(parameter)} here: its floating-point state follows it"
                )
            one = _Parameter(parameter, changed, places.was_on_device(number, entry), self.plan.locations)
            name = (self.key, "state", key_of(number))
            optimizer.state[parameter] = one.exact(self.given["state"][number], optimizer.state[parameter], name)
        self.done = True


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass
class _Parameter:
    tensor: torch.Tensor
    changed: bool
    """Whether the parameter's element type is not the saved one."""
    was_on_device: bool
    locations: Mapping[Name, str]

    def exact(self, saved: Any, now: Any, name: Name) -> Any:
        """Choose the exact value. `now` is what torch made of `saved`; if it has another type or shape, somebody changed it on
        purpose, and it stays.
        """
        if isinstance(saved, torch.Tensor) and isinstance(now, torch.Tensor):
            return self._tensor(saved, now, name) if type(saved) is type(now) and saved.shape == now.shape else now
        if isinstance(saved, dict) and isinstance(now, dict):
            for key in saved.keys() & now.keys():
                now[key] = self.exact(saved[key], now[key], (*name, key_of(key)))
            return now
        if isinstance(saved, (list, tuple)) and type(saved) is type(now) and len(saved) == len(now):
            values = [self.exact(one, other, (*name, n)) for n, (one, other) in enumerate(zip(saved, now, strict=True))]
            if isinstance(now, list):
                now[:] = values
                return now
            return tuple(values) if type(now) is tuple else now
        if isinstance(saved, (str, bytes)) and type(saved) is type(now):
            return saved
        return now

    def _tensor(self, saved: torch.Tensor, now: torch.Tensor, name: Name) -> torch.Tensor:
        follows = self.changed and now.dtype == self.tensor.dtype and (saved.is_floating_point() or saved.is_complex())
        dtype = now.dtype if follows else saved.dtype
        device, location = now.device, self.locations.get(name)
        if location == "cpu" and self.was_on_device:
            device = torch.device("cpu")  # some optimizers keep it on the host on purpose
        elif location not in (None, "cpu", "meta"):
            device = self.tensor.device
        if (now.dtype, now.device) == (dtype, device):
            return now
        with torch.no_grad():
            return (now if follows else saved).detach().to(device=device, dtype=dtype)
