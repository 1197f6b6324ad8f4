"""Checks that the parts of composite tensors (tensors made of tensors) fit together. Their parts decide where kernels read and write, and
they may come from an untrusted file.

torch checks that a plain tensor lies within its storage. It does not check that the indices of a sparse tensor lie within its shape (before
2.14), the offsets of a jagged one within its values, or that a quantized tensor has a scale for each channel. With wrong parts, `to_dense`
reads and writes outside of its memory.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastckpt.errors import CorruptCheckpointError, Damage
from fastckpt.format.tensor_names import Name, dotted, key_of
from fastckpt.host.torch_names import is_fake, validate_sparse_compressed, validate_sparse_coo, without_subclasses

_JAGGED_MODULE = "torch.nested._internal.nested_tensor"
_COMPRESSED_BY_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED = (*_COMPRESSED_BY_ROWS, torch.sparse_csc, torch.sparse_bsc)
# A pickle stream that makes such a tensor contains one of these: function names occur in it literally.
_MARKS = (b"sparse", b"nested", b"_rebuild_qtensor", b"_rebuild_wrapper_subclass")
_PLAIN = frozenset(
    (str, bytes, bytearray, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.layout, torch.Size)
)
_NOT_STATE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.CodeType)
# Kernels of other devices may lack operations that the check needs.
_CHECKED_IN_PLACE = ("cpu", "cuda")


class Misfit(NamedTuple):
    """A tensor whose parts do not fit together."""

    name: str
    """The place of the tensor in the object."""
    kind: str
    why: str


def may_hold_composites(stream: bytes) -> bool:
    """Whether unpickling a stream can make a tensor that `misfits` would check. Almost no stream can."""
    return any(mark in stream for mark in _MARKS)


def asked_for() -> bool:
    """Whether torch was told to check sparse tensors whenever they are made. Then loads that may run code check them, too."""
    return bool(torch.sparse.check_sparse_tensor_invariants.is_enabled())


def require_fit(obj: object, source: str) -> None:
    """CorruptCheckpointError that lists every tensor in a loaded object whose parts do not fit together."""
    damage = [
        Damage("skeleton", f"{kind} {name!r}", "parts that fit together", why) for name, kind, why in misfits(obj)
    ]
    if damage:
        raise CorruptCheckpointError(source, damage, "If you made it and want it as it is, pass weights_only=False.")


def misfits(obj: object) -> list[Misfit]:
    """Every tensor in the object, at any place in it, whose parts do not fit together.

    Reads all indices. Tensors without data (meta, fake) are skipped: no kernel reads their memory.
    """
    found = []
    with without_subclasses():
        for name, tensor in _composites(obj):
            kind = _kind(tensor)
            try:
                why = _misfit(tensor)
            except Exception as error:  # torch's text: the kind of failure depends on version and layout
                why = str(error).partition("\n")[0] or type(error).__name__
            if why:
                found.append(Misfit(dotted(name), kind, why))
    return found


def _composites(obj: object) -> Iterator[tuple[Name, torch.Tensor]]:
    """Composite tensors with the keys that lead to them. Also finds those in attributes, hooks, gradients and keys."""
    kept: dict[int, object] = {}  # by id; temporary objects must live as long as their ids are used
    stack: list[tuple[Name, Any]] = [((), obj)]
    while stack:
        name, value = stack.pop()
        kind = type(value)
        if kind in _PLAIN or id(value) in kept or issubclass(kind, _NOT_STATE):
            continue
        kept[id(value)] = value
        if issubclass(kind, torch.Tensor):
            if _is_composite(value):
                yield name, value
            if value.is_leaf and value.grad is not None:
                stack.append(((*name, "grad"), value.grad))
            stack.extend((name, part) for part in gc.get_referents(value) if part is not kind)
        elif issubclass(kind, dict):
            for key, child in value.items():
                stack.append(((*name, key_of(key)), child))
                if type(key) not in _PLAIN:
                    stack.append((name, key))
            if kind is not dict:
                stack.append((name, getattr(value, "__dict__", None)))
        elif issubclass(kind, (list, tuple)):
            stack.extend(((*name, number), child) for number, child in enumerate(value) if type(child) not in _PLAIN)
            if kind is not list and kind is not tuple:
                stack.append((name, getattr(value, "__dict__", None)))
        else:
            stack.extend((name, part) for part in gc.get_referents(value))


def _is_composite(tensor: torch.Tensor) -> bool:
    if (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
    ):
        return False
    if tensor.device.type == "meta" or is_fake(tensor):
        return False
    return (
        tensor.layout is not torch.strided
        or tensor.is_nested
        or _is_jagged(tensor)
        or (tensor.is_quantized and tensor.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric))
    )


def _is_jagged(tensor: torch.Tensor) -> bool:
    if tensor.layout is torch.jagged:
        return True
    # A jagged tensor that was made without its constructor can have any layout.
    return any(kind.__module__ == _JAGGED_MODULE for kind in type(tensor).__mro__)


def _kind(tensor: torch.Tensor) -> str:
    if _is_jagged(tensor):
        return "jagged tensor"
    if tensor.is_quantized:
        return "tensor quantized per channel"
    if tensor.is_nested:
        return "nested tensor"
    return f"{str(tensor.layout).removeprefix('torch.')} tensor"


def _misfit(tensor: torch.Tensor) -> str | None:
    """The problem of a tensor, in words; None if there is none. torch may also raise."""
    if _is_jagged(tensor):
        return _jagged(tensor)
    if tensor.is_quantized:
        return _per_channel(tensor)
    if tensor.is_nested:
        return _nested(tensor)
    if tensor.layout is torch.sparse_coo:
        indices, values = _where_it_can_be_checked(tensor._indices(), tensor._values())
        _validate(validate_sparse_coo, indices, values, tensor.size(), tensor.is_coalesced())
    elif tensor.layout in _COMPRESSED:
        by_rows = tensor.layout in _COMPRESSED_BY_ROWS
        compressed = tensor.crow_indices() if by_rows else tensor.ccol_indices()
        plain = tensor.col_indices() if by_rows else tensor.row_indices()
        parts = _where_it_can_be_checked(compressed, plain, tensor.values())
        _validate(validate_sparse_compressed, *parts, tensor.size(), tensor.layout)
    return None


def _where_it_can_be_checked(*parts: torch.Tensor) -> list[torch.Tensor]:
    parts = tuple(part.detach() for part in parts)
    return [part if part.device.type in _CHECKED_IN_PLACE else part.cpu() for part in parts]


def _validate(check: Callable[..., Any], *arguments: Any) -> None:
    try:
        # A check whether memory is pinned would create a context on the device, which a forked worker must not do.
        check(*arguments, check_pinning=False)
    except TypeError:  # torch before 2.8 has no such argument, and makes no such check
        check(*arguments)


def _jagged(tensor: torch.Tensor) -> str | None:
    parts: dict[str, Any] = tensor.__dict__
    values, offsets, lengths = parts.get("_values"), parts.get("_offsets"), parts.get("_lengths")
    ragged = parts.get("_ragged_idx")
    if not isinstance(values, torch.Tensor) or not isinstance(offsets, torch.Tensor):
        return "it has no values or no offsets"
    if values.device.type == "meta" or offsets.device.type == "meta":
        return None
    if type(ragged) is not int or not 1 <= ragged <= values.dim():
        return f"its ragged dimension is {ragged}, of values of {values.dim()} dimensions"
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype not in (torch.int32, torch.int64):
        return f"its offsets are {offsets.dtype} {list(offsets.shape)}"
    if tensor.dim() and tensor.shape[0] != offsets.numel() - 1:
        return f"it has {offsets.numel()} offsets for {tensor.shape[0]} components"
    starts, ends = offsets.detach().cpu()[:-1].long(), offsets.detach().cpu()[1:].long()
    if lengths is not None:
        if not isinstance(lengths, torch.Tensor) or lengths.shape != starts.shape or lengths.is_floating_point():
            return "its lengths are not one integer for each component"
        ends = starts + lengths.detach().cpu().long()
    room = values.shape[ragged - 1]
    if starts.numel() and (bool((starts < 0).any()) or bool((ends < starts).any()) or bool((ends > room).any())):
        return f"its offsets lie outside of its {room} values, or go back"
    return _sequence_lengths(parts.get("_metadata_cache"), ends - starts)


def _sequence_lengths(known: Any, lengths: torch.Tensor) -> str | None:
    """Check the shortest and the longest component against the file's claims: kernels trust those."""
    if not known or not lengths.numel():
        return None
    if not isinstance(known, dict):
        return "what is known of its lengths is no dictionary"
    # A tensor without elements, whose shape holds the number.
    bounds = {key: value.shape[0] if isinstance(value, torch.Tensor) else value for key, value in known.items()}
    least, most = int(lengths.min()), int(lengths.max())
    if not bounds.get("min_seqlen", least) <= least or not bounds.get("max_seqlen", most) >= most:
        return f"its components have {least} to {most} elements, and it says {bounds}"
    return None


def _nested(tensor: torch.Tensor) -> str | None:
    sizes, strides = tensor._nested_tensor_size(), tensor._nested_tensor_strides()
    offsets = tensor._nested_tensor_storage_offsets()
    if not sizes.numel():  # no components
        return None
    if sizes.dim() != 2 or sizes.shape != strides.shape or offsets.shape != sizes.shape[:1]:
        return f"its sizes {list(sizes.shape)}, strides {list(strides.shape)} and offsets {list(offsets.shape)} differ"
    room = tensor.untyped_storage().nbytes() // tensor.element_size()
    for size, stride, offset in zip(sizes.tolist(), strides.tolist(), offsets.tolist(), strict=True):
        dims = list(zip(size, stride, strict=True))
        if offset < 0 or any(n < 0 or step < 0 for n, step in dims):
            return "it has a negative size, stride or offset"
        if all(n for n, _ in dims) and offset + sum((n - 1) * step for n, step in dims) + 1 > room:
            return f"a component of size {size} at {offset} ends outside of its {room} values"
    return None


def _per_channel(tensor: torch.Tensor) -> str | None:
    axis = tensor.q_per_channel_axis()
    if not 0 <= axis < tensor.dim():
        return f"its channels are dimension {axis} of {tensor.dim()}"
    n_channels = tensor.shape[axis]
    scales, zero_points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    if scales.numel() != n_channels or zero_points.numel() != n_channels:
        return f"it has {scales.numel()} scales and {zero_points.numel()} zero points for {n_channels} channels"
    return None
