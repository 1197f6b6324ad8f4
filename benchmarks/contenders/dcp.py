"""torch.distributed.checkpoint in one process. The writer fsyncs its files; the directories are added here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from benchmarks.contenders.base import Contender, State, fsync_tree, nothing_to_wait_for

# With one thread, the default, DCP writes one file; more threads write one file each.
WRITER: dict[str, Any] = {"sync_files": True, "single_file_per_rank": True, "thread_count": 1}


class Dcp(Contender):
    settings = {"writer": WRITER, "save": "dcp.save(no_dist=True)", "load": "into tensors allocated by the load, as everybody"}
    note = "container types change"

    def version(self) -> str:
        return str(torch.__version__)

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        dcp.save(state, storage_writer=FileSystemWriter(directory / "dcp", **WRITER), no_dist=True)
        fsync_tree(directory)
        return nothing_to_wait_for

    def load(self, directory: Path) -> State:
        # What dcp.format_utils.dcp_to_torch_save uses: the only way to load without a state of the same form at hand.
        state: State = {}
        reader = FileSystemReader(directory / "dcp")
        _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)  # type: ignore[no-untyped-call]
        return state


class DcpAsync(Dcp):
    asynchronous = True
    settings = {
        "writer": {**WRITER, "cache_staged_state_dict": True},
        "save": "dcp.async_save(thread), gloo group of one process; the staging buffers are kept for the next save",
    }

    def __init__(self) -> None:
        self.writer: FileSystemWriter | None = None

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        if not dist.is_initialized():
            rendezvous = Path(tempfile.mkdtemp(prefix="bench-gloo-")) / "store"
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
        if self.writer is None:
            self.writer = FileSystemWriter(directory / "dcp", **WRITER, cache_staged_state_dict=True)
        # The path moves with checkpoint_id; the writer, and with it the buffers, stays.
        future = dcp.async_save(state, checkpoint_id=directory / "dcp", storage_writer=self.writer)

        def wait() -> None:
            future.result()  # type: ignore[union-attr]
            fsync_tree(directory)

        return wait
