"""The same object through torch and through fastckpt, and a description of the results that two equal objects share."""

from __future__ import annotations

import ctypes
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.storage import TypedStorage, UntypedStorage

import fastckpt

ATOMS = (type(None), bool, int, str, bytes, bytearray, torch.dtype, torch.device, torch.layout, type, torch.qscheme)
COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


class Describe:
    """Objects and storages are numbered in the order in which they are met, so that sharing is part of the description."""

    def __init__(self) -> None:
        self.objects: dict[int, int] = {}
        self.storages: dict[int, int] = {}
        self.kept: list[Any] = []

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (float, complex)) and not isinstance(value, np.generic):
            return (type(value).__name__, repr(value))
        if isinstance(value, ATOMS):
            return (type(value).__name__, value)
        if id(value) in self.objects:
            return ("again", self.objects[id(value)])
        self.objects[id(value)] = len(self.objects)
        self.kept.append(value)
        kind = type(value).__qualname__
        attributes = getattr(value, "__dict__", None)
        extra = self.pairs(attributes) if isinstance(attributes, dict) else None
        if isinstance(value, torch.Tensor) and value.layout is torch.jagged:
            return (kind, self.tensor(value))  # its attributes number every nested tensor ever made
        if isinstance(value, torch.Tensor):
            return (kind, self.tensor(value), extra)
        if isinstance(value, (TypedStorage, UntypedStorage)):
            untyped = value.untyped()
            return (kind, getattr(value, "dtype", None), self.storage(untyped))
        if isinstance(value, np.ndarray):
            writeable = value.flags.writeable
            content = self(value.tolist()) if value.dtype.hasobject else value.tobytes()
            # Strides of axes with at most one element mean nothing and pickling does not keep them.
            order = (value.flags.c_contiguous, value.flags.f_contiguous)
            return (kind, value.dtype.str, repr(value.dtype), value.shape, order, writeable, content)
        if isinstance(value, np.generic):
            return (kind, value.dtype.str, value.tobytes())
        if isinstance(value, dict):
            return (kind, self.pairs(value), extra)
        if isinstance(value, (list, tuple)):
            return (kind, [self(item) for item in value], extra)
        if isinstance(value, (set, frozenset)):
            return (kind, sorted(map(repr, value)))
        if extra is not None:
            return (kind, extra)
        return (kind, repr(value))

    def pairs(self, value: dict[Any, Any]) -> list[Any]:
        return [(self(key), self(item)) for key, item in value.items()]

    def storage(self, storage: UntypedStorage) -> Any:
        if not storage.nbytes():  # torch loads empty storages apart, also those that were one: nobody can tell
            return ("empty", str(storage.device))
        if storage.device.type == "meta":  # torch loads each apart; fastckpt keeps what was shared
            return ("meta", storage.nbytes())
        number = self.storages.setdefault(storage._cdata, len(self.storages))
        self.kept.append(storage)
        data = None
        if storage.device.type == "cpu":
            data = ctypes.string_at(storage.data_ptr(), storage.nbytes())
        return (number, str(storage.device), storage.nbytes(), data)

    def tensor(self, value: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            head = (value.dtype, value.requires_grad, value.layout, str(value.device), value.is_nested)
            if value.layout is torch.sparse_coo:
                parts = (value._indices(), value._values())
                return (*head, tuple(value.shape), value.is_coalesced(), [self.tensor(part) for part in parts])
            if value.layout in COMPRESSED:
                parts = [getattr(value, part)() for part in COMPRESSED[value.layout]]
                return (*head, tuple(value.shape), [self.tensor(part) for part in parts])
            if value.is_nested and value.layout is torch.jagged:
                return (*head, self.tensor(value.values()), self.tensor(value.offsets()))
            if value.is_nested:
                sizes = (value._nested_tensor_size().tolist(), value._nested_tensor_strides().tolist())
                return (*head, sizes, self.storage(value.untyped_storage()))
            head = (*head, tuple(value.shape), value.stride(), value.is_conj(), value.is_neg(), value.is_leaf)
            dispatches = type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
            if dispatches:
                return head  # what is inside is in its __dict__, or the test compares it
            if value.is_quantized:
                head = (*head, value.qscheme(), *quantization(value))
            return (*head, value.storage_offset(), self.storage(value.untyped_storage()))


def quantization(value: torch.Tensor) -> tuple[Any, ...]:
    if value.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return (value.q_scale(), value.q_zero_point())
    scales, zeros = value.q_per_channel_scales(), value.q_per_channel_zero_points()
    return (scales.tolist(), scales.dtype, zeros.tolist(), zeros.dtype, value.q_per_channel_axis())


def describe(value: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of what is looked at
        return Describe()(value)


def through_torch(obj: Any, **arguments: Any) -> Any:
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    return torch.load(file, **arguments)


def through_ours(obj: Any, path: Path | None = None, **arguments: Any) -> Any:
    if path is not None:
        fastckpt.save(obj, path)
        return fastckpt.load(path, **arguments)
    file = io.BytesIO()
    fastckpt.save(obj, file)
    file.seek(0)
    return fastckpt.load(file, **arguments)


def same(obj: Any, tmp_path: Path | None = None, **arguments: Any) -> tuple[Any, Any]:
    """Both results, after checking that they cannot be told apart."""
    expected = through_torch(obj, **arguments)
    found = through_ours(obj, **arguments)
    assert describe(found) == describe(expected)
    if tmp_path is not None:
        assert describe(through_ours(obj, tmp_path / "differential.ckpt", **arguments)) == describe(expected)
    return expected, found


def outcome(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None
