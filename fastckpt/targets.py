"""The objects that a Checkpointer saves and restores: what they look like as plain state, and how they take it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastckpt.errors import PartialRestoreError, RestoreError
from fastckpt.rng import RNGState


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
    if problems:
        raise TypeError("this state cannot be restored in place: " + "; ".join(problems))
    return dict(state)


def _stateful(target: Any) -> bool:
    return callable(getattr(target, "state_dict", None)) and callable(getattr(target, "load_state_dict", None))


def state_of(targets: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved: for each name the state dict, or the tensor, dict or list itself."""
    return {name: target.state_dict() if _stateful(target) else target for name, target in targets.items()}


def apply(targets: Mapping[str, Any], loaded: Any, source: str) -> None:
    """Put a loaded state into the objects.

    RestoreError, before anything is touched, if the names differ; PartialRestoreError if an object refuses its state.
    """
    if not isinstance(loaded, dict):
        raise RestoreError(
            f"{source} holds a {type(loaded).__name__}, not the state of a Checkpointer: fetch it with fastckpt.open"
        )
    missing, unknown = sorted(targets.keys() - loaded.keys()), sorted(map(str, loaded.keys() - targets.keys()))
    if missing or unknown:
        raise RestoreError(
            f"{source} does not fit the Checkpointer's state: "
            + "; ".join(
                [f"{name!r} is not in the checkpoint" for name in missing]
                + [f"{name!r} of the checkpoint has no place here" for name in unknown]
            )
            + f". Give the Checkpointer a state of {', '.join(map(repr, loaded))}, or take single tensors out: `fastckpt restore` makes a "
            "file of a checkpoint, fastckpt.open reads it"
        )
    # Generators last: whatever the others draw while they load must not count.
    order = sorted(targets, key=lambda name: isinstance(targets[name], RNGState))
    for position, name in enumerate(order):
        try:
            _put(targets[name], loaded[name])
        except Exception as error:
            done = ", ".join(order[:position]) or "nothing"
            raise PartialRestoreError(
                f"{source}: {name!r} did not take its state ({type(error).__name__}: {error}). Restored so far: {done}; the state is a "
                "mixture and must not be trained. Make the objects fit the checkpoint, or restore another step"
            ) from error


def _put(target: Any, value: Any) -> None:
    if _stateful(target):
        target.load_state_dict(value)
    elif isinstance(target, torch.Tensor):
        if not isinstance(value, torch.Tensor) or value.shape != target.shape or value.dtype != target.dtype:
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"expected {target.dtype} {list(target.shape)}, found {found}")
        with torch.no_grad():
            target.copy_(value)
    elif isinstance(target, dict) and isinstance(value, dict):
        target.clear()
        target.update(value)
    elif isinstance(target, list) and isinstance(value, list):
        target[:] = value
    else:
        raise TypeError(f"expected a {type(target).__name__}, found a {type(value).__name__}")
