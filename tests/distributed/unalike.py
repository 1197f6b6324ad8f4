"""What each of several ranks does in test_no_mixture.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastckpt


def save_then_restore_spread(url: str, differs: bool) -> str:
    """Plain modules, without DistributedDataParallel; then FSDP2 on as many ranks. What the restore says."""
    model = nn.Linear(3, 4)
    nn.init.constant_(model.weight, 1 + differs * dist.get_rank())
    nn.init.constant_(model.bias, 1)
    with fastckpt.Checkpointer(url, {"model": model}, every=None, spot=None) as ckpt:
        ckpt.save_now(1).wait()
    live = nn.Linear(3, 4)
    nn.init.zeros_(live.weight)
    fully_shard(live, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with fastckpt.Checkpointer(url, {"model": live}, every=None, spot=None, read_only=True) as ckpt:
        try:
            ckpt.restore()
        except fastckpt.CheckpointError as error:
            assert not torch.any(live.state_dict()["weight"].to_local())
            return str(error)
    return str(live.state_dict()["weight"].to_local().unique().tolist())
