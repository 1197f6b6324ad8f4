"""What a directory says of the tensors of a captured object."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fastckpt.format.directory import TensorEntry
from fastckpt.format.element_types import NUMPY_PREFIX, element_type
from fastckpt.format.tensor_names import Name
from fastckpt.host.torch_names import identity
from fastckpt.state.naming import Named, named_tensors
from fastckpt.state.shards import placed

if TYPE_CHECKING:
    from fastckpt.state.capture import StorageNumbers


def entries(obj: object, numbers: StorageNumbers, prefix: Name = ()) -> list[TensorEntry]:
    """What the directory says of the tensors in an object that has been pickled."""
    found: list[TensorEntry] = []
    dtensors = numbers.dtensors
    for named in named_tensors(obj, prefix, numbers.reductions):
        entry = _entry(named, numbers)
        if entry is None:
            continue
        if dtensors and id(named.value) in dtensors:
            numbers.shards[entry.name], rows = placed(entry, dtensors[id(named.value)])
            found += rows
        else:
            found.append(entry)
    return found


def _entry(named: Named, state: StorageNumbers) -> TensorEntry | None:
    name, value, kind, place, _ = named
    if isinstance(value, np.ndarray):
        number = state.number_of_array.get(id(value))
        if number is None:  # a small array: it is in the pickle
            return None
        order = order_of(value)
        dtype = NUMPY_PREFIX + value.dtype.str
        return TensorEntry(name, dtype, value.shape, _strides(value.shape, order), 0, number, kind, False)
    number = state.number_of_storage.get(identity(value.untyped_storage()))
    if number is None:  # reached by name only: pickling went another way
        return None
    dtype = name_of(value.dtype)
    storage = state.storages[number]
    if storage.dtype == "uint8" and dtype != "uint8":
        element = element_type(dtype)
        if element is not None and storage.n_bytes % element.n_bytes == 0:
            storage.dtype = (
                dtype  # torch writes its newer types through untyped storages; their width matters for the cuts
            )
    if storage.device is not None and covers(value, storage.n_bytes):
        state.wholes[number] = value
    return TensorEntry(
        name,
        dtype,
        tuple(value.shape),
        tuple(value.stride()),
        int(value.storage_offset()),
        number,
        kind,
        value.requires_grad,
        place,
    )


def covers(tensor: torch.Tensor, n_bytes: int) -> bool:
    """Whether a tensor is all of its storage's bytes, in order, so that it can stand for them."""
    return (
        tensor.nbytes == n_bytes
        and not tensor.storage_offset()
        and not tensor.is_nested
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not tensor.is_quantized
        and not tensor.is_complex()
        and not tensor.is_neg()
        and tensor.is_contiguous()
    )


@functools.cache
def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def order_of(array: np.ndarray[Any, Any]) -> Literal["C", "F"]:
    """The order that pickling an array keeps."""
    return "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"


def _strides(shape: tuple[int, ...], order: str) -> tuple[int, ...]:
    """Element strides of a contiguous array."""
    strides, step = [], 1
    for size in shape if order == "F" else reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(strides if order == "F" else reversed(strides))
