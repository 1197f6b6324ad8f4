"""What grows with the number of things rather than with their bytes: tensors, views, numbers.

    python benchmarks/objects.py [--tensors 50000] [--numbers 500000] [--view-mb 256] [--views 64] [--rounds 5] [--folder DIR]
                                 [--out DIR] [--json]

Contenders take turns, and each row is the median of the rounds as a ratio, so that a machine's other work does not decide.

    many small tensors        fastckpt.save and load against torch.save and load, in a folder in memory
    numbers                   what the call of a Checkpointer's save takes with a loss history, unchanged and one number longer
    views one by one          memory of {name: reader[name]} over views of one storage, against their bytes; what is held afterwards
    views into a state        seconds of load_into against fetching the whole storage once
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fastckpt
from benchmarks import ROOT, measure, output
from fastckpt.state import Recapturer


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Medians in seconds, and the median of the rounds' ratios."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"ours_s": statistics.median(ours), "theirs_s": statistics.median(theirs), "ratio": statistics.median(pairs)}


def small_tensors(n_tensors: int, rounds: int, folder: Path) -> dict[str, Any]:
    state = {str(number): torch.full((4,), float(number)) for number in range(n_tensors)}
    stock, ours = str(folder / "torch.pt"), str(folder / "ours.fckpt")
    calls = {
        "torch save": lambda: torch.save(state, stock),
        "save": lambda: fastckpt.save(state, ours),
        "torch load": lambda: torch.load(stock),
        "load": lambda: fastckpt.load(ours),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    later = {name: found[1:] for name, found in times.items()}  # the first round imports and warms up
    return {
        "save": ratio(later["save"], later["torch save"]),
        "load": ratio(later["load"], later["torch load"]),
    }


def numbers(n_numbers: int, rounds: int) -> dict[str, float]:
    history = [0.5 + number for number in range(n_numbers)]
    state = {"model": {"w": torch.ones(1000)}, "history": {"loss": history}}
    again = Recapturer()
    again.capture(state)
    same, longer = [], []
    for _ in range(rounds):
        same.append(seconds_of(lambda: again.capture(state)))
        history.append(0.25)
        longer.append(seconds_of(lambda: again.capture(state)))
    return {"unchanged_s": statistics.median(same), "longer_s": statistics.median(longer)}


def views_one_by_one(path: Path, n_bytes: int) -> dict[str, float]:
    with fastckpt.open(path) as reader:
        reader[next(iter(reader))]  # what the first fetch of a process leaves behind is not a view's
        span = measure.Span()
        found = {name: reader[name] for name in reader}
        peak_bytes = span.peak()
        del found
        held_bytes = measure.memory("VmRSS") - span.baseline
    return {"peak_of_bytes": peak_bytes / n_bytes, "held_of_bytes": held_bytes / n_bytes}


def views_into_a_state(path: Path, state: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    whole, into = [], []
    with fastckpt.open(path) as reader:
        for _ in range(rounds):
            whole.append(seconds_of(lambda: reader["view 0"]))
            into.append(seconds_of(lambda: reader.load_into(state)))
    return ratio(into, whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=50_000)
    parser.add_argument("--numbers", type=int, default=500_000)
    parser.add_argument("--view-mb", type=int, default=256)
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="/dev/shm", help="where files are written (default: memory)")
    parser.add_argument("--out", help="a folder for the result")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of a table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="fastckpt-objects-") as name:
        folder = Path(name)
        flat = torch.randn((args.view_mb << 20) // 4)
        n_bytes, views = flat.nbytes, folder / "views.fckpt"
        fastckpt.save({f"view {n}": view for n, view in enumerate(flat.chunk(args.views))}, views)
        del flat
        one_by_one = views_one_by_one(views, n_bytes)
        state = {f"view {n}": view for n, view in enumerate(torch.zeros(n_bytes // 4).chunk(args.views))}
        result = {
            **output.head("objects", measure.machine(ROOT)),
            "versions": {"fastckpt": fastckpt.__version__, "torch": str(torch.__version__)},
            "views one by one": one_by_one,
            "views into a state": views_into_a_state(views, state, args.rounds),
            "numbers": numbers(args.numbers, args.rounds),
            **{f"small tensors, {k}": v for k, v in small_tensors(args.tensors, args.rounds, folder).items()},
        }
    if args.out:
        output.save(result, Path(args.out), "objects")
    if args.json:
        print(json.dumps(result))
        return 0
    for row in ("small tensors, save", "small tensors, load", "numbers", "views one by one", "views into a state"):
        print(f"{row:22}", "  ".join(f"{name} {value:.3f}" for name, value in result[row].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
