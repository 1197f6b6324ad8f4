"""What a restore on another layout costs: the look at the votes of 1,024 ranks, for one rank's plan; and bytes and seconds of a load.

    python benchmarks/resharding.py [--ranks 1024] [--tensors 1000] [--records 10000] [--quick] [--out DIR] [--json]

The first part writes the votes into a directory, and looks at them in a process of its own, as a rank of three quarters as many would.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fastckpt
from benchmarks import ROOT, measure, output, tables
from benchmarks.processes import in_process
from benchmarks.resharding_loads import ABOUT, loads
from benchmarks.resharding_votes import write_votes

BARS = {"seconds": 10.0, "memory, bytes": 2 << 30}


def merged(folder: Path, ranks: int, tensors: int, records: int) -> list[dict[str, Any]]:
    """Of one rank's plan, for rows that go to fewer ranks, and for columns, which all ranks have a part of."""
    n_bytes = write_votes(folder, ranks, tensors, records)
    found = []
    for cut in ("rows", "columns"):
        one = in_process("benchmarks.resharding_plan", [str(folder), cut], folder / "answer.json")
        found.append(
            {"cut": cut, "ranks": ranks, "tensors": tensors, "records of each": records, "votes, bytes": n_bytes, **one}
        )
    return found


def measured(args: argparse.Namespace) -> output.Result:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        plans = merged(Path(folder), args.ranks, args.tensors, args.records)
    return {
        **output.head("resharding", measure.machine(ROOT)),
        "versions": {"fastckpt": fastckpt.__version__, "torch": str(torch.__version__)},
        "plans": plans,
        "loads": loads(args.folder, args.quick),
    }


def lines(title: str, found: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for one in found for name in one))
    rows = [tables.row(str(one.get(name, "")) for name in names) for one in found]
    return [f"## {title}", "", *tables.head(names), *rows, ""]


def markdown(result: output.Result) -> str:
    text = [
        f"# Another layout, {result['date'][:10]}",
        "",
        f"fastckpt {result['versions']['fastckpt']}, torch {result['versions']['torch']}; {result['machine']['cores']} cores of "
        f"{result['machine']['cpu']}. Bars of a plan: {BARS['seconds']:g} s, {BARS['memory, bytes'] >> 30} GiB.",
        "",
        *lines("One rank's plan", result["plans"]),
        *lines("Loads", result["loads"]),
        ABOUT,
        "",
    ]
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=1000, help="of each rank")
    parser.add_argument("--records", type=int, default=10_000, help="of each rank")
    parser.add_argument("--folder", help="where the files are written meanwhile (1 GB)")
    parser.add_argument("--quick", action="store_true", help="16 ranks, small tensors")
    output.add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.ranks = 16
    output.publish_table(measured(args), args, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
