"""Save and load one real training state with fastckpt and its rivals.

    python benchmarks/run.py [--quick] [--rounds N] [--contenders a,b] [--dir DIR] [--out DIR] [--json]

Every measurement runs in a process of its own. A round takes all contenders in turn and each round starts with another
one, so that a disk or a neighbour that slows down for a while slows everybody; the table shows medians over the rounds.
Progress goes to stderr. Results: one JSON file with all samples, and a table and a plot made from it by report.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import CACHE, contenders, measure, output, report
from benchmarks.progress import Progress
from benchmarks.runner import ensure_state, names_of, probe, rotated, worker
from benchmarks.workloads import gpt


def one_contender(
    name: str, state: Path, work: Path, check: bool, asynchronous: bool, show: Progress
) -> dict[str, Any]:
    """`check`: compare what comes back, once in a run."""
    directory = work / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    sample: dict[str, Any] = {}
    for mode in ("save", "warm", "cold"):
        sample[mode] = worker(mode, name, state, directory, check and mode == "warm")
        if "error" in sample[mode]:
            show(f"{name}: {sample[mode]['error']}")
            break
    else:
        s, w, c = (sample[mode] for mode in ("save", "warm", "cold"))
        times = f"stall {s['stall']:.3f} s, durable {s['durable']:.3f} s"
        show(f"{name}: {times}, load {w['seconds']:.3f} s warm, {c['seconds']:.3f} s cold, {s['bytes'] / 1e6:.1f} MB")
    shutil.rmtree(directory, ignore_errors=True)
    if check and asynchronous and "error" not in sample["save"]:
        directory.mkdir()
        sample["isolation"] = worker("isolation", name, state, directory)
        shutil.rmtree(directory, ignore_errors=True)
    return sample


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    names: list[str] = args.contenders
    size, work = ("4m" if args.quick else "42m"), Path(args.dir)
    work.mkdir(parents=True, exist_ok=True)
    state = ensure_state(size)
    load_at_start = os.getloadavg()
    about = {name: worker("describe", name, state, work / name) for name in names}
    runnable = [name for name in names if not about[name].get("error") and not about[name]["unavailable"]]
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in runnable}
    probes: list[dict[str, Any]] = []
    show = Progress(args.rounds * (len(runnable) + 1))
    started = time.monotonic()
    for number in range(args.rounds):
        probes.append(probe(state, work))
        show(f"round {number + 1}: machine, load average {os.getloadavg()[0]:.1f}")
        for name in rotated(runnable, number):
            asynchronous = about[name]["asynchronous"]
            samples[name].append(one_contender(name, state, work, number == 0, asynchronous, show))
    shutil.rmtree(work, ignore_errors=True)
    return {
        **output.head("save-load", measure.machine(CACHE)),
        "settings": {
            "workload": f"gpt-{size}",
            "seed": gpt.SEED,
            "steps": gpt.SIZES[size].steps,
            "rounds": args.rounds,
            "order": "round-robin, one more place rotated in each round; each measurement in a new process",
            "memory": "VmHWM (reset through clear_refs) above VmRSS before the call; the saved state is resident "
            "before a save, the loaded one is part of a load's figure",
            "load": "until every byte has been read once",
            "cold": "posix_fadvise(DONTNEED) on fsynced files, checked with mincore; the host of a virtual disk may "
            "still hold them",
            "load_average": {"start": load_at_start, "end": os.getloadavg()},
            "seconds": time.monotonic() - started,
        },
        "contenders": {name: {**about[name], "samples": samples.get(name, [])} for name in names},
        "probes": probes,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What makes a run worthless for a contender: errors, and bytes that came back wrong."""
    found = []
    for name, entry in result["contenders"].items():
        if "error" in entry:
            found.append(f"{name}: {entry['error']}")
        for sample in entry["samples"]:
            found += [f"{name}: {part['error']}" for part in sample.values() if "error" in part]
            for mode in ("warm", "isolation"):
                wrong = [d for d in sample.get(mode, {}).get("differences", []) if d.startswith("WRONG")]
                found += [f"{name}, {mode}: {d}" for d in wrong]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="4 M parameters instead of 42 M: a smoke test, no result")
    everybody = list(contenders.WHERE)
    parser.add_argument(
        "--contenders", type=lambda text: names_of(text, everybody), default=everybody, help=", ".join(everybody)
    )
    parser.add_argument("--dir", default=str(CACHE / "work"), help="where the checkpoints are written")
    output.add_options(parser)
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 5)
    result = measure_all(args)
    output.publish(result, args, report.write)
    return output.exit_code(failures(result))


if __name__ == "__main__":
    sys.exit(main())
