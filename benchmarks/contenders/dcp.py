"""torch.distributed.checkpoint in one process. The writer fsyncs its files; the directories are added here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks.contenders.base import Contender, State, fsync_tree, nothing_to_wait_for

# One thread is the default, and the better choice: two took 1.50 s instead of 0.92 s for 505 MB on two cores.
WRITER: dict[str, Any] = {"sync_files": True, "single_file_per_rank": True, "thread_count": 1}


class Dcp(Contender):
    settings = {
        "writer": WRITER,
        "save": "dcp.save(no_dist=True)",
        "load": "into tensors allocated by the load, as everybody",
    }

    def version(self) -> str:
        return str(torch.__version__)

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        save(state, storage_writer=FileSystemWriter(directory / "dcp", **WRITER), no_dist=True)
        fsync_tree(directory)
        return nothing_to_wait_for

    def load(self, directory: Path) -> State:
        # What dcp.format_utils.dcp_to_torch_save uses: the only way to load without a state of the same form at hand.
        state: State = {}
        reader = FileSystemReader(directory / "dcp")
        _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        return state


class DcpAsync(Dcp):
    asynchronous = True
    settings = {
        "writer": WRITER,
        "save": "dcp.async_save(thread), gloo group of one process, DefaultStager kept for the next save",
    }

    def __init__(self) -> None:
        # Without a GPU there is no pinned memory and no asynchronous staging. Of the two stagers that remain this one
        # keeps its buffers: durable after 1.2 s instead of 2.1 s (the writer's own stager) for 505 MB.
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self.stager = DefaultStager(options)

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        if not dist.is_initialized():
            rendezvous = Path(tempfile.mkdtemp(prefix="bench-gloo-")) / "store"
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
        writer = FileSystemWriter(directory / "dcp", **WRITER)
        future = async_save(state, storage_writer=writer, async_stager=self.stager)
        assert isinstance(future, Future)  # the other answer belongs to asynchronous staging

        def wait() -> None:
            future.result()
            fsync_tree(directory)

        return wait
