"""Flattened names and their values → the nested state that torch had flattened. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.integrations.dcp.layout import Layout, Path


def nested_state(values: Mapping[str, Any], layout: Layout, source: str, *, with_empty: bool) -> dict[str, Any]:
    """Put each value where it was. with_empty: put empty dictionaries back, too. CorruptCheckpointError for places that contradict."""
    places: dict[Path, Any] = {(layout.paths or {}).get(fqn, (fqn,)): value for fqn, value in values.items()}
    for path in layout.empty if with_empty else ():
        places.setdefault(path, {})
    tree: dict[Any, Any] = {}
    for path, value in places.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, _Branch())
            if not isinstance(node, _Branch):
                raise _contradictory(source, path)
        if path[-1] in node:
            raise _contradictory(source, path)
        node[path[-1]] = value
    return {str(key): _built(value) for key, value in tree.items()}


class _Branch(dict[Any, Any]):
    """A dictionary or list of the state; other dictionaries are values."""


def _built(value: Any) -> Any:
    """A list where all keys are integers, as torch takes them, else a dictionary. Numbers that are left out (not asked for) close up."""
    if not isinstance(value, _Branch):
        return value
    if all(type(key) is int for key in value):
        return [_built(value[key]) for key in sorted(value)]
    return {key: _built(item) for key, item in value.items()}


def _contradictory(source: str, path: Path) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        source, [Damage("directory", f"place {path!r}", "a place of its own", "another value there")]
    )
