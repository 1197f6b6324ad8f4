"""What a save asks of stores and boards with 1,024 and 16,384 ranks, simulated; and what a real store of torch.distributed answers here.

    python benchmarks/scale.py [--sizes 1024,16384] [--tensors 10000] [--seed 0] [--quick] [--out DIR] [--json]

docs/scale.md says what each number means.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fastckpt
from benchmarks import ROOT, measure, output, scale_simulation, store_rate, tables
from fastckpt.format.keys import SaveId, commit_key, pack_key, vote_key
from fastckpt.format.repository_records import parse_commit_record
from fastckpt.store.memory import MemoryStore

PUT_PER_SECOND, GET_PER_SECOND = 3500, 5500
"""Of S3, for each partitioned prefix: docs/scale.md."""
PACK_BYTES = 32 << 20
PUT_DOLLARS, GET_DOLLARS = 5e-6, 4e-7
"""Of one request of S3 Standard in us-east-1; a page of a LIST costs what a PUT does."""
LAYOUTS = ("replicated", "hsdp")


def planning(size: int, layout: str, n_tensors: int) -> dict[str, Any]:
    """In a process of its own: its memory is measured, and a process has one default group."""
    command = [sys.executable, "-m", "benchmarks.scale_planning", str(size), layout, str(n_tensors)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        return {"ranks": size, "layout": layout, "error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def record(size: int, seed: int) -> dict[str, Any]:
    """What every rank does once when it restores, and what whoever commits builds."""
    save = scale_simulation.Save(scale_simulation.Plan(size, seed))
    save.run()
    key = commit_key(save.save.checkpoint)
    data = MemoryStore.get(save.store, key)
    times = []
    span = measure.Span()
    for _ in range(3):
        began_s = time.perf_counter()
        parsed = parse_commit_record(data, save.save.checkpoint, key)
        times.append(time.perf_counter() - began_s)
    assert parsed is not None
    return {"ranks": size, "bytes": len(data), "parsed in seconds": round(min(times), 4), "memory, bytes": span.peak()}


def keys_of_a_save(size: int, bytes_per_rank: int) -> dict[str, Any]:
    """Objects below each prefix, and what S3 takes for them at its limit for one prefix: that of a new save has not been split yet."""
    save = SaveId(1, 1000, 0)
    packs = -(-bytes_per_rank // PACK_BYTES)
    n_puts = size * packs
    name = scale_simulation.VoteName(save, 0, size, 10**6, "0" * 32)
    return {
        "ranks": size,
        "bytes per rank": bytes_per_rank,
        "packs": n_puts,
        "prefix of packs": pack_key(save, 0, 0).rsplit("/r", 1)[0] + "/",
        "packs below r<rank>/": packs,
        "seconds of packs at the limit of one prefix": round(n_puts / PUT_PER_SECOND, 1),
        "bytes per second at that limit": PUT_PER_SECOND * min(PACK_BYTES, bytes_per_rank),
        "prefix of votes": vote_key(name).rsplit("/", 1)[0] + "/",
        "seconds of votes at the limit of one prefix": round(size / PUT_PER_SECOND, 1),
        "pages of a LIST of votes": -(-size // scale_simulation.PAGE),
        "pages of a LIST of packs": -(-n_puts // scale_simulation.PAGE),
        "dollars of a save": round((n_puts + size) * PUT_DOLLARS, 3),
        "dollars of a LIST of both": round((-(-size // 1000) + -(-n_puts // 1000)) * PUT_DOLLARS, 6),
    }


def measured(args: argparse.Namespace) -> output.Result:
    sizes = [int(size) for size in args.sizes.split(",")]
    saves = [scale_simulation.one_save(name, size, args.seed) for size in sizes for name in scale_simulation.SCENARIOS]
    return {
        **output.head("scale", measure.machine(ROOT)),
        "versions": {"fastckpt": fastckpt.__version__, "torch": str(torch.__version__)},
        "seed": args.seed,
        "saves": saves,
        "rounds": [scale_simulation.agreement(size, args.seed) for size in [8, *sizes]],
        "planning": [planning(size, layout, args.tensors) for size in sizes for layout in LAYOUTS],
        "records": [record(size, args.seed) for size in sizes],
        "keys": [keys_of_a_save(size, n_bytes) for size in sizes for n_bytes in (64 << 20, 1 << 30)],
        "store of torch.distributed, requests per second": {} if args.quick else store_rate.measure(),
    }


def lines(title: str, found: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for one in found for name in one))
    rows = [tables.row(str(one.get(name, "")) for name in names) for one in found]
    return [f"## {title}", "", *tables.head(names), *rows, ""]


def markdown(result: output.Result) -> str:
    rates = result["store of torch.distributed, requests per second"]
    text = [
        f"# Scale, {result['date'][:10]}",
        "",
        f"fastckpt {result['versions']['fastckpt']}, torch {result['versions']['torch']}, seed {result['seed']}; "
        f"{result['machine']['cores']} cores of {result['machine']['cpu']}. docs/scale.md says what the numbers mean.",
        "",
        *lines("One save", result["saves"]),
        *lines("One round of agreement", result["rounds"]),
        *lines("What a rank computes before it saves", result["planning"]),
        *lines("Commit record", result["records"]),
        *lines("Keys", result["keys"]),
        *lines("A real TCPStore, requests per second", [{"clients": n, **found} for n, found in rates.items()]),
    ]
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,16384")
    parser.add_argument("--tensors", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="64 ranks, 100 tensors, no real store")
    output.add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.tensors = "64", 100
    result = measured(args)

    output.publish_table(result, args, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
