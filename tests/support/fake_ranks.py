"""One process that plays a rank of a world of any size, and a rank whose Checkpointers know of no other one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
import torch.distributed.tensor.debug as tensor_debug
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastckpt.ranks.world import ALONE


@contextlib.contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """Everything inside runs as this rank, in torch's fake process group. What collectives give back is nobody's data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of meshes and of gloo
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            yield
        finally:
            dist.destroy_process_group()
            _forget_results()


@contextlib.contextmanager
def each_on_its_own() -> Iterator[None]:
    """Checkpointers inside save and restore what one rank has, as if it were the only one, each in a repository of its own."""
    with mock.patch("fastckpt.training.checkpointer.current_world", return_value=ALONE):
        yield


def _forget_results() -> None:
    """torch remembers them with the mesh, and so with the coordinate, of the rank that came first."""
    for name in ("_clear_python_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
        getattr(tensor_debug, name, lambda: None)()
    propagate: Any = DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding
    with contextlib.suppress(AttributeError):  # until 2.9 or so
        propagate.cache.cache_clear()
