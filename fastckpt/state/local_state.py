"""A state with plain tensors in place of DTensors: each stands for this process's part, over the same memory.

So that a checkpoint holds no mesh and no process group: it can be read where there are none. What stood there is remembered beside the
state, for the directory says where each part lies in the whole.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastckpt.errors import SaveError
from fastckpt.format.tensor_names import Name, dotted, key_of
from fastckpt.host.torch_names import dtensor_class, local_of, sharded_tensor_class
from fastckpt.state.sharding import has_partial_sums, partial_sum

_MAX_DEPTH = 100  # pickling goes no deeper than some hundreds
_SHOWN = 3


NO_DTENSORS: Mapping[int, Any] = types.MappingProxyType({})


class LocalState(NamedTuple):
    """See the module."""

    state: Any
    dtensors: Mapping[int, Any]
    """id() of a plain tensor in the state → the DTensor that it stands for."""


def localised(state: Any, prefix: Name = (), *, exact: bool = True) -> LocalState:
    """The state with plain tensors. It is `state` itself, and so is each dictionary, list and tuple in it that holds no DTensor.

    Args:
        state: nested dictionaries, lists and tuples; into other objects nobody looks.
        prefix: its name, for errors.
        exact: whether a plain tensor is a parameter, and wants gradients, where the DTensor does. If not, it is the DTensor's own part, the
            same object each time.

    Raises:
        SaveError: DTensors that are partial sums, and ShardedTensors, all by name; only if `exact`.
    """
    kinds = _kinds()
    if not kinds:
        return LocalState(state, NO_DTENSORS)
    walk = _Walk(kinds, exact)
    found = walk.replaced(state, prefix, 0)
    if walk.problems:
        more = f" and {len(walk.problems) - _SHOWN} more" if len(walk.problems) > _SHOWN else ""
        raise SaveError(f"{'; '.join(walk.problems[:_SHOWN])}{more}. Nothing was committed")
    return LocalState(found, walk.dtensors)


def problems_in(state: Any, prefix: Name) -> list[str]:
    """Words for each tensor that `localised` refuses."""
    kinds = _kinds()
    if not kinds:
        return []
    walk = _Walk(kinds, exact=True)
    walk.replaced(state, prefix, 0)
    return walk.problems


def _kinds() -> tuple[Any, ...]:
    return tuple(kind for kind in (dtensor_class(), sharded_tensor_class()) if kind is not None)


class _Walk:
    def __init__(self, kinds: tuple[Any, ...], exact: bool) -> None:
        self._kinds, self._exact = kinds, exact
        self._matters: dict[type, bool] = {}
        """Of each type: whether it is a container, or is replaced."""
        self._made: dict[int, Any] = {}
        """id() of what has been met → what stands for it. An object that is there twice stays one."""
        self.dtensors: dict[int, Any] = {}
        self.problems: list[str] = []

    def replaced(self, value: Any, name: Name, depth: int) -> Any:
        """What is to stand where `value` stands."""
        kind = type(value)
        if not self._is_looked_at(kind) or depth > _MAX_DEPTH:
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        self._made[id(value)] = value
        if issubclass(kind, self._kinds):
            made = self._plain(value, name)
        elif issubclass(kind, dict):
            made = self._in_dictionary(value, name, depth)
        else:
            made = self._in_sequence(value, name, depth)
        self._made[id(value)] = made
        return made

    def _is_looked_at(self, kind: type) -> bool:
        found = self._matters.get(kind)
        if found is None:
            found = self._matters[kind] = issubclass(kind, (*self._kinds, dict, list, tuple))
        return found

    def _in_dictionary(self, value: Any, name: Name, depth: int) -> Any:
        if not any(
            map(self._is_looked_at, set(map(type, dict.values(value))))
        ):  # 20 ns a value; to look at each takes ten times as long
            return value
        changed = {}
        for key, child in dict.items(value):
            if self._is_looked_at(type(child)):
                made = self.replaced(child, (*name, key_of(key)), depth + 1)
                if made is not child:
                    changed[key] = made
        if not changed:
            return value
        copied = copy_of(value)
        for key, made in changed.items():
            copied[key] = made
        return copied

    def _in_sequence(self, value: Any, name: Name, depth: int) -> Any:
        base: Any = list if isinstance(value, list) else tuple
        if not any(map(self._is_looked_at, set(map(type, base.__iter__(value))))):
            return value
        made = [self.replaced(one, (*name, number), depth + 1) for number, one in enumerate(base.__iter__(value))]
        if all(one is other for one, other in zip(made, base.__iter__(value), strict=True)):
            return value
        return sequence_of(value, made)

    def _plain(self, tensor: Any, name: Name) -> Any:
        local = local_of(tensor)
        if local is None and self._exact:
            self.problems.append(
                f"{dotted(name)} is a ShardedTensor, which takes part in collectives when it is saved: use DTensor, FSDP2 (fully_shard) say"
            )
        if local is None:
            return tensor
        if has_partial_sums(tensor) and self._exact:
            self.problems.append(f"{dotted(name)}: {partial_sum(tensor)}")
            return tensor
        plain = _as(local, tensor) if self._exact else local
        if id(plain) in self.dtensors:
            plain = plain.detach()
        self.dtensors[id(plain)] = tensor
        return plain


def _as(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The part, as the whole is: a parameter or not. Over the same memory."""
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(local.detach(), requires_grad=tensor.requires_grad)
    if local.requires_grad != tensor.requires_grad or not local.is_leaf:
        return local.detach().requires_grad_(tensor.requires_grad)
    return local


def sequence_of(value: Any, items: Sequence[Any]) -> Any:
    """A list or tuple of the same kind as another one, with other items."""
    if isinstance(value, list):
        copied = copy.copy(value)
        copied[:] = items
        return copied
    make: Any = getattr(type(value), "_make", type(value))  # a named tuple takes its fields one by one
    return make(items)


def copy_of(value: Any) -> Any:
    """A copy of a dictionary, of whatever kind, with what else it has."""
    kind = type(value)
    if kind not in (dict, OrderedDict):
        return copy.copy(value)
    copied = kind(value)
    if kind is OrderedDict:  # a module's state dict has `_metadata`
        copied.__dict__.update(value.__dict__)
    return copied
