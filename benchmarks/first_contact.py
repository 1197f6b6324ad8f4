"""What somebody meets who tries fastckpt: the import, the first calls against later ones, one tensor of an object in S3.

    make bench-first-contact                  # ARGS="--json FILE"
    python -m tests.s3server .venv/bin/python benchmarks/first_contact.py    # with the row of S3: a real server on loopback

Each row stands beside its floor, measured in the same run, in turns: the copy alone, into fresh memory or into memory that is there.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastckpt
from fastckpt.host.pages import fresh_pages

N_TENSORS, TENSOR_BYTES = 113, 4 << 20
ROUNDS = 5
IMPORTS = """
import time, torch
began = time.perf_counter()
import fastckpt, sys
print(time.perf_counter() - began)
print(*[name for name in ("torch.distributed.tensor", "numba", "boto3", "obstore", "matplotlib") if name in sys.modules])
"""


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median(values: list[float]) -> float:
    return statistics.median(values)


def import_row() -> dict[str, Any]:
    """Seconds beyond `import torch`, bytecode being there."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found, loaded = [], ""
    for number in range(ROUNDS + 1):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True, env=environment
        )
        seconds, loaded = done.stdout.split("\n")[:2]
        if number:
            found.append(float(seconds))
    return {
        "row": "import fastckpt beyond import torch",
        "s": median(found),
        "bar s": 0.06,
        "heavy modules": loaded.split(),
    }


def copied(sources: list[torch.Tensor], target: np.ndarray[Any, Any]) -> None:
    """By two threads, as save_async does here."""

    def some(first: int) -> None:
        for number in range(first, len(sources), 2):
            at = number * TENSOR_BYTES
            target[at : at + TENSOR_BYTES] = sources[number].numpy().view(np.uint8)

    threads = [threading.Thread(target=some, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def save_async_rows(folder: Path) -> list[dict[str, Any]]:
    state = {f"w{n}": torch.randn(TENSOR_BYTES // 4) for n in range(N_TENSORS)}
    tensors, n_bytes = list(state.values()), N_TENSORS * TENSOR_BYTES
    warm = np.zeros(n_bytes, np.uint8)
    found: dict[str, list[float]] = {
        name: [] for name in ("first", "later", "durable", "save", "fresh copy", "warm copy")
    }
    for _ in range(ROUNDS):
        fastckpt.release_memory()
        for name in ("first", "later"):
            began = time.perf_counter()
            handle = fastckpt.save_async(state, folder / "async")
            found[name].append(time.perf_counter() - began)
            handle.wait()
            if name == "later":
                found["durable"].append(time.perf_counter() - began)
        found["save"].append(timed(lambda: fastckpt.save(state, folder / "sync")))
        found["fresh copy"].append(timed(lambda: copied(tensors, fresh_pages(n_bytes))))
        found["warm copy"].append(timed(lambda: copied(tensors, warm)))
    values = {name: median(seconds) for name, seconds in found.items()}
    mb = f"{n_bytes / 1e6:.0f} MB"
    return [
        {
            "row": f"save_async of {mb}: blocked, first call",
            "s": values["first"],
            "bar s": 0.12,
            "floor s": values["fresh copy"],
        },
        {
            "row": f"save_async of {mb}: blocked, later calls",
            "s": values["later"],
            "bar s": 0.06,
            "floor s": values["warm copy"],
        },
        {"row": f"save_async of {mb}: durable / save", "ratio": values["durable"] / values["save"], "bar ratio": 1.15},
    ]


def one_run(folder: Path) -> tuple[list[float], list[float]]:
    """Seconds that each save has kept training, in save_now and in the hook of the next update; seconds of each step."""
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(38)])
    optim = torch.optim.AdamW(model.parameters())
    x = torch.randn(256, 1024)
    kept: list[float] = []
    steps: list[float] = []
    state = {"model": model, "optim": optim}
    with fastckpt.Checkpointer(folder, state, every=None, keep=fastckpt.Keep(last=1), spot=None) as ckpt:
        for step in range(1, 10):
            began = time.perf_counter()
            model(x).square().mean().backward()
            stalled = ckpt.stats.stall_s
            optim.step()
            optim.zero_grad()
            if step > 2 and step % 2:
                kept[-1] += ckpt.stats.stall_s - stalled
                ckpt.wait()
            ckpt.step(step)
            steps.append(time.perf_counter() - began)
            if step % 2 == 0:
                kept.append(timed(functools.partial(ckpt.save_now, step)))
    return kept, steps


def checkpointer_row(folder: Path) -> dict[str, Any]:
    runs = [one_run(folder / f"run-{number}") for number in range(3)]
    first = median([kept[0] for kept, _ in runs])
    later = median([seconds for kept, _ in runs for seconds in kept[1:]])
    return {
        "row": "first save of a Checkpointer (478 MB, step 2): blocked, against later saves",
        "ratio": first / later,
        "bar ratio": 1.5,
        "first s": first,
        "later s": later,
        "s of step 2, while memory is made": median([steps[1] for _, steps in runs]),
        "s of step 4": median([steps[3] for _, steps in runs]),
    }


def s3_row() -> dict[str, Any] | None:
    root = os.environ.get("FASTCKPT_URL", "")
    if not root.startswith("s3://"):
        return None
    url = f"{root}/first-contact/one.fckpt"
    fastckpt.save({f"w{n}": torch.randn(1 << 18) for n in range(100)}, url)

    def fetch() -> None:
        with fastckpt.open(url) as reader:
            reader["w7"]

    fetch()
    return {
        "row": 'fastckpt.open("s3://…")[name], warm process',
        "s": median([timed(fetch) for _ in range(11)]),
        "bar s": 0.08,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [import_row(), *save_async_rows(folder), checkpointer_row(folder)]
    s3 = s3_row()
    rows += [s3] if s3 is not None else []
    for row in rows:
        figures = ", ".join(
            f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "row"
        )
        print(f"{row['row']}: {figures}")
    if options.json:
        about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "fastckpt": fastckpt.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
        }
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
