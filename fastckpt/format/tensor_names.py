"""Names of tensors: arrays of typed keys (docs/format.md, section 5)."""

from __future__ import annotations

import datetime
import enum
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

_MAX_REPR = 200
_MAX_DEPTH = 3
# Types whose `repr` runs no foreign code.
_SHOWN = frozenset({bool, float, complex, type(None), type(...), datetime.date, datetime.datetime, datetime.timedelta})
_SHOWN_BY_NAME = frozenset({("torch", "dtype"), ("torch", "device"), ("torch", "layout"), ("torch", "memory_format")})


@dataclass(frozen=True)
class ReprKey:
    """The text of a key that is neither an integer nor a valid Unicode string. For people; not unique."""

    text: str

    def __str__(self) -> str:
        return self.text


Key = str | int | ReprKey
Name = tuple[Key, ...]

BOX = "box"
"""The last key but one of the rows for single blocks of a shard (docs/format.md, section 5)."""


def key_of(value: object, position: int | None = None) -> Key:
    """The typed key for any Python dictionary key. Runs no code of the key's class: a parameter's `repr`, for example, would copy it from
    its device.

    position: the key's position in its dictionary; it distinguishes keys that have no text of their own.
    """
    if type(value) is int and abs(value) < 1 << 63:
        return value
    if type(value) is str and (value.isascii() or _is_unicode(value)):
        return value
    text = _text(value, _MAX_DEPTH)
    if text is None:
        text = f"<{type(value).__name__}>" if position is None else f"<{type(value).__name__} {position}>"
    return ReprKey(text[:_MAX_REPR].encode("utf-8", "backslashreplace").decode())


def _text(value: Any, depth: int) -> str | None:
    """The text of a value whose type is known to run no foreign code; None for all other types."""
    kind: Any = type(value)
    if issubclass(kind, enum.Enum):
        return f"<{kind.__name__}.{object.__getattribute__(value, '__dict__').get('_name_')}>"
    if issubclass(kind, str):
        return str.__repr__(str.__getitem__(value, slice(_MAX_REPR)))
    if issubclass(kind, bytes):
        return bytes.__repr__(bytes.__getitem__(value, slice(_MAX_REPR)))
    if (
        kind is int
        or kind in _SHOWN
        or (kind.__module__, kind.__qualname__) in _SHOWN_BY_NAME
        or _is_numpy_scalar(kind)
    ):
        try:
            return repr(value)
        except ValueError:  # an integer of more than 4300 digits
            return None
    if kind in (tuple, frozenset) and depth:
        parts = [_text(part, depth - 1) or f"<{type(part).__name__}>" for part in itertools.islice(value, _MAX_REPR)]
        comma = "," if kind is tuple and len(parts) == 1 else ""
        return f"({', '.join(parts)}{comma})" if kind is tuple else f"frozenset({{{', '.join(sorted(parts))}}})"
    return None


def _is_numpy_scalar(kind: type) -> bool:
    return issubclass(kind, np.generic) and kind.__module__ == "numpy"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def to_json(name: Name) -> list[Any]:
    """The JSON form of a name."""
    return [{"repr": key.text} if isinstance(key, ReprKey) else key for key in name]


def from_json(value: Any) -> Name:
    """The inverse of to_json. Anything else is a ValueError that says why."""
    if not isinstance(value, list):
        raise ValueError(f"a name is an array of keys, not {type(value).__name__}")
    keys: list[Key] = []
    for item in value:
        if isinstance(item, dict) and set(item) == {"repr"} and isinstance(item["repr"], str):
            keys.append(ReprKey(item["repr"]))
        elif isinstance(item, str) or (type(item) is int and abs(item) < 1 << 63):
            keys.append(item)
        else:
            raise ValueError(f"a key is a string, an integer or a repr, not {item!r:.80}")
    return tuple(keys)


def canonical(name: Name) -> tuple[tuple[int, int, str], ...]:
    """Sort key of the canonical order: integers, strings, reprs; a prefix first."""
    return tuple(
        [(1, 0, key) if type(key) is str else (0, key, "") if type(key) is int else (2, 0, key.text) for key in name]  # type: ignore[union-attr]
    )


def dotted(name: Name) -> str:
    """The name as people write it: model.wte.weight. Not unique (1 and "1" look alike)."""
    return ".".join(str(key) for key in name) or "(the object itself)"
