"""Dictionaries and lists take their state in place at every level: other holders of these objects see the new values.

Other holders of a tensor in a dictionary see them too. A tensor in a list is replaced, because its position is no name: the next list may
have another tensor there. Tensors that share memory now, and shared it when they were saved, stay tied. Tensors that share memory now, but
did not then, are replaced: a copy into one would change the other.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from fastckpt.host.torch_names import local_of
from fastckpt.training.placement import PlacementPlan

_MAX_DEPTH = 100  # deeper values are replaced as a whole


class Filling:
    """One restore of one dictionary or list."""

    def __init__(self, plan: PlacementPlan, *, tries: bool = False) -> None:
        """tries: True changes nothing, and only finds out what would be copied into which live tensor. Loaded tensors may be on the meta
        device then.
        """
        self._plan, self._tries = plan, tries
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Live tensors, each with the loaded one that it takes."""
        self._made: dict[int, Any] = {}
        """id() of a loaded object → the object that stands for it. An object that occurs twice stays one object."""
        self._used: set[int] = set()
        """id() of live objects that have taken a state. A second state needs another object."""
        self._kept: list[Any] = []
        """Holds loaded and live objects, so that their ids are not given to new objects meanwhile."""

    def fill_top(self, live: Any, value: Any) -> None:
        """Give a dictionary or list of a Checkpointer's state its content. Both are dictionaries, or both are lists."""
        self.enter(live, value)
        if isinstance(live, dict):
            content = {key: self.fill(live.get(key), child) for key, child in value.items()}
            self._put_items(live, content)
        else:
            items = self.items(live, value)
            if not self._tries:
                live[:] = items

    def _put_items(self, live: dict[Any, Any], content: dict[Any, Any]) -> None:
        if not self._tries:
            live.clear()
            live.update(content)

    def fill(self, live: Any, value: Any, depth: int = 0, *, in_list: bool = False) -> Any:
        """Return the object that shall stand in the place of `live`: `live` itself, filled with `value`, if it can take that; else
        `value`.
        """
        if id(value) in self._made:
            return self._made[id(value)]
        takes = type(live) is type(value) and id(live) not in self._used and depth < _MAX_DEPTH
        if takes and type(value) in (dict, OrderedDict):
            self.enter(live, value)
            content = {key: self.fill(live.get(key), child, depth + 1) for key, child in value.items()}
            self._put_items(live, content)
            if type(live) is OrderedDict and not self._tries:  # a module's state dict has an attribute `_metadata`
                live.__dict__.update(value.__dict__)
            return live
        if takes and type(value) is list:
            self.enter(live, value)
            items = self.items(live, value, depth + 1)
            if not self._tries:
                live[:] = items
            return live
        if isinstance(live, torch.Tensor):
            into, content = _memory_of(live, value)
            if self._may_be_filled(into, in_list) and _fits(into, content, may_be_meta=self._tries):
                self.enter(live, value)
                self.copies.append((into, content))
                if not self._tries:
                    with torch.no_grad():
                        into.copy_(content)
                return live
        return value

    def items(self, live: list[Any], value: list[Any], depth: int = 0) -> list[Any]:
        """Build the new content of a list."""
        return [
            self.fill(live[n] if n < len(live) else None, child, depth, in_list=True) for n, child in enumerate(value)
        ]

    def _may_be_filled(self, live: torch.Tensor, in_list: bool) -> bool:
        return id(live) in self._plan.tied or (id(live) in self._plan.alone and not in_list)

    def enter(self, live: Any, value: Any) -> None:
        """From now on `live` stands for `value`."""
        self._made[id(value)] = live
        self._used.add(id(live))
        self._kept += (live, value)


def _memory_of(live: torch.Tensor, value: Any) -> tuple[torch.Tensor, Any]:
    """Of two DTensors that are alike, the parts; else the tensors."""
    into, content = local_of(live), local_of(value)
    if into is None or content is None:
        return live, value
    alike = isinstance(live, torch.nn.Parameter) == isinstance(value, torch.nn.Parameter)
    return (into, content) if alike and live.requires_grad == value.requires_grad else (live, value)


def _fits(live: torch.Tensor, value: Any, *, may_be_meta: bool = False) -> bool:
    """Whether a copy into `live` makes it equal to `value` in every respect."""
    return (
        type(live) is type(value)
        and type(live) in (torch.Tensor, torch.nn.Parameter)
        and (live.dtype, live.shape, live.layout, live.requires_grad)
        == (value.dtype, value.shape, value.layout, value.requires_grad)
        and live.layout is torch.strided
        and not (
            live.is_meta
            or (value.is_meta and not may_be_meta)
            or live.is_quantized
            or live.is_nested
            or value.is_nested
        )
        and not live.is_inference()
        and not value.__dict__
        and has_a_place_for_each_element(live)
    )


def has_a_place_for_each_element(tensor: torch.Tensor) -> bool:
    """False if elements may share memory with one another, as in an expanded tensor."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach = stride * size
    return True
