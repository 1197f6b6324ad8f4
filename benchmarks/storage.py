"""Object storage and local disks, this project and its rivals in turns: what is asked of it, what it reaches, and the floors.

    python benchmarks/storage.py [--quick] [--only s3,local] [--rounds N] [--rivals PYTHON] [--out DIR] [--json]

`make bench-rivals` makes the rivals' environment; without it their figures are missing, and so are the bars made from them. Each group of
rows can run alone (`--only`). Nothing leaves this machine; links of a given rate are network namespaces, and want root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fastckpt
from benchmarks import (
    CACHE,
    measure,
    output,
    storage_cpu,
    storage_effort,
    storage_links,
    storage_local,
    storage_lock,
    storage_s3,
    storage_sharded,
)
from benchmarks.progress import Progress
from benchmarks.runner import names_of
from benchmarks.storage_contenders import OURS
from benchmarks.storage_lab import Lab, find_rivals
from benchmarks.storage_report import markdown
from benchmarks.storage_rows import Row, missing
from fastckpt.kernels import kernels

GROUPS: dict[str, ModuleType] = {
    "s3": storage_s3,
    "local": storage_local,
    "cpu": storage_cpu,
    "links": storage_links,
    "lock": storage_lock,
    "effort": storage_effort,
    "sharded": storage_sharded,
}


def measured(args: argparse.Namespace) -> output.Result:
    """Run the groups that are asked for, one after the other."""
    size = "tiny" if args.quick else "42m"
    started, load_at_start = time.monotonic(), os.getloadavg()
    Path(args.dir).mkdir(parents=True, exist_ok=True)
    work = Path(
        tempfile.mkdtemp(prefix="storage-", dir=args.dir)
    )  # a new one: a run that was killed may have left checkpoints
    lab = Lab(size, args.rounds, args.quick, work, find_rivals(args.rivals), print)
    lab.show = Progress(sum(GROUPS[name].count(lab) for name in args.only))
    rows = []
    try:
        for name in args.only:
            rows += group(name, lab)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        **output.head("storage", {**measure.machine(CACHE), "kernels": kernel_words()}),
        "versions": {
            "fastckpt": fastckpt.__version__,
            "torch": str(torch.__version__),
            **{name: about["version"] for name, about in sorted(lab.contenders.items()) if name not in OURS},
        },
        "settings": {
            "size": size,
            "state_bytes": lab.state().stat().st_size,
            "rounds": args.rounds,
            "groups": args.only,
            "load_average": {"start": load_at_start, "end": os.getloadavg()},
            "load_averages": lab.load_averages,
            "seconds": time.monotonic() - started,
        },
        "rows": rows,
        "broken": lab.broken,
        "contenders": lab.contenders,
        "samples": lab.samples,
    }


def group(name: str, lab: Lab) -> list[Row]:
    """The rows of one group. An error of it is a row, so that the others' figures are not lost."""
    try:
        found: list[Row] = GROUPS[name].measure(lab)
    except Exception as error:
        lab.broken.append(f"{name}: {type(error).__name__}: {error}")
        traceback.print_exc()
        return [missing(name, "all of it", "", lab.broken[-1])]
    return found


def kernel_words() -> str:
    """Which kernels run, and with which instruction sets."""
    if kernels().name != "native":
        return kernels().name
    from fastckpt import _native

    return f"native, {_native.isas()}"


def failures(result: output.Result) -> list[str]:
    """What makes a run or a figure worthless: a group that broke, bytes that came back wrong."""
    found = list(result["broken"])
    for what, contenders in result["samples"].items():
        for name, samples in contenders.items():
            wrong = [text for one in samples for text in one.get("differences", []) if text.startswith("WRONG")]
            found += [f"{what}: {name}: {text}" for text in wrong]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a state of 2 MB and one round: tries the benchmark itself"
    )
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    everything: Any = list(GROUPS)
    parser.add_argument(
        "--only", type=lambda text: names_of(text, everything), default=everything, help=", ".join(everything)
    )
    parser.add_argument("--rivals", help="the Python of the rivals' environment (default: .venv-rivals/bin/python)")
    parser.add_argument("--dir", default=str(CACHE), help="where checkpoints are written meanwhile (4 GB)")
    output.add_options(parser)
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    result = measured(args)
    output.publish_table(result, args, markdown)
    return output.exit_code(failures(result))


if __name__ == "__main__":
    sys.exit(main())
