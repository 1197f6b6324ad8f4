"""Whether all tensors of a loaded state have names: none of them is in an object into which `state/naming.py` does not look. Pure."""

from __future__ import annotations

import datetime
import enum
import pathlib
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fastckpt.state.naming import own_attributes

_VALUES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.dtype,
    torch.device,
    torch.Size,
    torch.layout,
    np.generic,
    np.ndarray,
    pathlib.PurePath,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
    enum.Enum,
    type,
)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement


def is_seen_through(state: Any) -> bool:
    """False: a tensor may be in a set, a key, an attribute of a dictionary, or in an object of an unknown kind."""
    stack: list[tuple[Any, bool]] = [(state, True)]
    seen: set[tuple[int, bool]] = set()
    while stack:
        value, named = stack.pop()
        if isinstance(value, torch.Tensor):
            if not named or own_attributes(value):
                return False
        elif not isinstance(value, _VALUES) and (id(value), named) not in seen:
            seen.add((id(value), named))
            if isinstance(value, dict):
                stack += [(child, named) for child in dict.values(value)]
                stack += [(child, False) for child in _hidden(dict.keys(value), value)]
            elif isinstance(value, (list, tuple)):
                stack += [(child, named) for child in value]
                stack += [(child, False) for child in own_attributes(value).values()]
            elif isinstance(value, (set, frozenset, deque)):
                stack += [(child, False) for child in value]
            elif _has_attributes_only(type(value)):
                stack += [(child, False) for child in own_attributes(value).values()]
            else:
                return False
    return True


def _hidden(keys: Iterable[Any], value: Any) -> list[Any]:
    return [key for key in keys if type(key) not in (str, int)] + list(own_attributes(value).values())


def _has_attributes_only(kind: type) -> bool:
    return all(
        one is object or (one.__flags__ & _HEAP_TYPE and not one.__dict__.get("__slots__")) for one in kind.__mro__
    )
