"""A training run that outlives its machine, and proof that nothing changed.

1. *reference* trains a small GPT on the English text that Python ships (``pydoc_data.topics``) for N steps without a break.
2. *first* is the same run with a ``fastckpt.Checkpointer``. In the middle a (fake) EC2 metadata service posts an interruption notice:
   the final save commits, and the process exits with 75.
3. *second*, a new process that knows nothing but the URL, restores and finishes.

Then every loss, every parameter, the optimizer, the scheduler, the data position and all random generators of (2) and (3) are compared
with (1), bit for bit. The exit code is 0 if they are equal and 1 if not.

    python examples/demo.py [--steps N] [--ranks N] [--out DIR] [--json] [--forget PART]

``--ranks 4`` is another demo: four processes train, one is killed, three go on (``demo_ranks.py``).

The repository is a local directory, or what FASTCKPT_URL names (``s3://bucket/prefix``; a folder of its own is made there). A timeline
is drawn to demo-out/timeline.png (``--out``). ``--forget rng`` (or data, optimizer, scheduler, model) leaves one part out of the
checkpoint, to show that the comparison notices.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_parts import CONTEXT, GPT, Progress, differences, english_text, fingerprint, raw_bytes
from torch import Tensor, nn
from torch.nn import functional

import fastckpt
from fastckpt.testing.metadata_server import MetadataServer

SEED = 20
THREADS = 2  # float sums depend on how they are split: every process must use the same number of threads
BATCH = 8
WIDTH, LAYERS, HEADS = 256, 5, 8  # 4.0 M parameters: 48 MB of state with AdamW, 0.3 s a step on two cores
PARTS = ("model", "optimizer", "scheduler", "data", "rng")
EVERY = 5  # steps between checkpoints


# --- the data --------------------------------------------------------------------------------------------------------


class Batches:
    """Windows of the text in a shuffled order, which Python's generator draws anew for each epoch.

    NumPy's generator shifts each batch by some bytes and Python's lower-cases some batches, so that a run whose
    generators were not restored reads other bytes from its first step on.
    """

    def __init__(self) -> None:
        self.text = english_text()
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
        self.times: list[tuple[float, float]] = []
        """When each step began and ended, Unix seconds."""
        self.model, self.data = GPT(WIDTH, LAYERS, HEADS), Batches()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-3, total_steps=steps + 1)

    def train_to(
        self, last: int, what: str, after_step: Callable[[int, float], bool] = lambda step, loss: False
    ) -> None:
        """after_step: told the step and its loss; True ends the training."""
        show = Progress(what, last - self.step)
        while self.step < last:
            begun = time.time()
            tokens, targets = self.data.next()
            loss = functional.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1
            self.losses.append(loss.item())
            self.times.append((begun, time.time()))
            show(f"step {self.step}/{self.steps}  loss {loss.item():.3f}")
            if after_step(self.step, loss.item()):
                break
        show.end()

    @property
    def parts(self) -> dict[str, Any]:
        """What is saved: everything that the rest of the run depends on."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "data": self.data,
            "rng": fastckpt.RNGState(),
        }

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}


# --- the three processes ---------------------------------------------------------------------------------------------


def reference(args: argparse.Namespace) -> dict[str, Any]:
    run = Training(args.steps)
    run.train_to(args.steps, "reference")
    return {"losses": run.losses, "final": fingerprint(run.state()), "times": run.times}


def job(args: argparse.Namespace) -> dict[str, Any]:
    """The job that the machine runs, first and second time alike: all it needs is the URL."""
    run = Training(args.steps)
    log: list[tuple[float, str, dict[str, Any]]] = []

    def note(event: fastckpt.events.Event) -> None:
        log.append(
            (
                time.time(),
                type(event).__name__,
                {k: v for k, v in vars(event).items() if isinstance(v, (int, float, str))},
            )
        )

    parts = {name: part for name, part in run.parts.items() if name != args.forget}
    began = time.time()
    with (
        fastckpt.events.subscribe(note),
        fastckpt.Checkpointer(args.url, parts, every=fastckpt.Every(steps=EVERY), spot="ec2,signal") as ckpt,
    ):
        opened = time.time()
        run.step = ckpt.restore()
        restored = time.time()
        started_at = run.step
        saved_state = fingerprint(run.state()) if run.step else {}

        def after_step(step: int, loss: float) -> bool:
            print(f"step {step}", flush=True)  # the parent posts the notice when it has read enough of these
            return ckpt.step(step, metrics={"loss": loss})

        run.train_to(args.steps, args.role, after_step)
    result = {
        "started_at": started_at,
        "stopped_at": run.step,
        "losses": run.losses,
        "final": fingerprint(run.state()),
        "at_start": saved_state,
        "raw_bytes": raw_bytes(run.state()),
        "stall_seconds": ckpt.stats.stall_s,
        "deferred": ckpt.stats.deferred,
        "open_seconds": opened - began,
        "restore_seconds": restored - opened,
        "restored_at": (opened, restored),
        "times": run.times,
        "log": log,
        "exit_code": ckpt.exit_code,
    }
    return result


# --- the parent ------------------------------------------------------------------------------------------------------


def child(
    role: str, args: argparse.Namespace, work: Path, url: str, server: MetadataServer, notice_at: int | None
) -> dict[str, Any]:
    """Run one of the processes; its result, with `notice_s`, when the notice was posted."""
    command = [sys.executable, os.path.abspath(__file__), "--role", role, "--out", str(work), "--url", url]
    command += ["--steps", str(args.steps)] + (["--forget", args.forget] if args.forget else [])
    environment = {**os.environ, "AWS_EC2_METADATA_SERVICE_ENDPOINT": server.url, "AWS_EC2_METADATA_DISABLED": "false"}
    start, notice_s = time.time(), None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if notice_at is not None and notice_s is None and line.strip() == f"step {notice_at}":
                server.post_notice(in_s=120)
                notice_s = time.time()
    server.items.pop("spot/instance-action", None)  # the next process runs on another machine
    server.items.pop("spot/termination-time", None)
    expected = 75 if notice_at is not None else 0
    if process.returncode != expected:
        raise SystemExit(f"demo: the {role} process ended with exit code {process.returncode}, not {expected}")
    result: dict[str, Any] = json.loads((work / f"{role}.json").read_text())
    result.update(process_seconds=time.time() - start, process_times=(start, time.time()), notice_s=notice_s)
    return result


def run_role(role: str, args: argparse.Namespace) -> int:
    result = reference(args) if role == "reference" else job(args)
    (Path(args.out) / f"{role}.json").write_text(json.dumps(result, indent=1))
    return int(result.get("exit_code", 0))


def judge(ref: dict[str, Any], one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """What is not equal, in words. Floats are compared by their bits; JSON keeps all of them."""
    found = []
    if one["stopped_at"] != two["started_at"]:
        found.append(f"the first process stopped at step {one['stopped_at']}, the second began at {two['started_at']}")
    found += differences(one["final"], two["at_start"], "the restored state is not the one at the notice")
    losses, expected = one["losses"] + two["losses"], ref["losses"]
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


def saves(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each durable save: step, trigger, bytes, when it was called and when it was durable."""
    durable = [(at, fields) for at, kind, fields in result["log"] if kind == "CheckpointDurable"]
    return [{**fields, "durable_at": at, "called_at": at - fields["seconds"]} for at, fields in durable]


def run_all(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    begun = time.time()
    url = new_url(work)
    notice_at = args.steps // 2
    with MetadataServer() as server:
        ref = child("reference", args, work, url, server, None)
        one = child("first", args, work, url, server, notice_at)
        two = child("second", args, work, url, server, None)
    found = judge(ref, one, two)
    final = saves(one)[-1] if saves(one) else {}
    n_steps = [len(r["times"]) for r in (ref, one, two)]
    pace = [statistics.median(b - a for a, b in r["times"]) if r["times"] else math.nan for r in (ref, one, two)]
    result = {
        "ok": not found,
        "differences": found,
        "url": url,
        "steps": args.steps,
        "stopped_at": one["stopped_at"],
        "first_loss": ref["losses"][0],
        "last_loss": ref["losses"][-1],
        "values_compared": {part: sum(k.split("/")[0] == part for k in ref["final"]) for part in PARTS},
        "raw_bytes": one["raw_bytes"],
        "stored_bytes": final.get("stored_bytes"),
        "saves": len(saves(one)) + len(saves(two)),
        "stall_seconds": one["stall_seconds"],
        "final_save": {k: final.get(k) for k in ("step", "trigger", "seconds", "stored_bytes")},
        "notice_to_durable_seconds": final["durable_at"] - one["notice_s"] if final and one["notice_s"] else None,
        "restore_seconds": two["restore_seconds"],
        "step_seconds": pace,
        "steps_of_each": n_steps,
        "seconds": time.time() - begun,
    }
    result["timeline"] = draw(ref, one, two, Path(args.keep or "demo-out") / "timeline.png")
    return result


def draw(ref: dict[str, Any], one: dict[str, Any], two: dict[str, Any], target: Path) -> str | None:
    """The timeline of the two processes; the path, or None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("demo: matplotlib is not installed, no timeline is drawn", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    zero = one["process_times"][0]
    figure, axes = pyplot.subplots(figsize=(11, 3.6), layout="constrained")
    rows = {"process": 3, "steps": 2, "saves: call → durable": 1, "restore": 0}
    for result, color in ((one, "tab:blue"), (two, "tab:green")):
        start, end = result["process_times"]
        axes.barh(3, end - start, left=start - zero, height=0.5, color=color, alpha=0.35)
        lengths, starts = [b - a for a, b in result["times"]], [a - zero for a, _ in result["times"]]
        axes.barh([2] * len(starts), lengths, left=starts, height=0.5, color=color, edgecolor="white", linewidth=0.4)
        for save in saves(result):
            last = save["trigger"] == "notice"
            axes.barh(
                1, save["seconds"], left=save["called_at"] - zero, height=0.5, color="tab:red" if last else "tab:orange"
            )
            axes.annotate(f"{save['step']}", (save["called_at"] - zero, 1.3), fontsize=8)
    a, b = two["restored_at"]
    axes.barh(0, b - a, left=a - zero, height=0.5, color="tab:purple")
    if one["notice_s"] is not None:
        axes.axvline(one["notice_s"] - zero, color="tab:red", linestyle="--", linewidth=1)
        axes.annotate("notice", (one["notice_s"] - zero, 3.45), fontsize=9, color="tab:red")
    axes.set_yticks(list(rows.values()), list(rows))
    axes.set_ylim(-0.5, 3.8)
    axes.set_xlabel(
        "seconds since the first process was started (blue: before the notice, green: after; red: the final save)"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return str(target)


def table(result: dict[str, Any]) -> str:
    wait = result["notice_to_durable_seconds"]
    rows = [
        ("repository", result["url"]),
        ("state", f"{result['raw_bytes']:,} bytes"),
        (
            "a checkpoint",
            f"{result['stored_bytes']:,} bytes ({result['stored_bytes'] / result['raw_bytes']:.3f} of the state)",
        ),
        ("saves", f"{result['saves']} durable"),
        ("training stalled by saves", f"{result['stall_seconds']:.3f} s in {result['steps_of_each'][1]} steps"),
        ("a step, median", " / ".join(f"{s:.3f} s" for s in result["step_seconds"]) + "  (reference / first / second)"),
        ("final save, to durable", f"{result['final_save']['seconds']:.3f} s"),
        ("notice to durable", "?" if wait is None else f"{wait:.3f} s, the step under way included"),
        ("restore", f"{result['restore_seconds']:.3f} s"),
        ("timeline", result["timeline"] or "not drawn"),
        ("all three processes", f"{result['seconds']:.1f} s"),
    ]
    return "\n".join(f"  {name:<26}{value}" for name, value in rows)


def verdict(result: dict[str, Any]) -> str:
    if not result["ok"]:
        return "DIFFERENT: " + "; ".join(result["differences"])
    counts = ", ".join(f"{part} {n}" for part, n in result["values_compared"].items())
    return (
        f"IDENTICAL: stopped by a notice after step {result['stopped_at']}, finished step {result['steps']} in a new process; "
        f"all losses and values equal bit for bit ({counts})"
    )


def new_url(work: Path) -> str:
    """A place for this run alone: in the directory, or where FASTCKPT_URL says."""
    base = os.environ.get("FASTCKPT_URL") or str(work / "runs")
    return f"{base.rstrip('/')}/demo-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def run_demo(args: argparse.Namespace, work: Path) -> int:
    """The exit status. Prints the result."""
    if args.ranks is None:
        result = run_all(args, work)
        text = f"{table(result)}\n{verdict(result)}"
    else:
        import demo_ranks

        result = demo_ranks.run_all(args, new_url(work), work)
        text = f"{demo_ranks.table(result)}\n{demo_ranks.verdict(result)}"
    print(json.dumps(result, indent=1) if args.json else text)
    return 0 if result["ok"] else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24, help="training steps of the reference (default 24)")
    parser.add_argument("--ranks", type=int, help="2 to 12: so many processes train, one is killed, the others go on")
    parser.add_argument("--out", help="keep all files in this directory (default: only demo-out/timeline.png stays)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--forget", choices=PARTS, help="leave this part out of the checkpoint: must be noticed")
    parser.add_argument("--role", choices=("reference", "first", "second"), help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ranks is not None and not 2 <= args.ranks <= 12:
        parser.error("--ranks must be 2 to 12: a step has 12 samples")
    least = 8 if args.ranks is None else 12
    if args.steps < least:
        parser.error(f"--steps must be at least {least}")
    if args.role:
        return run_role(args.role, args)
    args.keep = args.out
    if args.out:
        work = Path(args.out)
        work.mkdir(parents=True, exist_ok=True)
        return run_demo(args, work)
    with tempfile.TemporaryDirectory(prefix="fastckpt-demo-") as temporary:
        return run_demo(args, Path(temporary))


if __name__ == "__main__":
    sys.exit(main())
