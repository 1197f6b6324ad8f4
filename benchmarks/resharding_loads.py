"""Loads of a checkpoint onto other layouts, by several contenders in turn: seconds, processor seconds, bytes read, memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.processes import enter_rank
from benchmarks.tables import cell

SAVED = ("FSDP2", 4)
LAYOUTS = (("FSDP2", 2), ("FSDP2", 3), ("TP", 2), ("plain", 1))
QUICK_SAVED, QUICK_LAYOUTS = ("FSDP2", 2), (("TP", 2),)
READ_BAR = 1.05
"""Of the bytes that fastckpt reads, in stored bytes of the chunks that hold what is needed."""
LIMIT_S = 600.0
ABOUT = f"""\
A GPT with fp32 AdamW, saved by {SAVED[1]} ranks under {SAVED[0]}, is loaded into a model and an optimizer that live under another layout.
Contenders take turns in the same processes; all files are in the page cache. Medians (smallest–largest). What each has put in place is
compared, and is the same.

* seconds: of the slowest rank, from its call until the values are in its tensors. For fastckpt: a Checkpointer is made, and restores.
* fastckpt verifies all that it reads (checksums of stored bytes, digests of decoded ones), and changes no tensor before all is there:
  hence its memory. dcp (`torch.distributed.checkpoint.load`) and torch_checkpointing (its DefaultResharder) verify nothing, and store raw
  bytes. torch_checkpointing is at 0.1.1 written for GPUs: one exchange of its save was replaced, its load is as it is.
* floor: reads what is needed of fastckpt's stored bytes, and copies the raw bytes once into the tensors. No decoding, no verifying.
* read: by read calls of all ranks, indexes too. needed, raw: the tensors of all ranks. needed, stored: the chunks that hold these, once for
  each rank; of raw files, the raw bytes. estimate: needed, raw × (stored ÷ raw bytes of the whole checkpoint): as if chunks could be cut.
* The optimizer has its state before, as the others fill it; fastckpt puts new tensors in its place, and pays for their pages.
* peak memory: above what was there before, of the rank with most."""

Row = dict[str, Any]


def loads(folder: str | None, quick: bool) -> list[Row]:
    """Measure, and return the rows of the table.

    Args:
        folder: where the checkpoints are written meanwhile (1 GB); None: the system's place for such files.
        quick: a small model, fewer ranks, one layout and one round: tries the benchmark itself.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        settings = {"folder": name, "size": "tiny" if quick else "21m", "steps": 1 if quick else 12}
        settings["rounds"] = 1 if quick else 5
        saved = run_job(*(QUICK_SAVED if quick else SAVED), "save", settings)
        measure.warm(Path(name))
        packs = sum(path.stat().st_size for path in (Path(name) / "fastckpt").rglob("*.pack"))
        ratio = packs / sum(one["raw_bytes"] for one in saved)
        rows = []
        for kind, n in QUICK_LAYOUTS if quick else LAYOUTS:
            answers = run_job(kind, n, "load", {**settings, "absent": saved[0]["absent"]})
            rows += rows_of(f"{kind} × {n}", answers, ratio)
        return rows


def rows_of(onto: str, answers: Sequence[dict[str, Any]], ratio: float) -> list[Row]:
    """The rows of one layout. ratio: stored bytes of fastckpt's checkpoint ÷ raw bytes."""
    samples = [{**sample, "rank": rank} for rank, answer in enumerate(answers) for sample in answer["samples"]]
    names = dict.fromkeys(sample["contender"] for sample in samples)
    raw, stored = (sum(answer[key] for answer in answers) for key in ("raw_bytes", "stored_bytes"))
    floor = _rounds(samples, "floor", "seconds", max)
    rows = []
    for name in sorted(names, key=("fastckpt", "dcp", "torch_checkpointing", "floor").index):
        seconds = _rounds(samples, name, "seconds", max)
        read = statistics.median(_rounds(samples, name, "read_bytes", sum))
        needed, estimate = (stored, raw * ratio) if name in ("fastckpt", "floor") else (raw, raw)
        peak = statistics.median(_rounds(samples, name, "peak_bytes", max))
        rows.append(
            {
                "onto": onto,
                "by": name,
                "seconds": cell(seconds, 3),
                "seconds ÷ floor": cell([a / b for a, b in zip(seconds, floor, strict=True)], 1),
                "processor seconds, all ranks": cell(_rounds(samples, name, "cpu_s", sum), 2),
                "read, MB": _megabytes(read),
                "needed, raw, MB": _megabytes(raw),
                "needed, stored, MB": _megabytes(needed),
                "estimate, MB": _megabytes(estimate),
                f"read ÷ needed, stored (bar of fastckpt: {READ_BAR})": f"{read / needed:.3f}",
                "read ÷ estimate": f"{read / estimate:.3f}",
                "peak memory, MB": _megabytes(peak),
            }
        )
    if answers[0]["absent"]:
        rows.insert(-1, {"onto": onto, "by": "torch_checkpointing", "seconds": answers[0]["absent"]})
    return rows


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.1f}"


def _rounds(samples: Sequence[dict[str, Any]], name: str, key: str, of_ranks: Callable[..., Any]) -> list[Any]:
    """A contender's figure of each round, of all ranks together."""
    own = [sample for sample in samples if sample["contender"] == name]
    numbers = sorted({sample["round"] for sample in own})
    return [of_ranks(sample[key] for sample in own if sample["round"] == number) for number in numbers]


def run_job(kind: str, n: int, function: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a function of `resharding_ranks` in n processes with one thread of torch each, in a gloo group if they are several. Returns what
    each has returned. RuntimeError, with its words, if one fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.resharding_ranks"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {**settings, "kind": kind, "ranks": n, "port": port, "function": function}
    outs = [Path(settings["folder"]) / f"answer-{rank}" for rank in range(n)]
    for out in outs:
        out.unlink(missing_ok=True)
    processes = [context.Process(target=_rank_main, args=(rank, given, str(out))) for rank, out in enumerate(outs)]
    for process in processes:
        process.start()
    end_s = time.monotonic() + LIMIT_S
    try:
        while any(process.exitcode is None for process in processes) and time.monotonic() < end_s:
            if any(process.exitcode for process in processes):
                break  # the others wait for it
            for process in processes:
                process.join(0.1)
    finally:
        for process in processes:
            process.kill()
            process.join()
    answers = [json.loads(out.read_text()) if out.exists() else {"error": "no answer"} for out in outs]
    wrong = [f"rank {rank}: {one['error']}" for rank, one in enumerate(answers) if "error" in one]
    if wrong:
        raise RuntimeError(f"{function} of {kind} × {n} has failed:\n" + "\n".join(wrong))
    return answers


def _rank_main(rank: int, settings: dict[str, Any], out: str) -> None:
    enter_rank(rank, settings)
    import torch
    import torch.distributed as dist

    from benchmarks import resharding_ranks

    torch.set_num_threads(1)
    try:
        if settings["ranks"] > 1:
            dist.init_process_group("gloo")
        found = getattr(resharding_ranks, settings["function"])(settings)
    except BaseException:
        Path(out).write_text(json.dumps({"error": traceback.format_exc()}))
        os._exit(1)
    Path(out).write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()  # rank 0 has the store that the others end with
    os._exit(0)
