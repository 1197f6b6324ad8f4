"""torch.distributed.checkpoint.async_save in one process, thread-based, its buffers kept from save to save."""

from __future__ import annotations

import functools
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save

from benchmarks.contenders.base import fsync_tree
from benchmarks.contenders.dcp import WRITER
from benchmarks.savers.base import EVERY, Saver
from benchmarks.workloads.gpt import Training


class Dcp(Saver):
    async_staging = False
    settings = {
        "writer": WRITER,
        "save": "async_save(thread), gloo group of one process, DefaultStager kept for the next save: copies before it returns",
        "contract": "the save before is waited for before the next one, as its tutorial does: it owns the buffers",
        "durable": "the future, then fsync of the directories",
    }

    def version(self) -> str:
        return str(torch.__version__)

    def open(self, training: Training, directory: Path) -> None:
        self._training, self._directory = training, directory
        if not dist.is_initialized():
            rendezvous = Path(tempfile.mkdtemp(prefix="bench-gloo-")) / "store"
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
        # Pinned memory and non-blocking copies need a GPU.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=self.async_staging,
                use_non_blocking_copy=False,
            )
        )
        self._staging: Future[None] | None = None
        self._upload: Future[Any] | None = None

    def before_update(self) -> None:
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.result()

    def after_step(self, number: int) -> None:
        if number % EVERY:
            return
        called = time.perf_counter()
        if self._upload is not None:
            self._upload.result()
        place = self._directory / str(number)
        answer = async_save(
            self._training.state(),
            storage_writer=FileSystemWriter(place, **WRITER),
            async_checkpointer_type=AsyncCheckpointerType.THREAD,
            async_stager=self._stager,
        )
        if isinstance(answer, AsyncSaveResponse):
            self._staging, self._upload = answer.staging_completion, answer.upload_completion
        else:
            self._upload = answer
        self._upload.add_done_callback(functools.partial(self._saved, number, called))

    def _saved(self, number: int, called: float, future: Future[Any]) -> None:
        """On the thread that saved."""
        if future.exception() is None:
            fsync_tree(self._directory)
            self.note_durable(number, called)

    def drain(self) -> None:
        self.before_update()
        if self._upload is not None:
            self._upload.result()
            while not self._upload.done() or len(self.durable) < self._expected():
                time.sleep(0.01)  # `result` returns before the callbacks have run

    def _expected(self) -> int:
        return sum(1 for place in self._directory.iterdir() if place.is_dir())


class DcpAsyncStaging(Dcp):
    async_staging = True
    settings = {
        **Dcp.settings,
        "save": "as dcp, with use_async_staging: a thread copies, while forward and backward run",
        "contract": "staging_completion is waited for before the optimizer's step; the save before, before the next one",
    }
    note = "documented as 'requires CUDA'; on the CPU it works, and is its best"
