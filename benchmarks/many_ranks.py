"""A save of four ranks against torch.distributed.checkpoint's, to one directory, fsynced: seconds and CPU seconds of all ranks.

    python benchmarks/many_ranks.py [--quick] [--ranks N] [--rounds N] [--dir DIR] [--out DIR] [--json]

Each rank is a process with one thread for torch. A model under FSDP2 (fully_shard) trains some steps with AdamW; then each round saves the
same state with both, in turn, and writes and syncs the raw bytes of each rank, which is the disk's floor. A barrier stands before each
save, outside of it; its seconds are those until the last rank has it durable.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measure, output
from benchmarks.processes import enter_rank
from benchmarks.tables import cell

BARS = {"cpu_s": 0.8, "seconds": 0.6}
BUSY = 0.8
"""From which share of the time on the disk counts as what limits a save."""


class Disk:
    """How busy the disk under a directory is, by the kernel's own count."""

    def __init__(self, folder: str) -> None:
        device = os.stat(folder).st_dev
        self._path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")

    def busy_s(self) -> float | None:
        try:
            return int(self._path.read_text().split()[9]) / 1e3
        except (OSError, IndexError, ValueError):
            return None


def rank_main(rank: int, settings: dict[str, Any], results: Any) -> None:
    """One rank: all contenders in turn, round after round."""
    enter_rank(rank, settings)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, optimizer = train(settings)
    savers = contenders(model, optimizer, settings)
    disk = Disk(settings["dir"])
    for number in range(-1, settings["rounds"]):  # the first one warms up
        names = list(savers)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            cpu, started, busy = time.process_time(), time.perf_counter(), disk.busy_s()
            savers[name](number)
            seconds, cpu_s, after = time.perf_counter() - started, time.process_time() - cpu, disk.busy_s()
            dist.barrier()
            busy_s = None if busy is None or after is None else after - busy
            sample = {
                "rank": rank,
                "round": number,
                "contender": name,
                "seconds": seconds,
                "cpu_s": cpu_s,
                "busy_s": busy_s,
            }
            results.put(sample)
            if rank == 0:
                shutil.rmtree(f"{settings['dir']}/{name}-{number}", ignore_errors=True)
    dist.destroy_process_group()


def train(settings: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(7)
    width = settings["width"]
    layers = [
        nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for _ in range(settings["layers"])
    ]
    model = nn.Sequential(*layers)
    mesh = init_device_mesh("cpu", (settings["ranks"],))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(settings["steps"]):
        x = torch.randn(16, width)
        optimizer.zero_grad()
        (model(x) - torch.roll(x, 1, dims=1)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def contenders(model: Any, optimizer: Any, settings: dict[str, Any]) -> dict[str, Callable[[int], None]]:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    import fastckpt

    folder = settings["dir"]
    made: dict[int, Any] = {}

    def ours(number: int) -> None:
        # A step is saved once: each round is another step, in one repository, as in a run.
        ckpt = made.get(0)
        if ckpt is None:
            state = {"model": model, "optimizer": optimizer}
            ckpt = made[0] = fastckpt.Checkpointer(f"{folder}/fastckpt", state, every=None, spot=None, keep=None)
            ckpt.restore()
        ckpt.save_now(number + 2).wait()

    def dcp_save(number: int) -> None:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        writer = dcp.FileSystemWriter(f"{folder}/dcp-{number}", sync_files=True)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, storage_writer=writer)

    raw: list[Any] = []

    def raw_write(number: int) -> None:
        if not raw:
            states = [*model.state_dict().values(), *(t for one in optimizer.state.values() for t in one.values())]
            raw.extend(
                (t.to_local() if hasattr(t, "to_local") else t).contiguous().view(-1).view(torch.uint8).numpy()
                for t in states
            )
        path = Path(f"{folder}/raw-{number}")
        path.mkdir(exist_ok=True)
        with (path / f"{os.environ['RANK']}").open("wb") as file:
            for part in raw:
                file.write(part)
            os.fsync(file.fileno())

    return {"fastckpt": ours, "dcp": dcp_save, "raw": raw_write}


def summary(result: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Contender → for each round: seconds until the last rank has it, CPU seconds of all, share of the time for which the disk was busy."""
    found: dict[str, dict[str, list[float]]] = {}
    rounds = sorted({s["round"] for s in result["samples"] if s["round"] >= 0})
    for name in ("fastckpt", "dcp", "raw"):
        rows = found[name] = {"seconds": [], "cpu_s": [], "busy": []}
        for number in rounds:
            own = [s for s in result["samples"] if s["contender"] == name and s["round"] == number]
            seconds = max(s["seconds"] for s in own)
            rows["seconds"].append(seconds)
            rows["cpu_s"].append(sum(s["cpu_s"] for s in own))
            busy = [s["busy_s"] for s in own if s["busy_s"] is not None]
            rows["busy"].append(max(busy) / seconds if busy else float("nan"))
    return found


def markdown(result: dict[str, Any]) -> str:
    found, settings = summary(result), result["settings"]
    about = [
        f"{result['date'][:10]}, {result['machine']['cores']} cores; torch {result['machine']['torch']}.",
        f"{settings['ranks']} ranks, FSDP2 with AdamW, {settings['bytes'] / 1e6:.0f} MB of state;",
        f"{settings['rounds']} rounds, contenders in turn.",
        "Medians (smallest–largest). All ranks share the cores and one disk. fastckpt compresses; every byte is fsynced.",
    ]
    table = ["| | seconds | CPU seconds of all ranks | disk busy |", "|---|---|---|---|"]
    lines = ["# A save of many ranks", "", " ".join(about), "", *table]
    names = {
        "fastckpt": "fastckpt, `save_now(…).wait()`",
        "dcp": "dcp.save, FileSystemWriter, `sync_files=True`",
        "raw": "raw bytes, write + fsync",
    }
    for name, rows in found.items():
        seconds, cpu_s = cell(rows["seconds"], 2), cell(rows["cpu_s"], 2)
        lines.append(f"| {names[name]} | {seconds} | {cpu_s} | {100 * statistics.median(rows['busy']):.0f} % |")
    lines += ["", "| fastckpt ÷ dcp, round by round | ratio | bar |", "|---|---|---|"]
    for key, text in (("cpu_s", "CPU seconds"), ("seconds", "seconds")):
        ratios = [a / b for a, b in zip(found["fastckpt"][key], found["dcp"][key], strict=True)]
        lines.append(f"| {text} | {cell(ratios, 2)} | {BARS[key]} |")
    floor = [a / b for a, b in zip(found["fastckpt"]["seconds"], found["raw"]["seconds"], strict=True)]
    lines.append(f"| seconds, of the raw bytes' write + fsync | {cell(floor, 2)} | |")
    if statistics.median(found["dcp"]["busy"]) >= BUSY:
        ratio = f"1.05 × the ratio of bytes, {1.05 * settings['byte_ratio']:.2f}"
        lines += [
            "",
            f"The disk was busy for {100 * BUSY:.0f} % of dcp's time and more: the bar of seconds is then {ratio}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 MB: a smoke test, no result")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", help="where the checkpoints are written; emptied")
    output.add_options(parser)
    args = parser.parse_args()
    width, layers = (512, 1) if args.quick else (1024, 5)
    n_bytes = 12 * layers * (8 * width * width + 5 * width)
    base = Path(args.dir or tempfile.mkdtemp(prefix="fastckpt-many-ranks-"))
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"ranks": args.ranks, "rounds": args.rounds, "dir": str(base), "port": port}
    settings |= {"width": width, "layers": layers, "steps": 5, "bytes": n_bytes}
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=rank_main, args=(rank, settings, queue)) for rank in range(args.ranks)]
    for process in processes:
        process.start()
    samples = []
    for _ in range(args.ranks * (args.rounds + 1) * 3):
        samples.append(queue.get(timeout=300))
    for process in processes:
        process.join()
    stored = sum(path.stat().st_size for path in (base / "fastckpt" / "data").rglob("*.pack"))
    kept = len(list((base / "fastckpt" / "data").iterdir()))
    settings["byte_ratio"] = stored / max(1, kept) / n_bytes
    result = output.head("many-ranks", measure.machine(base)) | {"settings": settings, "samples": samples}
    shutil.rmtree(base, ignore_errors=True)

    output.publish_table(result, args, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
