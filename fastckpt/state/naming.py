"""The name of every tensor in a nested object: the typed keys that lead to it.

Looks into dictionaries, lists, tuples, modules and any object with a `__dict__`, and into the parts of composite tensors (sparse,
nested, subclasses). Each container is looked into once, under its first name. Tensors that only pickling reaches (in a set, behind a
`__reduce__`) have no name; the skeleton holds them all the same.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from fastckpt.format.directory import GlobalPlace
from fastckpt.format.tensor_names import Name, key_of

_OPAQUE = (
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


class Named(NamedTuple):
    """A plain tensor (strided, with a storage of its own) or a NumPy array, under a name."""

    name: Name
    value: torch.Tensor | np.ndarray[Any, Any]
    kind: str
    place: GlobalPlace | None = None
    owner: torch.Tensor | None = None
    """The tensor that this one is a part of."""


def named_tensors(obj: object, prefix: Name = ()) -> Iterator[Named]:
    """Every tensor and array in `obj` that has a name, which begins with the prefix; depth first.

    Runs no code of the objects but `__tensor_flatten__`.
    """
    seen: set[int] = set()
    stack: list[tuple[Name, object]] = [(prefix, obj)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, torch.Tensor):
            with torch._C.DisableTorchFunctionSubclass():
                yield from _tensor(
                    name, value, "parameter" if isinstance(value, torch.nn.Parameter) else "tensor", None, None
                )
            continue
        if isinstance(value, np.ndarray):
            yield Named(name, value, "array")
            continue
        children = _children(value)
        if children and id(value) not in seen:
            seen.add(id(value))
            stack.extend(((*name, key), child) for key, child in reversed(children))


def _children(value: object) -> list[tuple[Any, object]]:
    if isinstance(value, dict):
        return [(key_of(key), child) for key, child in value.items()]
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if value is None or isinstance(value, (str, bytes, int, float, complex, *_OPAQUE)):
        return []
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return []
    children: list[tuple[Any, object]] = []
    for key, child in attributes.items():
        if (
            isinstance(value, torch.nn.Module)
            and key in ("_parameters", "_buffers", "_modules")
            and isinstance(child, dict)
        ):
            children += [
                (key_of(inner), item) for inner, item in child.items()
            ]  # model.weight, not model._parameters.weight
        else:
            children.append((key_of(key), child))
    return children


def _tensor(
    name: Name, tensor: torch.Tensor, kind: str, place: GlobalPlace | None, owner: torch.Tensor | None
) -> Iterator[Named]:
    for part, value in _parts(tensor):
        inner = _global_place(tensor) if part == "_local_tensor" else None
        yield from _tensor((*name, part), value, "part", inner, tensor)
    if (
        tensor.layout is torch.strided
        and not tensor.is_nested
        and not _is_wrapper(tensor)
        and torch._C._has_storage(tensor)
    ):
        yield Named(name, tensor, "quantized" if tensor.is_quantized else kind, place, owner)


def _parts(tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a composite is pickled as."""
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
    except Exception:  # foreign code, and only names are lost
        return []
    found = [(str(attribute), getattr(tensor, str(attribute), None)) for attribute in attributes]
    return [(attribute, value) for attribute, value in found if isinstance(value, torch.Tensor)]


def _is_wrapper(tensor: torch.Tensor) -> bool:
    """A subclass without memory of its own, which torch pickles by its attributes."""
    dispatches = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return type(tensor) is not torch.Tensor and dispatches and _address(tensor) == 0


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # wrappers of some backends have no data pointer at all
        return 0


def _global_place(tensor: torch.Tensor) -> GlobalPlace | None:
    """Where a DTensor's local part lies in the whole, if it is one block of it."""
    if not hasattr(tensor, "placements") or not hasattr(tensor, "device_mesh"):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    try:
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    except (
        RuntimeError,
        NotImplementedError,
        ValueError,
        AssertionError,
    ):  # strided or partial placements have no one block
        return None
    return GlobalPlace(tuple(tensor.shape), tuple(offset))
