"""A measurement in a process of its own: both ends of the file that it leaves its answer in.

Imports nothing heavy: what a worker imports is part of every contender's process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import ROOT

LIMIT = 600  # seconds for one process; the slowest takes some 15


def in_process(
    module: str,
    arguments: list[str],
    out: Path,
    *,
    python: str = sys.executable,
    before: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    limit_s: float = LIMIT,
) -> dict[str, Any]:
    """Runs a module in a process of its own, with `out` as its last argument; the JSON object that it writes there.

    Errors are named after the first argument. python: the interpreter. before: words of the command in front of it. variables: of the
    environment, above this process's own.
    """
    out.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    environment |= variables or {}
    command = [*before, python, "-m", module, *arguments, str(out)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"{arguments[0]}: no end after {limit_s:.0f} s"}
    if done.returncode != 0 or not out.exists():
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"{arguments[0]}: exit code {done.returncode}: {words[:300]}", "stderr": done.stderr[-4000:]}
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def answer(result: dict[str, Any], load_average: float, out: str) -> NoReturn:
    """Ends the process of a worker. load_average: from before it began."""
    Path(out).write_text(json.dumps({**result, "load_average": load_average, "at": time.time()}))
    sys.stdout.flush()
    os._exit(0)  # no waiting for a rival's threads, no complaints of a process group that nobody took down


def enter_rank(rank: int, settings: dict[str, Any]) -> None:
    """Let torch find the other ranks of a job on this machine. settings: with "ranks", how many there are, and the "port" of rank 0."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(settings["ranks"]),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(settings["ranks"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(settings["port"]),
    )
