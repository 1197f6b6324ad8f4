"""Finds what an object changed in the state that it was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastckpt.format.tensor_names import Name, dotted, key_of
from fastckpt.host.torch_names import local_of


def changes(given: Any, now: Any, name: Name = ()) -> Iterator[str]:
    """Yield a description of each tensor and number that differs from the given one. Members that were removed or added are not compared.

    TypeError for a tensor without memory (meta device): it cannot have taken any values.
    """
    if given is now:
        return
    if isinstance(given, torch.Tensor) and isinstance(now, torch.Tensor):
        # Comparing two DTensors is a collective.
        yield from _tensor_changes(_own(given), _own(now), dotted(name))
    elif isinstance(given, dict) and isinstance(now, dict):
        for key in given:
            if key in now:
                yield from changes(given[key], now[key], (*name, key_of(key)))
    elif isinstance(given, (list, tuple)) and isinstance(now, (list, tuple)):
        for number, (one, other) in enumerate(zip(given, now, strict=False)):
            yield from changes(one, other, (*name, number))
    elif _is_value(given) and _is_value(now) and given != now and not (given != given and now != now):  # noqa: PLR0124 - NaN
        yield f"{dotted(name)}: {given!r:.40} became {now!r:.40}"


def _is_value(one: Any) -> bool:
    return isinstance(one, (bool, int, float, str))


def _tensor_changes(given: torch.Tensor, now: torch.Tensor, name: str) -> Iterator[str]:
    if now.is_meta and not given.is_meta:
        raise TypeError(f"{name}: still without memory (device 'meta')")
    if given.dtype != now.dtype:
        yield f"{name}: {_type(given)} became {_type(now)}"
    elif given.shape != now.shape:
        yield f"{name}: shape {list(given.shape)} became {list(now.shape)}"
    elif _comparable(given) and _comparable(now) and not _equal(given, now.to(given.device)):
        yield f"{name}: other values"


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor; other tensors as they are."""
    local = local_of(tensor)
    return tensor if local is None else local


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _comparable(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if torch.equal(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(one[~nan], other[~nan])
