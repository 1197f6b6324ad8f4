"""Save and load one real training state with fastckpt and its rivals.

    python benchmarks/run.py [--quick] [--rounds N] [--contenders a,b] [--dir DIR] [--out DIR] [--json]

Every measurement runs in a process of its own. A round takes all contenders in turn and each round starts with another
one, so that a disk or a neighbour that slows down for a while slows everybody; the table shows medians over the rounds.
Progress goes to stderr. Results: one JSON file with all samples, and a table and a plot made from it by report.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import contenders, measure, report  # noqa: E402
from benchmarks.workloads import gpt  # noqa: E402

CACHE = ROOT / "benchmarks" / ".cache"
LIMIT = 600  # seconds for one process; the slowest takes some 15


class Progress:
    """A bar on a terminal, one line per measurement elsewhere."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        self.done += 1
        left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
        if self.live:
            full = 24 * self.done // self.total
            bar = f"[{'#' * full}{'.' * (24 - full)}] {self.done}/{self.total}, {left:.0f} s left"
            print(f"\r\033[K{bar}  {text}", end="\n" if self.done == self.total else "", file=sys.stderr, flush=True)
        else:
            print(f"{self.done}/{self.total}, {left:.0f} s left: {text}", file=sys.stderr, flush=True)


def worker(mode: str, name: str, state: Path, directory: Path, check: bool = False) -> dict[str, Any]:
    out = directory.parent / "result.json"
    arguments = [mode, name, str(state), str(directory), "check" if check else "-"]
    return in_process("benchmarks.worker", mode, arguments, out)


def in_process(module: str, what: str, arguments: list[str], out: Path) -> dict[str, Any]:
    """Runs a module in a process of its own, with `out` as its last argument; the JSON object that it writes there."""
    out.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    command = [sys.executable, "-m", module, *arguments, str(out)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"{what}: no end after {LIMIT} s"}
    if done.returncode != 0 or not out.exists():
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"{what}: exit code {done.returncode}: {words[:300]}", "stderr": done.stderr[-4000:]}
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def ensure_state(size: str) -> Path:
    path = CACHE / f"gpt-{size}-seed{gpt.SEED}-steps{gpt.SIZES[size].steps}.pt"
    if not path.exists():
        subprocess.run([sys.executable, "-m", "benchmarks.workloads.gpt", size, str(path)], cwd=ROOT, check=True)
    return path


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
        probe_directory = work / "probe"
        probe_directory.mkdir(parents=True, exist_ok=True)
        probes.append(worker("probe", "-", state, probe_directory))
        shutil.rmtree(probe_directory, ignore_errors=True)
        show(f"round {number + 1}: machine, load average {os.getloadavg()[0]:.1f}")
        first = number % max(len(runnable), 1)
        for name in runnable[first:] + runnable[:first]:
            asynchronous = about[name]["asynchronous"]
            samples[name].append(one_contender(name, state, work, number == 0, asynchronous, show))
    shutil.rmtree(work, ignore_errors=True)
    return {
        "benchmark": "save-load",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": measure.machine(CACHE),
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


def names_of(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in contenders.WHERE]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(contenders.WHERE)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="4 M parameters instead of 42 M: a smoke test, no result")
    everybody = list(contenders.WHERE)
    parser.add_argument("--contenders", type=names_of, default=everybody, help=", ".join(everybody))
    parser.add_argument("--dir", default=str(CACHE / "work"), help="where the checkpoints are written")
    parser.add_argument("--out", help="where the results go (default: benchmarks/results; --quick: benchmarks/.cache)")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 5)
    result = measure_all(args)
    out = Path(args.out) if args.out else CACHE if args.quick else ROOT / "benchmarks" / "results"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result['date'][:10]}-save-load{'-quick' if args.quick else ''}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    made = report.write(path)
    print(json.dumps(result) if args.json else made.read_text())
    print(f"written: {path} and .md, .png beside it", file=sys.stderr)
    wrong = failures(result)
    for line in wrong:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
