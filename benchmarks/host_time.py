"""What the call of save costs the training thread for each storage of a state with very many small ones.

    python benchmarks/host_time.py [--storages 10000] [--saves 9] [--device cpu|fakegpu|cuda] [--out DIR] [--json]

A chain of small layers with AdamW; a save after each step, into memory, waited for before the next, so that nothing runs beside the call.
Seconds are those of the thread itself (thread_time): what the caller's processor does; other jobs on the machine do not count. The first
save looks at everything, the others only at what has changed. `fakegpu`, the test device, adds its own simulation of every operation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fastckpt
from benchmarks import ROOT, measure, output
from fastckpt.store.memory import MemoryStore

STORAGES_A_LAYER = 8  # weight and bias, each with two moments and a step


def device_of(name: str) -> torch.device:
    if name == "fakegpu":
        from tests.fakegpu import device

        device.load()
        device.configure("lazy", races=False, poison=False, trap=False)
    return torch.device(name)


def measure_calls(n_storages: int, n_saves: int, where: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(n_storages // STORAGES_A_LAYER)]).to(where)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    step()
    calls, wall, state_dicts = [], [], []
    with fastckpt.Checkpointer(
        MemoryStore(), {"model": model, "optim": optimizer}, every=None, spot=None, keep=None
    ) as ckpt:
        for number in range(1, n_saves + 2):
            cpu, clock = time.thread_time(), time.perf_counter()
            model.state_dict(), optimizer.state_dict()
            state_dicts.append(time.thread_time() - cpu)
            cpu, clock = time.thread_time(), time.perf_counter()
            handle = ckpt.save_now(number)
            calls.append(time.thread_time() - cpu)
            wall.append(time.perf_counter() - clock)
            step()
            ckpt.step(number)
            handle.wait()
    found = len(model.state_dict()) * (STORAGES_A_LAYER // 2)

    def us(seconds: list[float]) -> dict[str, float]:
        each = [one / found * 1e6 for one in seconds]
        return {"median": statistics.median(each), "smallest": min(each), "largest": max(each)}

    later = slice(2, None)  # the second is the first whose hooks are trusted
    return {
        "storages": found,
        "first save, us a storage": calls[0] / found * 1e6,
        "later saves, us a storage": us(calls[later]),
        "later saves by the clock, us a storage": us(wall[later]),
        "of it torch's state_dict(), us a storage": us(state_dicts[later]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", type=int, default=10_000)
    parser.add_argument("--saves", type=int, default=9, help="after the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="a folder for the result")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of a table")
    args = parser.parse_args()
    result = {
        **output.head("host-time", measure.machine(ROOT)),
        "versions": {"fastckpt": fastckpt.__version__, "torch": str(torch.__version__)},
        "device": args.device,
        "saves": args.saves,
        **measure_calls(args.storages, args.saves, device_of(args.device)),
    }
    if args.out:
        output.save(result, Path(args.out), f"host-time-{args.device}")
    if args.json:
        print(json.dumps(result))
        return 0
    for name, value in result.items():
        if "us a storage" in name:
            text = (
                f"{value['median']:.2f} ({value['smallest']:.2f}–{value['largest']:.2f})"
                if isinstance(value, dict)
                else f"{value:.2f}"
            )
            print(f"{name:45} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
