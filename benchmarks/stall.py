"""What saving costs a training loop on the CPU: fastckpt, moonclip and torch's async_save, against no saves at all.

    python benchmarks/stall.py [--quick] [--rounds N] [--steps N] [--contenders a,b] [--dir DIR] [--out DIR] [--json]

A GPT trains with AdamW, on two threads, and is saved every tenth step. Every loop runs in a process of its own. A round takes
all contenders in turn, "none" among them, and each round starts with another one; what a contender adds to the time of
its loop is taken against the loop without saves of the same round. Then each contender's peak memory, in a process without training.
Progress goes to stderr. Results: one JSON file with all samples, and a table and a plot made from it by stall_report.py.
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

from benchmarks import CACHE, measure, output, runner, savers, stall_report
from benchmarks.processes import in_process
from benchmarks.progress import Progress
from benchmarks.savers.base import EVERY
from benchmarks.stall_worker import MEMORY_SAVES, QUIET_AFTER_S, THREADS
from benchmarks.workloads import gpt

BUDGETS = (2.0, 1.0, 0.25)  # of the state
LEAST_BUDGET = 16 << 20  # fastckpt refuses less: a quarter of the small state


class Bench:
    """One run: where it works, and what it trains."""

    def __init__(self, size: str, n_steps: int, work: Path) -> None:
        self.size, self.n_steps, self.work = size, n_steps, work
        self.state = runner.ensure_state(size)

    def process(self, mode: str, name: str, amount: int) -> dict[str, Any]:
        """One measurement, in an empty directory."""
        shutil.rmtree(self.work, ignore_errors=True)
        directory = self.work / "saves"
        directory.mkdir(parents=True)
        os.sync()
        arguments = [mode, name, self.size, str(amount), str(self.state), str(directory)]
        result = in_process("benchmarks.stall_worker", arguments, self.work / "result.json")
        shutil.rmtree(self.work, ignore_errors=True)
        return result

    def describe(self, name: str) -> dict[str, Any]:
        return self.process("describe", name, 0)

    def loop(self, name: str) -> dict[str, Any]:
        return self.process("loop", name, self.n_steps)

    def memory(self, name: str, budget_bytes: int) -> dict[str, Any]:
        return {"budget": budget_bytes, **self.process("memory", name, budget_bytes)}

    def probe(self) -> dict[str, Any]:
        result = runner.probe(self.state, self.work)
        shutil.rmtree(self.work, ignore_errors=True)
        return result


def budgets(name: str, state_bytes: int) -> list[int]:
    """What peak memory is measured with; 0: without a limit."""
    if name == "none":
        return []
    limits = [int(share * state_bytes) for share in BUDGETS] if name in savers.OURS else []
    return [0, *(limit for limit in limits if limit >= LEAST_BUDGET)]


def words(sample: dict[str, Any]) -> str:
    if "error" in sample:
        return str(sample["error"])
    if "peak" in sample:
        return f"peak {sample['peak'] / 1e6:.0f} MB"
    blocked = [s["call"] + s["fence"] for s in sample["saves"]]
    each = f", blocked {sum(blocked) / len(blocked):.3f} s a save" if blocked else ""
    return f"{len(sample['steps'])} steps in {sample['total']:.2f} s{each}"


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    names: list[str] = args.contenders
    bench = Bench("4m" if args.quick else "42m", args.steps, Path(args.dir))
    load_at_start = os.getloadavg()
    about = {name: bench.describe(name) for name in names}
    runnable = [name for name in names if "error" not in about[name]]
    state_bytes = about[runnable[0]]["state_bytes"]
    for_memory = [(name, budget) for name in runnable for budget in budgets(name, state_bytes)]
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {name: {"loop": [], "memory": []} for name in names}
    probes: list[dict[str, Any]] = []
    show = Progress(args.rounds * (len(runnable) + 1) + len(for_memory))
    started = time.monotonic()
    for number in range(args.rounds):
        probes.append(bench.probe())
        show(f"round {number + 1}: machine, load average {os.getloadavg()[0]:.1f}")
        for name in runner.rotated(runnable, number):
            sample = {"round": number, **bench.loop(name)}
            samples[name]["loop"].append(sample)
            show(f"{name}: {words(sample)}")
    for name, budget in for_memory:
        sample = bench.memory(name, budget)
        samples[name]["memory"].append(sample)
        show(f"{name}, budget {budget / 1e6:.0f} MB: {words(sample)}" if budget else f"{name}: {words(sample)}")
    return {
        **output.head("stall", measure.machine(CACHE)),
        "settings": {
            "workload": f"gpt-{bench.size}",
            "seed": gpt.SEED,
            "state_bytes": state_bytes,
            "trained_steps": gpt.SIZES[bench.size].steps,
            "batch": [gpt.BATCH, gpt.CONTEXT],
            "threads": THREADS,
            "steps": args.steps,
            "every": EVERY,
            "rounds": args.rounds,
            "memory_saves": len(MEMORY_SAVES),
            "quiet_after_s": QUIET_AFTER_S,
            "load_average": {"start": load_at_start, "end": os.getloadavg()},
            "seconds": time.monotonic() - started,
        },
        "contenders": {name: {**about[name], **samples[name]} for name in names},
        "probes": probes,
    }


def failures(result: dict[str, Any]) -> list[str]:
    found = []
    for name, entry in result["contenders"].items():
        parts = [entry, *entry["loop"], *entry["memory"]]
        found += [f"{name}: {part['error']}" for part in parts if "error" in part]
    return found


def names_of(text: str) -> list[str]:
    names = runner.names_of(text, savers.WHERE)
    return names if "none" in names else ["none", *names]


def steps_of(text: str) -> int:
    if not text.isdigit() or int(text) < EVERY or int(text) % EVERY:
        raise argparse.ArgumentTypeError(f"{text}: expected a multiple of {EVERY}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 2")
    parser.add_argument("--steps", type=steps_of, help="of each loop, default 30, with --quick 20")
    parser.add_argument("--quick", action="store_true", help="4 M parameters instead of 42 M: a smoke test, no result")
    everybody = list(savers.WHERE)
    parser.add_argument("--contenders", type=names_of, default=everybody, help=", ".join(everybody))
    parser.add_argument("--dir", default=str(CACHE / "stall"), help="where the checkpoints are written; emptied")
    output.add_options(parser)
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 3)
    args.steps = args.steps or (20 if args.quick else 30)
    result = measure_all(args)
    output.publish(result, args, stall_report.write)
    return output.exit_code(failures(result))


if __name__ == "__main__":
    sys.exit(main())
