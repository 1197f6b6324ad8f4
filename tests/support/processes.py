"""Real ranks: processes that meet over gloo and run one function."""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock


def run_ranks(world: int, function: Callable[[int, int, Path], None], folder: Path, timeout_s: float = 120.0) -> None:
    """function(rank, world, folder) in each of so many processes. AssertionError with the traceback of every one that raised."""
    context = multiprocessing.get_context("spawn")
    # Two threads in each of four processes on two cores take three times as long as one.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        processes = [context.Process(target=_run, args=(rank, world, function, folder)) for rank in range(world)]
        for process in processes:
            process.start()
    try:
        for process in processes:
            process.join(timeout_s)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    words = "\n".join(path.read_text() for path in sorted(folder.glob("error*")))
    assert codes == [0] * world, words


def _run(rank: int, world: int, function: Callable[[int, int, Path], None], folder: Path) -> None:
    import torch.distributed as dist

    warnings.simplefilter("ignore")  # torch's own, of gloo and meshes
    try:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", meeting, timeout=timedelta(seconds=60), rank=rank, world_size=world)
        function(rank, world, folder)
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error{rank}").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)  # nobody waits for the others here
