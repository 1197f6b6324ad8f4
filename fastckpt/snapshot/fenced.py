"""Tensors that only an optimizer's next step changes, and whether they have changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from fastckpt.host.torch_names import local_of, version_of
from fastckpt.state.sharding import owns_storage


class FencedTensors:
    """The parameters and states of optimizers, with their versions at the call of save. Takes about a microsecond a tensor.

    torch counts the in-place changes of every tensor: its version. Left out are tensors made under inference_mode (they have no version),
    tensors of unknown subclasses (they may hide several storages), and storages that optimizers own only in part. These are copied before
    `save` returns.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer] = ()) -> None:
        self._tensors: list[torch.Tensor] = []
        self._addresses: list[int] = []
        """The address of each tensor's storage."""
        in_part: set[int] = set()
        for owned in _owned(optimizers):
            tensor = _local(owned)
            if (
                tensor is not None
                and tensor.layout is torch.strided
                and not tensor.is_nested
                and not tensor.is_inference()
            ):
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
                if address:
                    self._tensors.append(tensor)
                    self._addresses.append(address)
                    if owned is not tensor:  # what is done to a DTensor counts for itself, not for its local tensor
                        self._tensors.append(owned)
                        self._addresses.append(address)
                    if not _owns_storage(owned, tensor, storage.nbytes()):
                        in_part.add(address)
        self._versions = [version_of(tensor) for tensor in self._tensors]
        self.addresses = set(self._addresses)
        if in_part:
            self.keep_only([*self.addresses - self._shared(in_part)])

    def _shared(self, in_part: set[int]) -> set[int]:
        """Addresses of storages that optimizers own only in part: a buffer may share the storage of a parameter, but has its own
        version.
        """
        owned: dict[int, list[torch.Tensor]] = {address: [] for address in in_part}
        for tensor, address in zip(self._tensors, self._addresses, strict=True):
            if address in in_part and local_of(tensor) is None:
                owned[address].append(tensor)
        return {address for address, tensors in owned.items() if not _cover(tensors)}

    def keep_only(self, addresses: Sequence[int]) -> None:
        """Watch only storages at these addresses: those that are saved."""
        saved = set(addresses)
        if self.addresses <= saved:
            return
        kept = [n for n, address in enumerate(self._addresses) if address in saved]
        self._tensors = [self._tensors[n] for n in kept]
        self._addresses = [self._addresses[n] for n in kept]
        self._versions = [self._versions[n] for n in kept]
        self.addresses &= saved

    def changed(self) -> int | None:
        """The address of a storage whose tensor has another version now; None if there is none."""
        versions = [version_of(tensor) for tensor in self._tensors]
        if versions == self._versions:
            return None
        return next(a for a, now, then in zip(self._addresses, versions, self._versions, strict=True) if now != then)


def _owns_storage(owned: torch.Tensor, tensor: torch.Tensor, n_bytes: int) -> bool:
    """Whether a tensor is all of a storage. FSDP pads the storages of uneven shards; nobody else has anything there."""
    if tensor.nbytes == n_bytes and tensor.is_contiguous():
        return True
    return owned is not tensor and owns_storage(owned)


def _cover(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors of one storage cover all of its bytes."""
    end = 0
    for start, stop in sorted(_stretch(tensor) for tensor in tensors):
        if start > end:
            return False
        end = max(end, stop)
    return end >= tensors[0].untyped_storage().nbytes()


def _stretch(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte and end of a tensor in its storage; (0, 0) if its elements leave gaps. Their order does not matter."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return 0, 0
        expected *= size
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + int(tensor.nbytes)


def _local(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor whose storage is saved: for a DTensor the local shard."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    local = local_of(tensor)
    return local if type(local) is torch.Tensor else None


def _owned(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    """The parameters, and the state tensors of each parameter. Other content of the state (named counters, lists, tensors of the
    optimizer's own) has no reliable form, and is copied first.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from (value for value in group["params"] if isinstance(value, torch.Tensor))
        for key, state in optimizer.state.items():
            if isinstance(key, torch.Tensor) and isinstance(state, Mapping):
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))
