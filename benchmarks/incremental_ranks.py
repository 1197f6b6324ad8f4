"""What one rank of benchmarks/incremental_layouts.py does: train, save, restore on this layout, save again. A model under FSDP2, over gloo.

python -m benchmarks.incremental_ranks ABOUT '{"ranks": 4, "do": ["restore", "save 11", …]}' OUT
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks import incremental_states as states
from benchmarks.processes import answer, enter_rank


def one_rank(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Do what is asked; for each save what it took."""
    import torch.distributed as dist

    import fastckpt
    from benchmarks.incremental_reader import without_deltas
    from benchmarks.resharding_ranks import Training

    if given["ranks"] > 1:
        dist.init_process_group("gloo")
    training = Training("FSDP2" if given["ranks"] > 1 else "plain", given["size"])
    training.train(1)  # an optimizer has its state before it is restored
    folder, found = Path(given["folder"]), []
    options = None if given["deltas"] else without_deltas()
    state = {"model": training.model, "optimizer": training.optimizer}
    with fastckpt.Checkpointer(folder, state, every=None, spot=None, options=options) as checkpointer:
        for asked in given["do"]:
            verb, _, number = asked.partition(" ")
            if verb == "restore":
                checkpointer.restore(int(number) if number else "latest")
                continue
            training.train(given["steps"])
            if given["ranks"] > 1:
                dist.barrier()
            before = states.files(folder)
            if given["ranks"] > 1:
                dist.barrier()
            cpu, began = time.process_time(), time.perf_counter()
            handle = checkpointer.save_now(int(number))
            called = time.perf_counter() - began
            checkpointer.fence()
            fenced = time.perf_counter() - began
            handle.wait()
            done = {"called": called, "stall": fenced, "cpu_s": time.process_time() - cpu}
            checkpointer.wait()
            if given["ranks"] > 1:
                dist.barrier()
            found.append({"step": int(number), **done, **states.added(before, states.files(folder))})
    return found


def job(given: dict[str, Any]) -> dict[str, Any]:
    """All ranks, each in a process of its own; rank 0 is this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        given = {**given, "port": probe.getsockname()[1]}
    command = [sys.executable, "-m", "benchmarks.incremental_ranks"]
    others = [
        subprocess.Popen([*command, str(rank), json.dumps(given), os.devnull], cwd=ROOT)
        for rank in range(1, given["ranks"])
    ]
    try:
        if given["ranks"] > 1:
            enter_rank(0, given)
        return {"saves": one_rank(given)}
    finally:
        for other in others:
            other.wait()


def main(about: str, text: str, out: str) -> None:
    """about: for messages; or the number of another rank than 0. text: what is asked, as JSON."""
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    given = json.loads(text)
    if about.isdigit():
        enter_rank(int(about), given)
        one_rank(given)
        os._exit(0)
    answer(job(given), before, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
