"""Names of tensors: arrays of typed keys (docs/format.md, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MAX_REPR = 200


@dataclass(frozen=True)
class ReprKey:
    """A key that is neither an integer nor a valid Unicode string, by its text. For people; not unique."""

    text: str

    def __str__(self) -> str:
        return self.text


Key = str | int | ReprKey
Name = tuple[Key, ...]


def key_of(value: object) -> Key:
    """The typed key for any Python dictionary key."""
    if type(value) is int and abs(value) < 1 << 63:
        return value
    if type(value) is str and _is_unicode(value):
        return value
    try:
        text = repr(value)
    except Exception:  # foreign code, and only a label is lost
        text = f"<{type(value).__name__}>"
    return ReprKey(text[:_MAX_REPR].encode("utf-8", "backslashreplace").decode())


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
    """The inverse of to_json; ValueError in words for anything else."""
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
        (0, key, "") if isinstance(key, int) else (1, 0, key) if isinstance(key, str) else (2, 0, key.text)
        for key in name
    )


def dotted(name: Name) -> str:
    """How people write a name: model.wte.weight. Not unique (1 and "1" look alike)."""
    return ".".join(str(key) for key in name) or "(the object itself)"
