"""Collectives between processes that each have a test device: "fakeccl", which goes by way of the host and gloo.

    collectives.init(rank, size, tmp_path / "rendezvous")
    mesh = init_device_mesh("fakegpu", (size,))

A collective copies in stream order, on the caller's current stream: the one that FSDP gives it. The host waits for the copy to it. With
NCCL it would not, and be further ahead of its streams than here; what may run beside the copies of a snapshot is the same.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

NAME = "fakeccl"
_TIMEOUT = datetime.timedelta(seconds=120)


def init(rank: int, size: int, rendezvous: Path) -> None:
    """Make it this process's default group. rendezvous: a file that does not exist yet, the same for all ranks."""
    dist.Backend.register_backend(NAME, _Staged, devices=["fakegpu"])
    dist.init_process_group(NAME, store=dist.FileStore(str(rendezvous), size), rank=rank, world_size=size)


def close() -> None:
    """Once no rank calls another any more: whoever leaves early is missed by the others."""
    dist.barrier()
    dist.destroy_process_group()


class _Done(dist.Work):
    """Its tensors have been given to the caller's stream, which is all that the caller of a collective may rely on."""

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        return True


class _Staged(dist.ProcessGroup):
    """What FSDP calls, and no more: another collective is refused by its base class."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)
        options = dist.ProcessGroupGloo._Options()
        options._timeout = _TIMEOUT
        options._devices = [dist.ProcessGroupGloo.create_device(interface="lo", lazy_init=False)]
        self._gloo = dist.ProcessGroupGloo(store, rank, size, options)
        self._name = ""

    def getBackendName(self) -> str:
        return NAME

    # Other groups leave their names to backends in C++, of which this one has none.
    @property
    def group_name(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        pass

    def all_gather_single(self, output: torch.Tensor, own: torch.Tensor, options: Any = None) -> dist.Work:
        parts = torch.empty(self.size(), own.numel(), dtype=own.dtype)
        self._gloo.allgather([list(parts)], [own.cpu().flatten()]).wait()
        output.copy_(parts.view_as(output))
        return _Done()

    def reduce_scatter_single(self, output: torch.Tensor, own: torch.Tensor, options: Any = None) -> dist.Work:
        # gloo knows sums but no averages, and those are what FSDP asks for.
        average = options.reduceOp == dist.ReduceOp.AVG
        how = dist.AllreduceOptions()
        how.reduceOp = dist.ReduceOp.SUM if average else options.reduceOp
        whole = own.cpu()
        self._gloo.allreduce([whole], how).wait()
        if average:
            whole /= self.size()
        output.copy_(whole.view(self.size(), *output.shape)[self.rank()])
        return _Done()

    def barrier(self, opts: Any = None) -> dist.Work:  # torch gives it by this name
        torch.accelerator.synchronize()
        self._gloo.barrier().wait()
        return _Done()
