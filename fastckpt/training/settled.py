"""Tells whether the objects still have the state of the last call of `step`: only then may they be saved as that step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastckpt.host.torch_names import version_of
from fastckpt.snapshot import FenceHooks
from fastckpt.training.rng import Generators, RNGState

_MAX_LEAVES = 1000
"""Most values of plain dicts and lists: comparing them takes some 200 µs in each step. Larger ones are not compared, and count as unknown.
"""


class Settled:
    """Sees changes at a cost of some microseconds a step. Used by the thread that trains.

    A forward pass changes running statistics of normalisation (buffers) and draws random numbers, the loop's own counters may have moved,
    and an optimizer may be halfway through the parameters. Random numbers are remembered and put back. Limitation: a change inside an
    object of the user's own, made between `step` and the optimizer's step, is not seen.
    """

    def __init__(self, targets: Mapping[str, Any], hooks: FenceHooks) -> None:
        self._hooks = hooks
        self._plain = [(name, one) for name, one in targets.items() if isinstance(one, (dict, list, torch.Tensor))]
        self._modules = [(name, one) for name, one in targets.items() if isinstance(one, torch.nn.Module)]
        self._draws = any(isinstance(one, RNGState) for one in targets.values())
        self._buffers: list[tuple[str, torch.Tensor]] | None = None
        self._known = False
        self._versions: list[int] = []
        self._values: list[Any] = []
        self._drawn: Generators | None = None

    def mark(self) -> None:
        """Remember the objects as a finished step left them."""
        if self._buffers is None:
            named = [(name, tensor) for name, module in self._modules for tensor in module.buffers()]
            self._buffers = [(name, tensor) for name, tensor in named if not tensor.is_inference()]
        self._known = False  # an interrupt below leaves half of a mark
        self._versions = [version_of(tensor) for _, tensor in self._buffers]
        self._values = [_leaves(one) for _, one in self._plain]
        if self._draws:
            self._drawn = Generators.now()
        self._hooks.begun = False
        self._known = True

    def forget(self) -> None:
        """The objects are about to change by something other than a step."""
        self._known = False

    @property
    def moved(self) -> str | None:
        """What has changed since the mark, in words; None if no change was seen. See `sees_steps` for optimizers that call no hooks."""
        if not self._known:
            return "the objects have been changed since"
        if self._hooks.begun:
            return "an optimizer has begun the next one"
        for (name, tensor), version in zip(self._buffers or (), self._versions, strict=True):
            if version_of(tensor) != version:
                return f"buffers of {name!r} have been changed since"
        for (name, one), value in zip(self._plain, self._values, strict=True):
            if _leaves(one) != value:
                return f"{name!r} has been changed since"
        return None

    @property
    def sees_steps(self) -> bool:
        """Whether an optimizer's step would be noticed."""
        return self._hooks.see_all

    def put_back(self) -> None:
        """Put back the random generators as they were at the mark."""
        if self._drawn is not None:
            self._drawn.put_back()


def _leaves(one: Any) -> list[Any] | None:
    """Values that can be compared: plain values, versions of tensors, and the identities of other objects. None: there are too many."""
    found: list[Any] = []
    waiting = [one]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            found.append((id(value), None if value.is_inference() else version_of(value)))
        elif isinstance(value, (int, float, str, bytes, type(None))):
            found.append(repr(value) if isinstance(value, float) else value)  # nan is not equal to itself
        elif isinstance(value, (Mapping, list, tuple)):
            found.append(len(value))
            if len(found) + len(waiting) + len(value) > _MAX_LEAVES:
                return None
            waiting += [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        else:
            found.append(id(value))
    return found
