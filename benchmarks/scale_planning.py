"""What one rank of thousands computes before it saves: names, boxes, who writes which bytes. In a fake process group, which has no others.

python -m benchmarks.scale_planning RANKS hsdp|replicated TENSORS      # prints JSON
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import measure

RANKS_OF_A_NODE = 8
SHAPE = (64, 32)
"""Of one tensor, whole: what is measured depends on their number."""


def state_of(layout: str, n_tensors: int) -> dict[str, Any]:
    if layout == "replicated":
        return {f"layers.{number}.weight": torch.zeros(SHAPE) for number in range(n_tensors)}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // RANKS_OF_A_NODE, RANKS_OF_A_NODE), mesh_dim_names=("replicate", "shard"))
    return {
        f"layers.{number}.weight": DTensor.from_local(
            torch.zeros(SHAPE[0] // RANKS_OF_A_NODE, SHAPE[1]), mesh, (Replicate(), Shard(0)), run_check=False
        )
        for number in range(n_tensors)
    }


def plan(size: int, layout: str, n_tensors: int) -> dict[str, Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from fastckpt.training.live_state import LiveState

    dist.init_process_group("fake", rank=size // 3, world_size=size, store=FakeStore())
    began_s = time.perf_counter()
    state = state_of(layout, n_tensors)
    made_s = time.perf_counter() - began_s
    live = LiveState({"model": state}, sampled=False, replicated=("model",) if layout == "replicated" else ())
    span = measure.Span()
    times = []
    for _ in range(3):
        began_s = time.perf_counter()
        captured, _ = live.look()
        times.append(time.perf_counter() - began_s)
    return {
        "ranks": size,
        "layout": layout,
        "tensors": n_tensors,
        "rows of the directory": len(captured.tensors),
        "storages that others share": len(captured.shares),
        "owners": len({share.rank for shares in captured.shares.values() for share in shares}),
        "first save, seconds": round(times[0], 3),
        "later saves, seconds": round(min(times[1:]), 3),
        "memory, bytes": span.peak(),
        "making the state, seconds": round(made_s, 1),
    }


if __name__ == "__main__":
    print(json.dumps(plan(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
