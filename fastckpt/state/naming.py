"""The name of every tensor in a nested object: the typed keys that lead to it.

Looks into dictionaries, lists, tuples, modules and any object with a `__dict__`, and into the parts of composite tensors (sparse, nested,
subclasses). Each container is searched once, under its first name. If an object controls how it is pickled, the search follows its pickled
form: a cache that its `__getstate__` leaves out may be large, dead or belong to somebody else. Tensors that only pickling reaches (in a
set, in a deque) have no name, but they are in the skeleton.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastckpt.format.directory import GlobalPlace
from fastckpt.format.tensor_names import Name, key_of
from fastckpt.host.torch_names import has_storage, local_of, without_subclasses
from fastckpt.state.sharding import boxes_of, has_partial_sums

_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device})
_OPAQUE = (
    str,
    bytes,
    int,
    float,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    torch.dtype,
    torch.device,
)
_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


class Reduction(NamedTuple):
    """What an object with its own `__getstate__` or `__reduce__` returned to the pickler."""

    owner: object
    """The object itself, kept alive so that its `id` stays unique."""
    arguments: tuple[Any, ...]
    state: Any
    has_elements: bool
    has_items: bool


NONE: Mapping[int, Reduction] = types.MappingProxyType({})


class Named(NamedTuple):
    """A plain tensor (strided, with a storage of its own) or a NumPy array, under a name."""

    name: Name
    value: torch.Tensor | np.ndarray[Any, Any]
    kind: str
    place: GlobalPlace | None = None
    owner: torch.Tensor | None = None
    """The composite tensor that this one is a part of."""


def named_tensors(obj: object, prefix: Name = (), reductions: Mapping[int, Reduction] = NONE) -> Iterator[Named]:
    """All tensors and arrays in `obj` that have a name, depth first. prefix: the beginning of all names.

    reductions: by `id`, the pickled form of objects that control how they are pickled; other objects are pickled by their attributes. Of
    the objects' own code, only `__tensor_flatten__` is run.
    """
    seen: set[int] = set()
    stack: list[tuple[Name, Any]] = [(prefix, obj)]
    while stack:
        name, value = stack.pop()
        kind = type(value)
        # Not isinstance: that asks for `__class__`, which fails for a dead weak reference.
        if issubclass(kind, torch.Tensor):
            if (kind is torch.Tensor or kind is torch.nn.Parameter) and _is_plain(value):
                yield Named(name, value, "tensor" if kind is torch.Tensor else "parameter")
                continue
            with without_subclasses():
                yield from _tensor(
                    name, value, "parameter" if isinstance(value, torch.nn.Parameter) else "tensor", None, None
                )
        elif issubclass(kind, np.ndarray):
            yield Named(name, value, "array")
        elif id(value) not in seen:
            children = _children(value, reductions.get(id(value)))
            if children:
                seen.add(id(value))
                children.reverse()
                stack.extend([((*name, key), child) for key, child in children])


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary one, not a composite."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested and has_storage(tensor)


def _children(value: Any, reduction: Reduction | None) -> list[tuple[Any, Any]]:
    kind = type(value)
    if kind in _SCALARS or issubclass(kind, _OPAQUE):
        return []
    if reduction is not None:
        return _reduced(value, reduction)
    if issubclass(kind, dict):
        return _items(value)
    if issubclass(kind, (list, tuple)):
        return _elements(value)
    return _attributes(value, own_attributes(value))


def _items(value: dict[Any, Any]) -> list[tuple[Any, Any]]:
    if _SCALARS.issuperset(
        map(type, dict.values(value))
    ):  # this test takes 20 ns a number; a look at each one would take 300
        return []
    return [
        (key_of(key, at), child) for at, (key, child) in enumerate(dict.items(value)) if type(child) not in _SCALARS
    ]


def _elements(value: Sequence[Any]) -> list[tuple[Any, Any]]:
    base: Any = list if issubclass(type(value), list) else tuple
    if _SCALARS.issuperset(map(type, base.__iter__(value))):
        return []
    return [(number, child) for number, child in enumerate(base.__iter__(value)) if type(child) not in _SCALARS]


def own_attributes(value: object) -> dict[str, Any]:
    """The `__dict__` of an object, read without running code of its class."""
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return attributes if isinstance(attributes, dict) else {}


def _attributes(value: object, attributes: dict[Any, Any]) -> list[tuple[Any, Any]]:
    found = _items(attributes)
    if not issubclass(type(value), torch.nn.Module):
        return found
    children: list[tuple[Any, Any]] = []
    for key, child in found:
        # model.weight, not model._parameters.weight
        inner = key in ("_parameters", "_buffers", "_modules") and isinstance(child, dict)
        children += _items(child) if inner else [(key, child)]
    return children


def _reduced(value: object, reduction: Reduction) -> list[tuple[Any, Any]]:
    """The pickled form of an object: its items and its state; without these, the arguments of its constructor."""
    children: list[tuple[Any, Any]] = []
    if issubclass(type(value), dict) and reduction.has_items:
        children += _items(value)  # type: ignore[arg-type]
    if issubclass(type(value), list) and reduction.has_elements:
        children += _elements(value)  # type: ignore[arg-type]
    state = reduction.state
    if isinstance(state, tuple) and len(state) == 2 and all(part is None or type(part) is dict for part in state):
        for part in state:  # attributes, and those in slots, come as a pair
            children += _attributes(value, part or {})
    elif isinstance(state, dict):
        children += _attributes(value, state)
    elif state is not None:
        children += _labelled(value, state if isinstance(state, (tuple, list)) else (state,))
    return children or _labelled(value, reduction.arguments)


def _labelled(value: object, parts: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Label positional parts by the names of the attributes that hold them, or else by their positions."""
    names = {id(child): key_of(key) for key, child in own_attributes(value).items()}
    return [(names.get(id(child), key), child) for key, child in _elements(parts)]


def _tensor(
    name: Name, tensor: torch.Tensor, kind: str, place: GlobalPlace | None, owner: torch.Tensor | None
) -> Iterator[Named]:
    for part, value in _parts(tensor):
        inner = _global_place(tensor) if part == "_local_tensor" else None
        yield from _tensor((*name, part), value, "part", inner, tensor)
    if tensor.layout is torch.strided and not tensor.is_nested and not _is_wrapper(tensor) and has_storage(tensor):
        yield Named(name, tensor, "quantized" if tensor.is_quantized else kind, place, owner)


def _parts(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a composite tensor is pickled as."""
    if tensor.layout is torch.sparse_coo:
        return [("indices", tensor._indices()), ("values", tensor._values())]
    if tensor.layout in _COMPRESSED:
        return [(part, getattr(tensor, part)()) for part in _COMPRESSED[tensor.layout]]
    if tensor.is_nested and not _is_wrapper(tensor):
        return [("values", tensor.values())]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return []
    try:
        attributes = flatten()[0]
    except Exception:  # foreign code failed; only names are lost
        return []
    found = [(str(attribute), getattr(tensor, str(attribute), None)) for attribute in attributes]
    return [(attribute, value) for attribute, value in found if isinstance(value, torch.Tensor)]


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a subclass without memory of its own, which torch pickles by its attributes."""
    dispatches = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return type(tensor) is not torch.Tensor and dispatches and _address(tensor) == 0


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # wrappers of some backends have no data pointer
        return 0


def _global_place(tensor: torch.Tensor) -> GlobalPlace | None:
    """Where a DTensor's local part lies in the whole, if it is one block of it."""
    if local_of(tensor) is None or has_partial_sums(tensor):
        return None
    boxes = boxes_of(tensor)
    return GlobalPlace(tuple(tensor.shape), boxes[0].offset) if len(boxes) == 1 else None
