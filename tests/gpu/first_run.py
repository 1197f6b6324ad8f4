"""The steps of a run on real hardware, in the order of their worth; a step that fails does not keep the others from running.

    make gpu-checklist                                   # or: python -m tests.gpu.first_run
    make gpu-checklist ARGS="--minutes 12"               # a machine that is only lent; a step that comes too late is skipped
    make gpu-checklist ARGS="--quick --steps 1,2"
    FASTCKPT_GPU_TESTS_ON=fakegpu make gpu-checklist ARGS=--quick    # a rehearsal on the test device: proves the script, not the card

Writes one JSON result and a table beside it. Exit status: 0 nothing failed, 1 something did, 2 there is nothing to run on.
What each step proves, and what to do with the result: docs/how-to/first-gpu-run.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
CHOICE, FAKE = "FASTCKPT_GPU_TESTS_ON", "fakegpu"
SANITIZER_FOUND = 86  # its exit status when it reports anything


@dataclass(frozen=True)
class Step:
    number: int
    title: str
    shows: str
    pytest: Sequence[str]
    """Arguments."""
    environment: dict[str, str] = field(default_factory=dict)
    under: Sequence[Sequence[str]] = ((),)
    """Commands before Python's: one run for each."""
    minutes: float = 30
    """The most that each of its runs may take."""
    lent_minutes: float = 2
    """The same in a run with --minutes."""
    only_records: bool = False
    """Nothing is asserted: what was measured has to be read."""


STEPS = (
    Step(
        1,
        "the suite",
        "every kind of model, pinned and pageable memory, any budget, graphs, a lost card, what is taken for granted of streams",
        ["tests/gpu", "-k", "not thousand and not test_measurements"],
        lent_minutes=4,
    ),
    Step(
        2,
        "1,000 snapshots with delays",
        "no delay on either stream makes a checkpoint hold a byte of another step; and a missing fence does show",
        ["tests/gpu/test_snapshots.py", "-k", "thousand or delays_show"],
        minutes=60,
        lent_minutes=3,
    ),
    Step(
        3,
        "step time with and without snapshots",
        "what a save really costs a training step on this machine",
        ["tests/gpu/test_measurements.py", "-k", "step_time"],
        only_records=True,
    ),
    Step(
        4,
        "saves and loads of device tensors",
        "fastckpt.save, save_async and load beside torch.save and torch.load",
        ["tests/gpu/test_measurements.py", "-k", "save_and_load"],
        only_records=True,
    ),
    Step(
        5,
        "pinned memory for a whole state",
        "how much can be pinned here, how long that takes, and how fast copies into it are",
        ["tests/gpu/test_measurements.py", "-k", "pinned"],
        only_records=True,
    ),
    Step(
        6,
        "what torch's own async_save stores",
        "whether DefaultStager saves weights of before the update on a card, too, as it does on the model of one",
        ["tests/gpu/test_measurements.py", "-k", "async_save"],
        lent_minutes=1,
        only_records=True,
    ),
    Step(
        7,
        "torch's CUDA sanitizer",
        "streams are ordered: torch's own detector, which sees operators but neither the host nor parts of tensors",
        ["tests/gpu/test_snapshots.py", "-k", "hold_the_state or never_waits"],
        environment={"TORCH_CUDA_SANITIZER": "1"},
    ),
    Step(
        8,
        "compute-sanitizer: memcheck, racecheck",
        "copies and our own kernel stay within their memory, nothing that is freed is read, and the kernel's threads do not race",
        # One model: the sanitizer takes minutes to load all of torch's kernels.
        [
            "tests/gpu/test_snapshots.py",
            "tests/gpu/test_fingerprints.py",
            "-k",
            "(hold_the_state and adamw_fused) or those_of_numpy",
            "-o",
            "timeout=1500",
        ],
        # Without torch's cache each tensor is memory of its own, whose borders the sanitizer knows.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        under=[
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)]
            for tool in ("memcheck", "racecheck")
        ],
        minutes=60,
        lent_minutes=3,
    ),
)
_LEAST_S = 20.0
"""With less left, starting torch and the card takes all of it."""


class Clock:
    """How long a step may still take, in a run on a machine that is only lent."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def limit_s(self, step: Step) -> float:
        """0: there is no time left for it."""
        if self._end is None:
            return 60 * step.minutes
        left = self._end - time.monotonic()
        return min(60 * step.lent_minutes, left) if left >= _LEAST_S else 0.0


@dataclass
class Outcome:
    step: Step
    outcome: str
    """passed, recorded, failed or skipped."""
    why: str = ""
    seconds: float = 0.0
    tests: dict[str, int] = field(default_factory=dict)
    recorded: list[Any] = field(default_factory=list)
    log_tail: str = ""

    def as_json(self) -> dict[str, Any]:
        found = {
            "step": self.step.number,
            "title": self.step.title,
            "shows": self.step.shows,
            "outcome": self.outcome,
            "why": self.why,
            "seconds": round(self.seconds, 1),
            "tests": self.tests,
            "recorded": self.recorded,
        }
        return {**found, "log": self.log_tail} if self.log_tail else found


# -- what it runs on -----------------------------------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """Of this machine. Called in a process of its own, which holds no memory of the card later."""
    import torch

    import fastckpt
    from tests.gpu.machines import why_unavailable

    fake = os.environ.get(CHOICE) == FAKE
    found: dict[str, Any] = {
        "missing": why_unavailable(),
        "versions": {
            "fastckpt": fastckpt.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "kernel": platform.release(),
        },
        "rehearsal": fake,
        "card": {"name": "the test device of tests/fakegpu"} if fake else None,
        "driver": None,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if not fake and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["card"] = {
            "name": card.name,
            "bytes": card.total_memory,
            "compute capability": f"{card.major}.{card.minor}",
            "cards": torch.cuda.device_count(),
        }
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"], check=False, capture_output=True, text=True
    )
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def described() -> dict[str, Any]:
    code = "import json; from tests.gpu.first_run import describe; print(json.dumps(describe()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def commit() -> str | None:
    """Of the sources; with a + if they have been changed since. FASTCKPT_GPU_COMMIT, where the sources come without git."""
    if told := os.environ.get("FASTCKPT_GPU_COMMIT"):
        return told
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() + ("+" if changed.stdout.strip() else "")


# -- running a step ------------------------------------------------------------------------------------------------------


def run(step: Step, folder: Path, quick: bool, clock: Clock) -> Outcome:
    if os.environ.get(CHOICE) == FAKE and step.number in (7, 8):
        return Outcome(step, "skipped", "this is a tool for CUDA, and this is a rehearsal on the test device")
    prefixes: list[list[str]] = []
    for command in step.under:
        if not command:
            prefixes.append([])
            continue
        tool = shutil.which(command[0]) or shutil.which(command[0], path="/usr/local/cuda/bin")
        if tool is None:
            return Outcome(step, "skipped", f"there is no {command[0]} (it comes with the CUDA toolkit)")
        prefixes.append([tool, *command[1:]])
    total = Outcome(step, "recorded" if step.only_records else "passed")
    for prefix in prefixes:
        limit_s = clock.limit_s(step)
        if not limit_s:
            _add(total, Outcome(step, "skipped", "no time was left"))
            break
        _add(total, _run_once(step, prefix, folder, quick, limit_s))
    return total


def _add(total: Outcome, one: Outcome) -> None:
    total.seconds += one.seconds
    total.recorded += one.recorded
    for kind, n in one.tests.items():
        total.tests[kind] = total.tests.get(kind, 0) + n
    if one.outcome in ("failed", "skipped") and total.outcome != "failed":
        total.outcome = one.outcome
    total.why = "; ".join(filter(None, [total.why, one.why]))
    total.log_tail += one.log_tail


def _run_once(step: Step, prefix: list[str], folder: Path, quick: bool, limit_s: float) -> Outcome:
    name = "-".join([str(step.number), *prefix[1:3]]).replace("--", "")
    log, report, records = (folder / f"step-{name}.{ending}" for ending in ("log", "xml", "jsonl"))
    command = [
        *prefix, sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-q", "-ra",
        f"--junitxml={report}", *step.pytest,
    ]  # fmt: skip
    environment = {**os.environ, **step.environment, "FASTCKPT_GPU_RECORD": str(records)}
    if quick:
        for variable, value in {
            "SNAPSHOTS": "20",
            "STATE_MB": "8",
            "ROUNDS": "2",
            "PINNED_BYTES": str(1 << 27),
        }.items():
            environment.setdefault(f"FASTCKPT_GPU_{variable}", value)
    began = time.perf_counter()
    with log.open("wb") as out:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, check=False, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                timeout=limit_s,
            )  # fmt: skip
            status: int | None = done.returncode
        except subprocess.TimeoutExpired:
            status = None
    outcome = Outcome(step, "passed", seconds=time.perf_counter() - began, tests=_counts(report))
    if records.exists():
        outcome.recorded = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    ran = outcome.tests.get("passed", 0) + outcome.tests.get("failed", 0)
    tool = prefix[2] if prefix else "pytest"
    if status is None:
        outcome.outcome, outcome.why = "failed", f"{tool} was ended after {limit_s:.0f} s"
    elif status == SANITIZER_FOUND and prefix:
        outcome.outcome, outcome.why = "failed", f"{tool} reports errors"
    elif status < 0:
        outcome.outcome, outcome.why = "failed", f"{tool} was killed by signal {-status}"
    elif status != 0:
        failed = outcome.tests.get("failed", 0)
        outcome.outcome, outcome.why = "failed", f"{failed} tests failed" if failed else f"{tool} exit status {status}"
    elif not ran:
        outcome.outcome, outcome.why = "skipped", "; ".join(_reasons(report)) or "no test was found"
    if outcome.outcome == "failed":
        tail = log.read_text(encoding="utf-8", errors="replace")[-6000:]
        outcome.log_tail = tail.replace(str(ROOT), ".").replace(str(folder), "$LOGS")
    return outcome


def _cases(report: Path) -> list[ET.Element]:
    try:
        return list(ET.parse(report).getroot().iter("testcase"))
    except (OSError, ET.ParseError):  # killed before it was written
        return []


def _counts(report: Path) -> dict[str, int]:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in _cases(report):
        kinds = {child.tag for child in case}
        counts["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def _reasons(report: Path) -> list[str]:
    found = (skipped.get("message", "") for case in _cases(report) for skipped in case.iter("skipped"))
    return sorted(set(found))


# -- the result ----------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    card, versions = result["card"], result["versions"]
    lines = [
        f"# Run on {card['name']}, {result['date'][:10]}" + (" (a rehearsal: no card)" if result["rehearsal"] else ""),
        "",
        f"torch {versions['torch']}, CUDA {versions['cuda']}, driver {result['driver']}, Python {versions['python']}, "
        f"fastckpt {versions['fastckpt']} ({result['commit']}), seed {result['seed']}",
        "",
        "| step | | outcome | tests | s | what it shows |",
        "|---|---|---|---|---|---|",
    ]
    for one in result["steps"]:
        outcome = f"**{one['outcome']}**" + (f": {one['why']}" if one["why"] else "")
        tests = ", ".join(f"{n} {kind}" for kind, n in one["tests"].items() if n)
        cells = [one["step"], one["title"], outcome, tests, one["seconds"], one["shows"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    for one in result["steps"]:
        for record in one["recorded"]:
            lines += ["", f"Step {one['step']}, {record['name']}:", "", "```json"]
            lines += [json.dumps(record["value"], indent=1, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"


def chosen(text: str) -> list[Step]:
    numbers = {int(number) for number in text.split(",")}
    unknown = numbers - {step.number for step in STEPS}
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no step {min(unknown)}")
    return [step for step in STEPS if step.number in numbers]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="first_run", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--steps", type=chosen, default=list(STEPS), help="numbers, joined by commas; all by default")
    parser.add_argument("--minutes", type=float, help="for all steps together; each has a limit of its own, too")
    parser.add_argument("--quick", action="store_true", help="20 snapshots, small states: tries the run itself")
    parser.add_argument(
        "--out", type=Path, help="folder of the result; tests/gpu/results, or a temporary one in a rehearsal"
    )
    options = parser.parse_args(arguments)
    clock = Clock(options.minutes)
    about = described()
    missing = about.pop("missing")
    if missing:
        print(f"Nothing was run: {missing}.")
        return 2
    seed = int(os.environ.setdefault("FASTCKPT_GPU_SEED", str(int.from_bytes(os.urandom(4), "big"))))
    folder = Path(tempfile.mkdtemp(prefix="fastckpt-gpu-"))
    now = datetime.now(timezone.utc)
    result: dict[str, Any] = {"date": now.isoformat(timespec="seconds"), **about, "commit": commit(), "seed": seed}
    result |= {"quick": options.quick, "steps": []}
    out = options.out or (folder if about["rehearsal"] else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"[^a-z0-9]+", "-", about["card"]["name"].lower()).strip("-")
    path = out / f"{now:%Y-%m-%d-%H%M}-{card}.json"
    print(f"{about['card']['name']}, torch {about['versions']['torch']}; logs in {folder}; FASTCKPT_GPU_SEED={seed}\n")
    for step in options.steps:
        print(f"Step {step.number}, {step.title}. It shows: {step.shows}.", flush=True)
        outcome = run(step, folder, options.quick, clock)
        result["steps"].append(outcome.as_json())
        print(
            f"  {outcome.outcome} in {outcome.seconds:.0f} s" + (f": {outcome.why}" if outcome.why else ""), flush=True
        )
        # After each step: what is known stays known if the next one takes the machine with it.
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print("\n" + table(result).partition("\nStep ")[0])
    print(f"Result: {path}")
    return int(any(one["outcome"] == "failed" for one in result["steps"]))


if __name__ == "__main__":
    sys.exit(main())
