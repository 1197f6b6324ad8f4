"""Runs the tests on the Pythons and torches that people have, in an environment of its own for each pair, one after the other.

    make test-matrix                                # all pairs; some 15 minutes each on two cores, most of it tests and torch's download
    make test-matrix ARGS="--only 3.12+2.11"        # of one pair
    make test-matrix ARGS="--only 3.12+2.11 --quick"    # what `.ci/run` adds to its own pair: the kinds of tests that found differences

Each environment is made in a temporary folder, with torch's ordinary wheel (gigabytes), and deleted afterwards. A Python that is not on
this machine is *not run*; exit status 0 means that no pair failed, not that all were run: the table says which were.

Writes tests/results/matrix.json, and prints the table.
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

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tests" / "results" / "matrix.json"


@dataclass(frozen=True)
class Pair:
    python: str
    torch: str
    """The patch release that is installed."""
    why: str

    @property
    def name(self) -> str:
        return f"{self.python}+{self.torch.rpartition('.')[0]}"


PAIRS = (
    Pair("3.10", "2.6.0", "the oldest of both"),
    Pair("3.11", "2.13.0", "what fastckpt is developed with"),
    Pair("3.12", "2.11.0", "Ubuntu 24.04's Python; a GPU node's torch"),
    Pair("3.13", "2.14.1", "the newest torch"),
    Pair("3.14", "2.14.1", "the newest of both"),
)
SUITES = ("tests/unit", "tests/process", "tests/differential", "tests/golden", "tests/crash")
QUICK = (
    "tests/unit",
    "tests/process",
    "tests/golden",
    "tests/differential/test_python_state.py",
    "tests/crash/test_process.py",
)
# What the tests import. moonclip, mypy, ruff and numba are no part of what is asked here; matplotlib draws the demo's picture.
TOOLS = (
    "setuptools>=77",
    "hypothesis>=6.100",
    "matplotlib>=3.8",
    "psutil>=5.9",
    "pytest>=8.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
)
NEEDS = ("numpy", "zstandard", "xxhash", "safetensors", "boto3")


@dataclass
class Outcome:
    pair: Pair
    outcome: str = "passed"
    """passed, failed or not run."""
    why: str = ""
    python: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    tests: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    demo: str = "not run"
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "pair": self.pair.name, "python": self.python, "versions": self.versions, "outcome": self.outcome, "why": self.why,
            "tests": self.tests, "failed": self.failed, "demo": self.demo, "seconds": round(self.seconds),
        }  # fmt: skip


def interpreter(version: str) -> str | None:
    """Of that version with venv and headers: on PATH, or one of pyenv's."""
    check = f"import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    beside = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"), reverse=True)
    for candidate in [f"python{version}", *map(str, beside), sys.executable]:
        path = shutil.which(candidate)
        if path and not subprocess.run([path, "-c", check], check=False, capture_output=True).returncode:
            return path
    return None


def run_pair(pair: Pair, suites: Sequence[str], demo: bool, log: Path) -> Outcome:
    began = time.monotonic()
    outcome = Outcome(pair)
    python = interpreter(pair.python)
    if python is None:
        outcome.outcome, outcome.why = "not run", f"there is no Python {pair.python} here"
        return outcome
    with tempfile.TemporaryDirectory(prefix=f"fastckpt-{pair.name}-") as folder, log.open("w") as out:
        home = Path(folder)
        try:
            _prepare(python, pair, home, out)
        except subprocess.CalledProcessError as error:
            outcome.outcome, outcome.why = (
                "failed",
                f"the environment could not be made: {Path(error.cmd[0]).name} {error.cmd[1:4]}",
            )
            outcome.seconds = time.monotonic() - began
            return outcome
        inside = str(home / "env" / "bin" / "python")
        sources = home / "sources"
        outcome.python, outcome.versions = _versions(inside)
        environment = {**os.environ, "PYTHONPATH": str(sources)}
        report = home / "report.xml"
        done = subprocess.run(
            [inside, "-m", "pytest", "-q", "-ra", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={report}", *suites],
            cwd=sources, env=environment, check=False, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
        outcome.tests, outcome.failed = _counts(report)
        if done.returncode:
            outcome.outcome = "failed"
            outcome.why = (
                f"{len(outcome.failed)} tests failed" if outcome.failed else f"pytest ended with {done.returncode}"
            )
        if demo:
            done = subprocess.run(
                [inside, "examples/demo.py", "--out", str(home / "demo")],
                cwd=sources, env=environment, check=False, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip
            outcome.demo = "failed" if done.returncode else "passed"
            if done.returncode:
                outcome.outcome, outcome.why = "failed", "; ".join(filter(None, [outcome.why, "the demo failed"]))
    outcome.seconds = time.monotonic() - began
    return outcome


def _prepare(python: str, pair: Pair, home: Path, out: Any) -> None:
    """An environment with that torch, and a copy of the sources with kernels built for that Python."""

    def run(*command: str, **more: Any) -> None:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **more)

    run(python, "-m", "venv", str(home / "env"))
    inside = str(home / "env" / "bin" / "python")
    install = [inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-cache-dir"]
    run(*install, f"torch=={pair.torch}")
    run(*install, "--upgrade", *TOOLS, *NEEDS)
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")  # fmt: skip
    sources = home / "sources"
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, sources / name)
    run(
        inside,
        "setup.py",
        "--quiet",
        "build_ext",
        "--inplace",
        cwd=sources,
        env={**os.environ, "FASTCKPT_REQUIRE_NATIVE": "1"},
    )


def _versions(inside: str) -> tuple[str, dict[str, str]]:
    code = (
        "import json, platform, importlib.metadata as m; "
        f"print(json.dumps([platform.python_version(), {{n: m.version(n) for n in {('torch', *NEEDS)!r}}}]))"
    )
    python, versions = json.loads(
        subprocess.run([inside, "-c", code], check=True, capture_output=True, text=True).stdout
    )
    return python, versions


def _counts(report: Path) -> tuple[dict[str, int], list[str]]:
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    try:
        cases = list(ET.parse(report).getroot().iter("testcase"))
    except (OSError, ET.ParseError):  # killed before it was written
        return counts, failed
    for case in cases:
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        if kind == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return counts, failed


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| Python | torch | tests | demo | |", "|---|---|---|---|---|"]
    for one in outcomes:
        tests = ", ".join(f"{n} {kind}" for kind, n in one["tests"].items() if n)
        torch = one["versions"].get("torch", one["pair"].partition("+")[2])
        lines.append(
            f"| {one['python'] or one['pair'].partition('+')[0]} | {torch} | {tests} | {one['demo']} | **{one['outcome']}**"
            + (f": {one['why']}" if one["why"] else "")
            + " |"
        )
    return "\n".join(lines)


def commit() -> str | None:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="matrix", description=__doc__.partition("\n")[0] if __doc__ else "")
    names = [pair.name for pair in PAIRS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PAIR", help=f"some of {', '.join(names)}"
    )
    parser.add_argument("--quick", action="store_true", help="fewer tests, no demo, no result file")
    parser.add_argument("--logs", type=Path, help="folder for the logs; a temporary one by default")
    options = parser.parse_args(arguments)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="fastckpt-matrix-"))
    logs.mkdir(parents=True, exist_ok=True)
    known = {one["pair"]: one for one in json.loads(RESULT.read_text())["pairs"]} if RESULT.exists() else {}
    found = []
    for pair in PAIRS:
        if pair.name not in options.only:
            continue
        log = logs / f"{pair.name}.log"
        print(f"Python {pair.python} with torch {pair.torch} ({pair.why}); log: {log}", flush=True)
        outcome = run_pair(pair, QUICK if options.quick else SUITES, not options.quick, log)
        one = {
            **outcome.as_json(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
        }
        found.append(one)
        known[pair.name] = one
        print(f"  {one['outcome']} in {one['seconds']} s {one['why']}", *one["failed"], sep="\n    ", flush=True)
        if outcome.outcome == "failed":
            print(_tail(log), flush=True)
        if not options.quick:
            RESULT.parent.mkdir(exist_ok=True)
            ordered = [known[name] for name in names if name in known]
            machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "kernel": platform.release()}
            RESULT.write_text(json.dumps({**machine, "pairs": ordered}, indent=1) + "\n")
    print("\n" + table(found))
    total = {kind: sum(one["tests"].get(kind, 0) for one in found) for kind in ("passed", "failed", "skipped")}
    print(f"matrix: {total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return int(any(one["outcome"] == "failed" for one in found))


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-60:]
    return "\n".join(re.sub(r"^", "    | ", line) for line in lines)


if __name__ == "__main__":
    sys.exit(main())
