"""Train, stop, continue in a new process, and prove that nothing changed.

Three processes train one small GPT on the English text that Python ships (``pydoc_data.topics``):

1. *reference* trains N steps without a break;
2. *first* trains to step k, saves with ``fastckpt.save`` and exits;
3. *second* starts fresh, loads with ``fastckpt.load`` (``weights_only=True``) and trains on to step N.

Then every loss, every parameter, the optimizer, the scheduler, the data position and all three random generators
of (2) and (3) are compared with (1), bit for bit. The exit code is 0 if they are equal and 1 if not.

    python examples/demo.py [--steps N] [--out DIR] [--json] [--forget PART]

``--forget rng`` (or data, optimizer, scheduler, model) leaves one part out of the restore, to show that the comparison
notices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SEED = 20
THREADS = 2  # float sums depend on how they are split: every process must use the same number of threads
CONTEXT, BATCH = 128, 8
WIDTH, LAYERS, HEADS = 256, 5, 8  # 4.0 M parameters: 48 MB of state with AdamW, 0.3 s a step on two cores
PARTS = ("model", "optimizer", "scheduler", "data", "rng")
TIMINGS = 3  # saves and loads that are timed, fastckpt and torch in turns; the table shows medians


# --- the model -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(b, t, WIDTH)))
        mlp: Tensor = self.mlp(self.norm2(x))
        mixed: Tensor = x + self.drop(mlp)
        return mixed


class GPT(nn.Module):
    """Byte-level GPT. Input and output embedding are one tensor, so that the checkpoint has a shared storage in it."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


# --- the data --------------------------------------------------------------------------------------------------------


class Batches:
    """Windows of the text in a shuffled order, which Python's generator draws anew for each epoch.

    NumPy's generator shifts each batch by some bytes and Python's lower-cases some batches, so that a run whose
    generators were not restored reads other bytes from its first step on.
    """

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        self.text = torch.tensor(list(text.encode()), dtype=torch.int64)
        self.epoch, self.position = -1, 0
        self.order: list[int] = []

    def next(self) -> tuple[Tensor, Tensor]:
        if self.position + BATCH > len(self.order):
            self.order = list(range((len(self.text) - 1) // CONTEXT - 1))
            random.shuffle(self.order)
            self.epoch, self.position = self.epoch + 1, 0
        windows = self.order[self.position : self.position + BATCH]
        self.position += BATCH
        shift = int(np.random.randint(CONTEXT))
        rows = torch.stack([self.text[w * CONTEXT + shift : (w + 1) * CONTEXT + shift + 1] for w in windows])
        if random.random() < 0.25:
            upper = (rows >= ord("A")) & (rows <= ord("Z"))
            rows = torch.where(upper, rows + 32, rows)
        return rows[:, :-1], rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "order": torch.tensor(self.order, dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.order = state["epoch"], state["position"], state["order"].tolist()


# --- the random generators, in types that torch's restricted unpickler reads -----------------------------------------


def rng_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "torch": torch.get_rng_state(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    n = state["numpy"]
    np.random.set_state((n["name"], n["keys"].numpy().astype(np.uint32), n["position"], n["has_gauss"], n["gauss"]))
    torch.set_rng_state(state["torch"])


# --- one training run ------------------------------------------------------------------------------------------------


class Training:
    def __init__(self, steps: int) -> None:
        torch.set_num_threads(THREADS)
        torch.use_deterministic_algorithms(True)
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        self.step, self.steps = 0, steps
        self.losses: list[float] = []
        self.model, self.data = GPT(), Batches()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-3, total_steps=steps + 1)

    def train_to(self, last: int, what: str) -> None:
        show = Progress(what, last - self.step)
        while self.step < last:
            tokens, targets = self.data.next()
            loss = functional.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
            self.losses.append(loss.item())
            show(f"step {self.step}/{self.steps}  loss {loss.item():.3f}")
        show.end()

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "data": self.data.state_dict(),
            "rng": rng_state(),
        }

    def restore(self, state: dict[str, Any], forget: str | None) -> None:
        restore: dict[str, Callable[[Any], object]] = {
            "model": self.model.load_state_dict,
            "optimizer": self.optimizer.load_state_dict,
            "scheduler": self.scheduler.load_state_dict,
            "data": self.data.load_state_dict,
            "rng": set_rng_state,
        }
        for part, load in restore.items():
            if part != forget:
                load(state[part])
        self.step = state["step"]


class Progress:
    """One line that moves on a terminal, a few plain lines elsewhere. On stderr: stdout is for the result."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, max(total, 1), 0
        self.live = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        self.done += 1
        if self.live:
            full = 24 * self.done // self.total
            print(f"\r{self.what:<10} [{'#' * full}{'.' * (24 - full)}] {text}", end="", file=sys.stderr, flush=True)
        elif self.done == self.total or self.done % max(self.total // 4, 1) == 0:
            print(f"{self.what:<10} {text}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print(file=sys.stderr)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}/{i}")
    else:  # the generator of Python has 625 integers in one tuple: one leaf
        yield name, value


def fingerprint(state: dict[str, Any]) -> dict[str, str]:
    """One digest for each tensor (its type, shape and bytes) and the exact text of everything else."""
    prints = {}
    for name, value in leaves(state):
        if isinstance(value, Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest = hashlib.sha256(data.tobytes()).hexdigest()
            prints[name] = f"{value.dtype} {list(value.shape)} {digest}"
        else:
            text = value.hex() if isinstance(value, float) else repr(value)
            prints[name] = text if len(text) <= 64 else hashlib.sha256(text.encode()).hexdigest()
    return prints


def raw_bytes(state: dict[str, Any]) -> int:
    """Bytes of the tensors; memory that two of them share counts once."""
    storages = [value.untyped_storage() for _, value in leaves(state) if isinstance(value, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


# --- the three processes ---------------------------------------------------------------------------------------------


def torch_save_durable(state: dict[str, Any], path: Path) -> None:
    """torch.save and the two fsyncs that fastckpt.save includes: without them the times would not compare."""
    torch.save(state, path)
    for place in (path, path.parent):
        fd = os.open(place, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def reference(work: Path, steps: int) -> dict[str, Any]:
    run = Training(steps)
    run.train_to(steps, "reference")
    return {"losses": run.losses, "final": fingerprint(run.state())}


def first(work: Path, steps: int, stop: int) -> dict[str, Any]:
    import fastckpt

    run = Training(steps)
    run.train_to(stop, "first")
    state = run.state()
    ours, theirs = work / "state.fckpt", work / "state.pt"
    seconds: dict[str, list[float]] = {"fastckpt": [], "torch": []}
    for _ in range(TIMINGS):
        seconds["torch"].append(timed(lambda: torch_save_durable(state, theirs))[0])
        seconds["fastckpt"].append(timed(lambda: fastckpt.save(state, ours))[0])
    return {
        "losses": run.losses,
        "saved": fingerprint(state),
        "raw_bytes": raw_bytes(state),
        "file_bytes": {"fastckpt": ours.stat().st_size, "torch": theirs.stat().st_size},
        "save_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "save_samples": seconds,
    }


def second(work: Path, steps: int, forget: str | None) -> dict[str, Any]:
    import fastckpt

    ours, theirs = work / "state.fckpt", work / "state.pt"
    seconds: dict[str, list[float]] = {"fastckpt": [], "torch": []}
    state: dict[str, Any] = {}
    for _ in range(TIMINGS):
        seconds["torch"].append(timed(lambda: torch.load(theirs))[0])
        taken, state = timed(lambda: fastckpt.load(ours))
        seconds["fastckpt"].append(taken)
    loaded = fingerprint(state)
    run = Training(steps)
    run.restore(state, forget)
    run.train_to(steps, "second")
    return {
        "losses": run.losses,
        "loaded": loaded,
        "final": fingerprint(run.state()),
        "load_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "load_samples": seconds,
    }


# --- the parent ------------------------------------------------------------------------------------------------------


def child(role: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    command = [sys.executable, os.path.abspath(__file__), "--role", role, "--out", str(work)]
    command += ["--steps", str(args.steps)] + (["--forget", args.forget] if args.forget else [])
    start = time.perf_counter()
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise SystemExit(f"demo: the {role} process ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads((work / f"{role}.json").read_text())
    result["process_seconds"] = time.perf_counter() - start
    return result


def run_role(role: str, args: argparse.Namespace) -> None:
    work, steps = Path(args.out), args.steps
    if role == "reference":
        result = reference(work, steps)
    elif role == "first":
        result = first(work, steps, steps // 2)
    else:
        result = second(work, steps, args.forget)
    (work / f"{role}.json").write_text(json.dumps(result, indent=1))


def differences(expected: dict[str, str], found: dict[str, str], what: str) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    bad = [name for name in names if expected.get(name) != found.get(name)]
    shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    return [f"{what}: {len(bad)} of {len(names)} differ: {shown}"] if bad else []


def judge(ref: dict[str, Any], one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """What is not equal, in words. Floats are compared by their bits; JSON keeps all of them."""
    found = differences(one["saved"], two["loaded"], "the loaded state is not the saved one")
    losses = one["losses"] + two["losses"]
    expected = ref["losses"]
    if not all(map(math.isfinite, expected)) or expected[-1] >= expected[0]:
        found.append(f"the reference did not learn: loss {expected[0]} at first, {expected[-1]} at last")
    steps = [i + 1 for i, (a, b) in enumerate(zip(expected, losses, strict=False)) if a.hex() != b.hex()]
    if len(losses) != len(expected):
        found.append(f"losses: {len(losses)} instead of {len(expected)}")
    if steps:
        i = steps[0] - 1
        found.append(f"losses: {len(steps)} differ, first at step {steps[0]}: {losses[i]!r} instead of {expected[i]!r}")
    for part in PARTS:
        a, b = ({k: v for k, v in r["final"].items() if k.split("/")[0] == part} for r in (ref, two))
        found += differences(a, b, f"{part} after the last step")
    return found


def table(result: dict[str, Any]) -> str:
    raw, ratio, files = result["raw_bytes"], result["ratio"], result["file_bytes"]
    save, load = result["save_seconds"], result["load_seconds"]
    rows = [
        ("", "fastckpt", "torch.save"),
        ("raw state, bytes", f"{raw:,}", f"{raw:,}"),
        ("file, bytes", f"{files['fastckpt']:,}", f"{files['torch']:,}"),
        ("file / raw", f"{ratio['fastckpt']:.3f}", f"{ratio['torch']:.3f}"),
        ("save, durable, seconds", f"{save['fastckpt']:.3f}", f"{save['torch']:.3f}"),
        ("load, seconds", f"{load['fastckpt']:.3f}", f"{load['torch']:.3f}"),
    ]
    return "\n".join(f"  {name:<24}{a:>14}{b:>14}" for name, a, b in rows)


def run_all(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    start = time.perf_counter()
    ref, one, two = (child(role, args, work) for role in ("reference", "first", "second"))
    found = judge(ref, one, two)
    return {
        "ok": not found,
        "differences": found,
        "steps": args.steps,
        "stopped_at": args.steps // 2,
        "losses": len(ref["losses"]),
        "first_loss": ref["losses"][0],
        "last_loss": ref["losses"][-1],
        "values_compared": {part: sum(k.split("/")[0] == part for k in ref["final"]) for part in PARTS},
        "raw_bytes": one["raw_bytes"],
        "file_bytes": one["file_bytes"],
        "ratio": {name: size / one["raw_bytes"] for name, size in one["file_bytes"].items()},
        "save_seconds": one["save_seconds"],
        "load_seconds": two["load_seconds"],
        "process_seconds": [one_of["process_seconds"] for one_of in (ref, one, two)],
        "seconds": time.perf_counter() - start,
    }


def verdict(result: dict[str, Any]) -> str:
    if not result["ok"]:
        return "DIFFERENT: " + "; ".join(result["differences"])
    counts = ", ".join(f"{part} {n}" for part, n in result["values_compared"].items())
    return (
        f"IDENTICAL: stopped after step {result['stopped_at']}, continued to {result['steps']} in a new process; "
        f"{result['losses']} losses and all values equal bit for bit ({counts})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="training steps of the reference (default 24)")
    parser.add_argument("--out", help="keep the files in this directory (default: a temporary one, removed)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--forget", choices=PARTS, help="leave this part out of the restore: must be noticed")
    parser.add_argument("--role", choices=("reference", "first", "second"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 4:
        parser.error("--steps must be at least 4")
    if args.role:
        run_role(args.role, args)
        return 0
    if args.out:
        work = Path(args.out)
        work.mkdir(parents=True, exist_ok=True)
        result = run_all(args, work)
    else:
        with tempfile.TemporaryDirectory(prefix="fastckpt-demo-") as temporary:
            result = run_all(args, Path(temporary))
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(table(result))
        print(f"  {'all three processes':<24}{result['seconds']:>13.1f}s")
        print(verdict(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
