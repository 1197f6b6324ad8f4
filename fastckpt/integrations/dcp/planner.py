"""A save planner that remembers empty dictionaries, which torch's planners lose when they flatten a state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner


class FastckptSavePlanner(DefaultSavePlanner):
    """torch's DefaultSavePlanner, which also tells FastckptWriter where the state has empty dictionaries.

    `FastckptReader.read_state_dict` puts them back; `dcp.load` leaves those of its target alone. Arguments: those of DefaultSavePlanner.
    """

    empty: tuple[tuple[str | int, ...], ...] = ()
    """Where the state that is being saved has empty dictionaries."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Called by torch, on every rank."""
        self.empty = tuple(_empty(state_dict, ())) if self.flatten_state_dict else ()
        super().set_up_planner(state_dict, storage_meta, is_coordinator)


def _empty(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """The places of empty dictionaries in what torch flattens."""
    if isinstance(value, Mapping):
        if not value and path:
            yield path
        for key, item in value.items():
            yield from _empty(item, (*path, str(key)))
    elif isinstance(value, list) and _is_flattened(value):
        for number, item in enumerate(value):
            yield from _empty(item, (*path, number))


def _is_flattened(value: list[Any]) -> bool:
    """Whether torch flattens a list: it holds a tensor or a dictionary, at any depth of lists."""
    return any(
        isinstance(item, (torch.Tensor, Mapping)) or (isinstance(item, list) and _is_flattened(item)) for item in value
    )
