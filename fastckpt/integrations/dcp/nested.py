"""Flattened names and their values → the nested state that torch had flattened. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.integrations.dcp.layout import Layout, Path


def nested_state(values: Mapping[str, Any], layout: Layout, source: str, *, with_empty: bool) -> dict[str, Any]:
    """Put each value where it was. with_empty: put empty dictionaries back, too. CorruptCheckpointError for places that contradict."""
    tree = _Branch()
    for fqn, value in values.items():
        path = (layout.paths or {}).get(fqn, (fqn,))
        node = _branch_at(tree, path[:-1])
        if node is None or path[-1] in node:
            raise _contradictory(source, path)
        node[path[-1]] = value
    for path in layout.empty if with_empty else ():
        _branch_at(tree, path)  # what another rank has there counts
    return {str(key): _built(value) for key, value in tree.items()}


def _branch_at(tree: _Branch, path: Path) -> _Branch | None:
    """The branch at a place, made if need be; None: something else is in the way."""
    node: Any = tree
    for key in path:
        node = node.setdefault(key, _Branch())
        if not isinstance(node, _Branch):
            return None
    return node  # type: ignore[no-any-return]


class _Branch(dict[Any, Any]):
    """A dictionary or list of the state; other dictionaries are values."""


def _built(value: Any) -> Any:
    """A list where all keys are integers, as torch takes them, else a dictionary. Numbers that are left out (not asked for) close up."""
    if not isinstance(value, _Branch):
        return value
    if value and all(type(key) is int for key in value):
        return [_built(value[key]) for key in sorted(value)]
    return {key: _built(item) for key, item in value.items()}


def _contradictory(source: str, path: Path) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        source, [Damage("directory", f"place {path!r}", "a place of its own", "another value there")]
    )
