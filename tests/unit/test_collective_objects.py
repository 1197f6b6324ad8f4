"""What needs all ranks at once to be saved is refused when the Checkpointer is made, with what to do instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial

from fastckpt import Checkpointer
from fastckpt.store.memory import MemoryStore
from tests.support.fake_ranks import as_rank, each_on_its_own

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, of torch.jit
    from torch.distributed.optim import ZeroRedundancyOptimizer


@pytest.fixture(autouse=True)
def rank() -> Iterator[None]:
    with as_rank(0, 2), each_on_its_own():
        yield


def refused(**state: Any) -> str:
    with pytest.raises(TypeError) as error:
        Checkpointer(MemoryStore(), state, every=None, spot=None)
    return str(error.value)


def fsdp1() -> nn.Module:
    return FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))


def deepspeed(base: type, *arguments: Any) -> Any:
    return type("DeepSpeedEngine", (base,), {"__module__": "deepspeed.runtime.engine"})(*arguments)


class Holder:
    """As accelerate's: an optimizer in an attribute."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> Any:
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def parameters() -> Any:
    return nn.Linear(2, 2).parameters()


def sharded() -> Any:
    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    return sharded_tensor.empty(spec, 4, 2)


class Table(nn.Linear):
    """Makes its ShardedTensors for the state dict alone, as torchrec does."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        hook: Any = lambda module, state, prefix, _: state.update({prefix + "table": sharded()})  # noqa: E731
        self.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fsdp1, ["'x' is FullyShardedDataParallel (FSDP1), whose state_dict() is a collective: use FSDP2"]),
        (lambda: nn.Sequential(nn.Linear(1, 1), fsdp1()), ["x.1 is FullyShardedDataParallel"]),
        (lambda: ZeroRedundancyOptimizer(parameters(), torch.optim.SGD, lr=0.1), ["'x' is ZeroRedundancyOptimizer"]),
        (
            lambda: Holder(ZeroRedundancyOptimizer(parameters(), torch.optim.SGD, lr=0.1)),
            ["'x' is ZeroRedundancyOptimizer"],
        ),
        (lambda: deepspeed(nn.Linear, 1, 1), ["'x' is DeepSpeedEngine of DeepSpeed", "save_checkpoint"]),
        (lambda: deepspeed(torch.optim.SGD, parameters(), 0.1), ["'x' is DeepSpeedEngine of DeepSpeed"]),
        (lambda: {"t": [sharded()]}, ["x.t.0 is a ShardedTensor", "use DTensor"]),
        (lambda: nn.Sequential(Table()), ["x.0.table is a ShardedTensor"]),
        (
            lambda: {"p": DTensor.from_local(torch.zeros(2), init_device_mesh("cpu", (2,)), [Partial()])},
            ["x.p: a DTensor with placements (Partial(sum),) is a partial sum", "redistribute"],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_it_is_refused_in_words(make: Callable[[], Any], words: list[str]) -> None:
    found = refused(x=make(), y=5)
    for one in words:
        assert one in found
    assert "'y' is int" in found, "all problems are listed"


def test_what_is_rank_local_is_taken() -> None:
    """FSDP2, and plain parts as Megatron keeps them."""
    model = nn.Sequential(nn.Linear(2, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    state = {"fsdp2": model, "optim": torch.optim.AdamW(model.parameters()), "part": nn.Linear(2, 2)}
    with Checkpointer(MemoryStore(), state, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
