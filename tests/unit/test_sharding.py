"""Which blocks of the whole a DTensor's local part is: told for every rank, and compared with what torch has put there."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from fastckpt.state import sharding
from fastckpt.state.sharding import Box, boxes_of, owns_storage, replica_group
from tests.support.fake_ranks import as_rank

LOCALLY: dict[str, Any] = (
    {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}
)
"""Each rank cuts its own part: nothing is scattered, so that the fake group's ranks hold what real ones would."""
needs_local = pytest.mark.skipif(not LOCALLY, reason="this torch always scatters from rank 0")


def numbered(*shape: int) -> torch.Tensor:
    """Each element is its own number."""
    return torch.arange(int(torch.Size(shape).numel()), dtype=torch.float32).view(shape)


def check(whole: torch.Tensor, tensor: Any) -> tuple[Box, ...]:
    """The boxes of a DTensor, which have to be those blocks of `whole`, and all of the local tensor."""
    local, boxes = tensor.to_local(), boxes_of(tensor)
    assert boxes
    left = torch.ones(local.shape, dtype=torch.bool)
    for box in boxes:
        if local.dim() != whole.dim():  # a rank outside of the mesh
            assert not local.numel()
            assert 0 in box.shape
            continue
        there = tuple(slice(at, at + n) for at, n in zip(box.local_offset, box.shape, strict=True))
        here = tuple(slice(at, at + n) for at, n in zip(box.offset, box.shape, strict=True))
        assert torch.equal(local[there], whole[here])
        assert left[there].all(), "no two boxes have the same element"
        left[there] = False
    assert local.dim() != whole.dim() or not left.any()
    return boxes


MESHES: dict[int, list[tuple[int, ...]]] = {2: [(2,)], 3: [(3,)], 4: [(4,), (2, 2)], 8: [(8,), (2, 4), (4, 2), (2, 2, 2)]}  # fmt: skip


def layouts(n_mesh: int, n_dims: int) -> Iterator[list[Any]]:
    return (list(one) for one in itertools.product([Replicate(), *map(Shard, range(n_dims))], repeat=n_mesh))


@needs_local
@pytest.mark.parametrize("world", sorted(MESHES))
def test_boxes_are_what_torch_puts_there(world: int) -> None:
    """Over 5 s on a busy machine: every rank of every mesh."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for rank in range(world):
        with as_rank(rank, world):
            for shape in MESHES[world]:
                mesh = init_device_mesh("cpu", shape)
                for whole in (numbered(7, 5), numbered(8), numbered(1, 16), numbered(0, 3)):
                    for placements in layouts(len(shape), whole.dim()):
                        tensor = distribute_tensor(whole, mesh, placements, **LOCALLY)
                        boxes = check(whole, tensor)
                        sizes, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
                        assert [(box.shape, box.offset) for box in boxes] == [(tuple(sizes), tuple(offset))]


def test_scalars_are_one_block() -> None:
    with as_rank(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        assert boxes_of(distribute_tensor(torch.tensor(1.0), mesh, [Replicate()])) == (Box((), (), ()),)


@needs_local
def test_parts_together_are_the_whole_and_replicas_are_alike() -> None:
    whole = numbered(7, 5)
    for placements in layouts(2, 2):
        parts: dict[tuple[int, ...], tuple[Box, ...]] = {}
        for rank in range(4):
            with as_rank(rank, 4):
                tensor = distribute_tensor(whole, init_device_mesh("cpu", (2, 2)), placements, **LOCALLY)
                group = replica_group(tensor)
                assert rank in group
                assert parts.setdefault(group, boxes_of(tensor)) == boxes_of(tensor)
        assert sorted(rank for group in parts for rank in group) == [0, 1, 2, 3]
        seen = torch.zeros(7, 5)
        for box in itertools.chain.from_iterable(parts.values()):
            seen[tuple(slice(at, at + n) for at, n in zip(box.offset, box.shape, strict=True))] += 1
        assert torch.equal(seen, torch.ones(7, 5))


@needs_local
def test_meshes_of_some_ranks() -> None:
    whole = numbered(5, 2)
    for rank in range(4):
        with as_rank(rank, 4):
            tensor = distribute_tensor(whole, DeviceMesh("cpu", [1, 3]), [Shard(0)], **LOCALLY)
            if rank in (1, 3):
                check(whole, tensor)
            else:
                assert boxes_of(tensor) == (Box((0, 0), (0, 0), (0, 0)),)
            assert replica_group(tensor) == (rank,)
            part = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["dp"]
            replicated = distribute_tensor(whole, part, [Replicate()], **LOCALLY)
            assert replica_group(replicated) == ((0, 2) if rank in (0, 2) else (1, 3))


class Two(nn.Module):
    def __init__(self, n_in: int, n_hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(n_in, n_hidden), nn.Linear(n_hidden, n_in)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(numbered(*parameter.shape))


@pytest.mark.parametrize("world", [2, 3, 4, 8])
@pytest.mark.parametrize("hybrid", [False, True])
def test_fsdp_parameters_and_their_padding(world: int, hybrid: bool) -> None:
    if hybrid and world % 2:
        pytest.skip("two replicas of one shard need an even number of ranks")
    for rank in range(world):
        with as_rank(rank, world):
            shape, names = ((2, world // 2), ("r", "s")) if hybrid else ((world,), ("s",))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            whole = dict(Two(3, 5).named_parameters())
            model = Two(3, 5)
            fully_shard(model, mesh=mesh)
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor)
                check(whole[name].data, parameter.detach())
                assert owns_storage(parameter)
                other = (rank + world // 2) % world
                assert replica_group(parameter) == ((min(rank, other), max(rank, other)) if hybrid else (rank,))


@pytest.mark.skipif("src_data_rank" not in inspect.signature(parallelize_module).parameters, reason="always scatters")
@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (4, 2), (2, 4), (3, 2)])
def test_fsdp_over_tensor_parallelism_uneven_and_empty(dp: int, tp: int) -> None:
    """Over 5 s on a busy machine: three models for each of up to 8 ranks."""
    world = dp * tp
    for rank in range(world):
        with as_rank(rank, world):
            mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
            for n_hidden in (16, 9, 5):
                whole = {name: p.data.clone() for name, p in Two(8, n_hidden).named_parameters()}
                model = Two(8, n_hidden)
                plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
                parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
                fully_shard(model, mesh=mesh["dp"])
                for name, parameter in model.named_parameters():
                    assert isinstance(parameter, DTensor)
                    boxes = check(whole[name], parameter.detach())
                    assert len(boxes) == 1
                    assert owns_storage(parameter)


def reference(shape: Sequence[int], mesh: Sequence[int], at: Sequence[int], placements: Sequence[Any]) -> torch.Tensor:
    """This rank's part of a numbered tensor, cut by torch.chunk, placement by placement."""
    part = numbered(*shape)

    def chunks(tensor: torch.Tensor, n: int, dim: int) -> list[torch.Tensor]:
        found = list(torch.chunk(tensor, n, dim))
        return found + [tensor.narrow(dim, 0, 0)] * (n - len(found))

    for number, placement in enumerate(placements):
        if not isinstance(placement, Replicate):
            first = chunks(part, int(getattr(placement, "split_factor", 1)), placement.dim)
            cut = [chunks(one, mesh[number], placement.dim)[at[number]] for one in first]
            part = torch.cat(cut, placement.dim)
    return part


@given(st.data())
def test_any_layout(data: st.DataObject) -> None:
    """Placements in the order of the mesh, strided ones with any factor: several runs are several boxes."""
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    mesh = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    at = [data.draw(st.integers(0, n - 1)) for n in mesh]
    dims = st.integers(0, len(shape) - 1)
    # As torch applies them where no later mesh dimension explains the factor: the same dimension is cut once by a strided one, at last.
    taken: set[int] = set()
    placements: list[Any] = []
    for _ in mesh:
        dim = data.draw(dims)
        strided = dim not in taken and data.draw(st.booleans())
        if dim in taken or data.draw(st.booleans()):
            placements.append(Replicate())
        else:
            placements.append(_StridedShard(dim, split_factor=data.draw(st.integers(2, 4))) if strided else Shard(dim))
            taken.add(dim)
    local, whole = reference(shape, mesh, at, placements), numbered(*shape)
    cuts = tuple(
        sharding._Cut(p.dim, mesh[n], at[n], int(getattr(p, "split_factor", 1)))
        for n, p in enumerate(placements)
        if not isinstance(p, Replicate)
    )
    boxes = sharding._boxes(tuple(shape), cuts, tuple(local.shape))
    assert boxes
    assert sum(torch.Size(box.shape).numel() for box in boxes) == local.numel()
    for box in boxes:
        there = tuple(slice(start, start + n) for start, n in zip(box.local_offset, box.shape, strict=True))
        here = tuple(slice(start, start + n) for start, n in zip(box.offset, box.shape, strict=True))
        assert torch.equal(local[there], whole[here])


def test_a_part_of_a_larger_buffer_does_not_own_it() -> None:
    with as_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))

        def around(local: torch.Tensor) -> DTensor:
            return DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([7]), stride=(1,))

        assert owns_storage(around(torch.zeros(4)))
        for local in (torch.zeros(9)[:4], torch.zeros(8)[4:], torch.zeros(8)[::2]):
            assert not owns_storage(around(local))


def test_a_strided_shard_of_its_own_is_several_boxes() -> None:
    with as_rank(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        local = torch.tensor([2.0, 3.0, 6.0, 7.0])
        tensor = DTensor.from_local(local, mesh, [_StridedShard(0, split_factor=2)], shape=torch.Size([8]), stride=(1,))
        assert boxes_of(tensor) == (Box((2,), (2,), (0,)), Box((6,), (2,), (2,)))


def test_the_place_of_a_local_tensor_of_another_shape_is_not_known() -> None:
    with as_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        tensor = DTensor.from_local(torch.zeros(3), mesh, [Shard(0)], shape=torch.Size([4]), stride=(1,))
        assert boxes_of(tensor) == ()


def test_partial_sums_are_refused() -> None:
    with as_rank(0, 2):
        tensor = DTensor.from_local(torch.zeros(3), init_device_mesh("cpu", (2,)), [Partial()])
        with pytest.raises(TypeError, match="partial sum"):
            boxes_of(tensor)


def test_a_long_dimension_takes_no_memory() -> None:
    cuts = (sharding._Cut(0, 8, 3, 1),)
    assert sharding._boxes((1 << 40,), cuts, (1 << 37,)) == (Box((3 << 37,), (1 << 37,), (0,)),)
