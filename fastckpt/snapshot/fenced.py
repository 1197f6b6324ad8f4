"""What only an optimizer's next step changes, and whether it has changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # torch built without distributed
    DTensor = None  # type: ignore[assignment,misc]

Fenced = Mapping[int, Sequence[tuple[torch.Tensor, int]]]
"""Address of a storage's bytes → the tensors over it, with their versions at the call of save."""


def fenced_tensors(optimizers: Iterable[torch.optim.Optimizer]) -> Fenced:
    """The parameters and states of optimizers. Takes about a microsecond a tensor.

    torch counts the in-place changes of every tensor: its version. Tensors made under inference_mode count none, those of unknown
    subclasses may hide several storages: such are left out, and so copied before `save` returns.
    """
    found: dict[int, list[tuple[torch.Tensor, int]]] = {}
    for owned in _owned(optimizers):
        tensor = _local(owned)
        if tensor is not None and tensor.layout is torch.strided and not tensor.is_inference():
            found.setdefault(tensor.untyped_storage().data_ptr(), []).append((tensor, tensor._version))
    found.pop(0, None)
    return found


def changed(tensors: Sequence[tuple[torch.Tensor, int]]) -> bool:
    """Whether one of them has another version now, or lies elsewhere."""
    return any(tensor._version != version for tensor, version in tensors)


def _local(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor whose storage is saved: a shard's own, for a DTensor."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    if DTensor is not None and isinstance(tensor, DTensor):
        local: torch.Tensor = tensor._local_tensor
        return local if type(local) is torch.Tensor else None
    return None


def _owned(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
