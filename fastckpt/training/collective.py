"""Objects whose state only comes about when all ranks meet: refused when the Checkpointer is made, with what to do instead.

A save asks nobody: a rank that is late, or gone, must not keep the others waiting.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from fastckpt.events import logger
from fastckpt.format.tensor_names import dotted
from fastckpt.host.torch_names import sharded_tensor_class
from fastckpt.state.local_state import problems_in


def refusals(name: str, target: Any) -> Iterator[str]:
    """Words for what a Checkpointer cannot save of an object."""
    found = [*_of_classes(name, target)]
    yield from found
    if not found and isinstance(target, (torch.nn.Module, torch.Tensor, dict, list)):
        yield from _of_tensors(name, target)


def _of_classes(name: str, target: Any) -> Iterator[str]:
    fsdp1 = _class("torch.distributed.fsdp", "FullyShardedDataParallel")
    zero = _class("torch.distributed.optim", "ZeroRedundancyOptimizer")
    if any(kind.__module__.split(".")[0] == "deepspeed" for kind in type(target).__mro__):
        yield (
            f"{name!r} is {type(target).__name__} of DeepSpeed, which saves and loads by itself, on all ranks together: use its "
            "save_checkpoint, or FSDP2 (torch.distributed.fsdp.fully_shard) with a torch.optim optimizer"
        )
    if fsdp1 is not None and isinstance(target, torch.nn.Module):
        wrapped = next((path for path, one in target.named_modules() if isinstance(one, fsdp1)), None)
        if wrapped is not None:
            where = f"{dotted((name, wrapped))}" if wrapped else repr(name)
            yield (
                f"{where} is FullyShardedDataParallel (FSDP1), whose state_dict() is a collective: use FSDP2 "
                "(torch.distributed.fsdp.fully_shard)"
            )
    # A wrapper of somebody's has the real one inside.
    inside = getattr(target, "__dict__", {}).get("optimizer")
    if zero is not None and (isinstance(target, zero) or isinstance(inside, zero)):
        yield (
            f"{name!r} is ZeroRedundancyOptimizer, whose state is collected on one rank before it can be saved: use FSDP2 "
            "(torch.distributed.fsdp.fully_shard), which shards an optimizer's state with its parameters"
        )


def _of_tensors(name: str, target: Any) -> list[str]:
    """Of what can be seen without a save. Modules may make ShardedTensors for their state dicts alone (torchrec's do)."""
    state = target
    if isinstance(target, torch.nn.Module):
        if sharded_tensor_class() is None:
            return []
        try:
            state = target.state_dict()
        except Exception as error:  # the save will say so
            logger.info("%r cannot say yet what its state is: %s: %s", name, type(error).__name__, error)
            return []
    return problems_in(state, (name,))


def _class(module: str, name: str) -> Any:
    """None where no program has imported it: then there are no such objects."""
    return getattr(sys.modules.get(module), name, None)
