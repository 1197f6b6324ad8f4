"""Where this process's part of a DTensor lies in the whole, and which ranks hold the same part. Asks nobody: no collectives.

Each dimension of a tensor is cut on its own, by the mesh dimensions that shard it, one after the other. What is left of a dimension is a
list of runs of consecutive indices; the blocks of the local tensor are the products of its dimensions' runs. torch's own
`compute_local_shape_and_global_offset` tells one offset only, and a wrong one where FSDP cuts unevenly what others have cut.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fastckpt.host.torch_names import known_placements, local_of

_Runs = tuple[tuple[int, int], ...]
"""First index and end of stretches of a dimension, in the order in which the local tensor has them."""


class Box(NamedTuple):
    """A block of the global tensor, and where it begins in the local one."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    local_offset: tuple[int, ...]


class _Cut(NamedTuple):
    """What one dimension of the mesh does to one of the tensor."""

    dim: int
    n_parts: int
    part: int
    """This rank's."""
    split_factor: int
    """1, or of a `_StridedShard`: how many parts there are already when it cuts each of them."""


def boxes_of(tensor: Any) -> tuple[Box, ...]:
    """The blocks that this process's local tensor is made of.

    Args:
        tensor: a DTensor.

    Returns:
        One block in most cases. A part without elements is one block with a 0 in its shape; so is that of a rank outside of the mesh.
        () where nobody can tell: placements of an unknown kind, or a local tensor that is not of the shape that they give.

    Raises:
        TypeError: the tensor is a partial sum.
    """
    cuts = _cuts_of(tensor)
    if cuts is None:
        return ()
    shape = tuple(tensor.shape)
    if tensor.device_mesh.get_coordinate() is None:
        nothing = (0,) * len(shape)
        return (Box(nothing, nothing, nothing),)
    return _boxes(shape, cuts, tuple(_local(tensor).shape))


def replica_group(tensor: Any) -> tuple[int, ...]:
    """The ranks, sorted, whose local tensor is the same as this process's; this one is among them. A rank outside of the mesh is alone.

    Args:
        tensor: a DTensor.
    """
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return (torch.distributed.get_rank(),)
    alike = tuple(placement.is_replicate() for placement in tensor.placements)
    return _ranks(mesh, torch.distributed.get_rank(), alike, tuple(coordinate))


@functools.lru_cache(maxsize=64)
def _ranks(mesh: Any, rank: int, alike: tuple[bool, ...], coordinate: tuple[int, ...]) -> tuple[int, ...]:
    """Of a mesh, all along the dimensions that are alike; of the others, those at the coordinate. 0.1 ms, and a state has many tensors.

    rank: this process's. Parts of a mesh that different ranks are in count as equal.
    """
    index = tuple(slice(None) if same else at for same, at in zip(alike, coordinate, strict=True))
    return tuple(sorted(mesh.mesh[index].flatten().tolist()))


def owns_storage(tensor: Any) -> bool:
    """Whether the local tensor is all that its storage is for. FSDP pads the storage of each part to the size of the largest, and the
    padding is nobody's.

    Args:
        tensor: a DTensor whose local tensor is plain: strided, with memory.
    """
    local = _local(tensor)
    if local.storage_offset() or not local.is_contiguous():
        return False
    n_bytes = local.untyped_storage().nbytes()
    if n_bytes == local.nbytes:
        return True
    cuts = None if has_partial_sums(tensor) else _cuts_of(tensor)
    if not cuts or tensor.device_mesh.get_coordinate() is None:
        return False
    sizes = _padded_numels(tuple(tensor.shape), cuts, tuple(local.shape))
    return n_bytes in [size * local.element_size() for size in sizes]


def has_partial_sums(tensor: Any) -> bool:
    """Whether a DTensor's values are only known once the local tensors of several ranks are added up."""
    return any(placement.is_partial() for placement in tensor.placements)


def partial_sum(tensor: Any) -> str:
    """Words for who has brought a DTensor that `has_partial_sums`."""
    return (
        f"a DTensor with placements {tuple(tensor.placements)} is a partial sum: its values are spread over several ranks. "
        "Call redistribute(placements=[Replicate(), …]) first"
    )


def _local(tensor: Any) -> torch.Tensor:
    local = local_of(tensor)
    assert local is not None, f"{type(tensor).__name__} is no DTensor"
    return local


def _cuts_of(tensor: Any) -> tuple[_Cut, ...] | None:
    """Of this rank, in the order of the mesh. None for placements of an unknown kind."""
    if has_partial_sums(tensor):
        raise TypeError(partial_sum(tensor))
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    cuts = []
    for number, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        # Subclasses of Shard by others may cut otherwise.
        if type(placement) not in known_placements():
            return None
        factor = int(getattr(placement, "split_factor", 1))
        part = 0 if coordinate is None else coordinate[number]
        cuts.append(_Cut(placement.dim % len(tensor.shape), mesh.size(number), part, factor))
    return tuple(cuts)


@functools.lru_cache(maxsize=4096)
def _boxes(shape: tuple[int, ...], cuts: tuple[_Cut, ...], local_shape: tuple[int, ...]) -> tuple[Box, ...]:
    if len(shape) != len(local_shape):
        return ()
    by_dim = [[cut for cut in cuts if cut.dim == dim] for dim in range(len(shape))]
    if 0 in local_shape:  # FSDP may leave none of a dimension that it has not cut
        left = [
            [_left_of(size, order(cut)) for size, cut in zip(shape, by_dim, strict=True)]
            for order in (_as_fsdp_cuts, list)
        ]
        empty = next((dims for dims in left if not all(dims)), None)
        if empty is None:
            return ()
        offset = tuple(runs[0][0] if runs else size for size, runs in zip(shape, empty, strict=True))
        return (Box(offset, local_shape, (0,) * len(shape)),)
    dims: list[_Runs] = []
    for size, cut, local_size in zip(shape, by_dim, local_shape, strict=True):
        runs = _runs_that_fit(size, cut, local_size)
        if runs is None:
            return ()
        dims.append(runs)
    found = []
    for blocks in itertools.product(*(_placed(runs) for runs in dims)):
        found.append(
            Box(
                tuple(start for start, _, _ in blocks),
                tuple(stop - start for start, stop, _ in blocks),
                tuple(at for _, _, at in blocks),
            )
        )
    return tuple(found)


def _placed(runs: _Runs) -> Iterator[tuple[int, int, int]]:
    """First index, end, and where the run begins in the local tensor."""
    at = 0
    for start, stop in runs:
        yield start, stop, at
        at += stop - start


def _runs_that_fit(size: int, cuts: Sequence[_Cut], local_size: int) -> _Runs | None:
    """What the cuts leave of a dimension; None if that is not as much as the local tensor has."""
    for order in _orders(cuts):
        runs = _left_of(size, order)
        if _length(runs) == local_size:
            return runs
    return None


def _orders(cuts: Sequence[_Cut]) -> Iterator[list[_Cut]]:
    """In which order the cuts may have been made, the likelier one first. Of cuts of the same sizes both orders leave the same."""
    yield _as_fsdp_cuts(cuts)
    yield list(cuts)


def _as_fsdp_cuts(cuts: Sequence[_Cut]) -> list[_Cut]:
    """A cut with a split factor comes after those of later mesh dimensions that have made so many parts: FSDP cuts what tensor parallelism
    has cut. One whose factor is no such product cuts, where it stands, each of so many stretches.
    """
    order: list[_Cut] = []
    for cut in reversed(cuts):
        n_parts, at = 1, 0
        while n_parts < cut.split_factor and at < len(order):
            n_parts *= order[at].n_parts
            at += 1
        if n_parts == cut.split_factor:
            order.insert(at, cut._replace(split_factor=1))
        else:
            order.insert(0, cut)
    return order


def _left_of(size: int, cuts: Sequence[_Cut]) -> _Runs:
    runs: _Runs = ((0, size),) if size else ()
    for cut in cuts:
        stretches = [_chunk(runs, cut.split_factor, number) for number in range(cut.split_factor)]
        runs = _joined(run for stretch in stretches for run in _chunk(stretch, cut.n_parts, cut.part))
    return runs


def _chunk(runs: _Runs, n_parts: int, part: int) -> _Runs:
    """As torch.chunk cuts: the last parts may be smaller, or empty."""
    length = _length(runs)
    step = -(-length // n_parts)
    begin, end = min(part * step, length), min((part + 1) * step, length)
    found = []
    at = 0
    for start, stop in runs:
        first, last = max(begin - at, 0), min(end - at, stop - start)
        if first < last:
            found.append((start + first, start + last))
        at += stop - start
    return tuple(found)


def _joined(runs: Iterator[tuple[int, int]]) -> _Runs:
    """The same with no run that goes on where the one before ended."""
    found: list[tuple[int, int]] = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _length(runs: _Runs) -> int:
    return sum(stop - start for start, stop in runs)


@functools.lru_cache(maxsize=4096)
def _padded_numels(shape: tuple[int, ...], cuts: tuple[_Cut, ...], local_shape: tuple[int, ...]) -> list[int]:
    """Elements of the largest part that the last cut of a dimension has made beside this one, for each dimension that is cut."""
    if len(shape) != len(local_shape):
        return []
    found = []
    for dim in {cut.dim for cut in cuts}:
        *before, last = _as_fsdp_cuts([cut for cut in cuts if cut.dim == dim])
        largest = _length(_left_of(shape[dim], [*before, last._replace(part=0)]))
        found.append(math.prod([*local_shape[:dim], largest, *local_shape[dim + 1 :]]))
    return found
