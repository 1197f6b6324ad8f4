"""A job of several ranks that loses one, goes on with those that are left, and proof that nothing was lost or changed.

1. N ranks (processes, gloo) train a small GPT with FSDP2 and AdamW. `fastckpt.ElasticSampler` deals them the samples of one epoch.
   In the middle one rank is killed with SIGKILL. The others find out at their next exchange, and end.
2. N - 1 ranks start, restore the last durable checkpoint, and finish the epoch.
3. *reference*: N - 1 other ranks do the same from a copy of that checkpoint, and save nothing.

Then (2) is compared with (3), bit for bit; what (2) restored, with what (1) had at that step; and the samples of all steps with the order
that one process would have seen. The exit code is 0 if all is equal and 1 if not.

`demo.py --ranks N` runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_parts import Progress, differences
from demo_ranks_job import BATCH, EVERY, SEED, WRAPPER, samples_of
from torch.distributed import TCPStore

import fastckpt
from fastckpt.store.open import open_store

JOB = Path(__file__).with_name("demo_ranks_job.py")
SILENT_S = 120.0
"""A rank that says nothing for so long hangs."""


# --- the ranks of one start ------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What the ranks of one start have said."""

    ranks: int
    began_s: float = field(default_factory=time.time)
    seconds: float = 0.0
    restored_at: int = 0
    restore_s: float = 0.0
    durable: int | None = None
    samples: dict[int, dict[int, list[int]]] = field(default_factory=lambda: defaultdict(dict))
    """Of each step, of each rank."""
    losses: dict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    states: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    """Fingerprints of whole tensors, by when they were taken."""
    generators: dict[str, dict[int, dict[str, str]]] = field(default_factory=lambda: defaultdict(dict))
    """Fingerprints of each rank's random generators."""
    first_step_s: float | None = None
    """Unix time after the first step."""
    statuses: list[int] = field(default_factory=list)

    def hear(self, rank: int, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "restored":
            self.restored_at, self.restore_s = message["step"], max(self.restore_s, message["seconds"])
        elif kind == "step":
            self.samples[message["step"]][rank] = message["samples"]
            self.losses[message["step"]][rank] = message["loss"]
            self.first_step_s = self.first_step_s or message["at"]
            self.durable = max(filter(None, (self.durable, message["durable"])), default=None)
        else:
            self.generators[kind][rank] = message["own"]
            self.states[kind] |= message["shared"]

    def done(self, step: int) -> list[int]:
        """The samples of a step, in the order of the ranks that had them."""
        return [sample for rank in sorted(self.samples[step]) for sample in self.samples[step][rank]]


class Job:
    """Ranks of one start, as processes of their own. Their tracebacks go to files of `logs`."""

    def __init__(self, name: str, ranks: int, arguments: list[str], logs: Path) -> None:
        self.name, self.told = name, Told(ranks)
        self._lines: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        # The store at which the ranks meet is here, as torchrun has it in its agent: it outlives each of them.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._logs = [logs / f"{name.replace(' ', '-')}-rank-{rank}.log" for rank in range(ranks)]
        self.processes = [self._start(rank, arguments) for rank in range(ranks)]

    def _start(self, rank: int, arguments: list[str]) -> subprocess.Popen[str]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.told.ranks, "LOCAL_WORLD_SIZE": self.told.ranks}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        settings = {name: str(value) for name, value in {**place, **meeting, "OMP_NUM_THREADS": 1}.items()}
        with open(self._logs[rank], "w") as log:
            process = subprocess.Popen(
                [sys.executable, str(JOB), *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **settings},
            )
        threading.Thread(target=self._read, args=(rank, process), daemon=True).start()
        return process

    def _read(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # half a line, of a rank that was killed
                self._lines.put((rank, json.loads(line)))
        self._lines.put((rank, None))

    def messages(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """What the ranks say, until all of them have ended."""
        living = len(self.processes)
        while living:
            try:
                rank, message = self._lines.get(timeout=SILENT_S)
            except queue.Empty:
                raise SystemExit(f"demo: {self.name} has been silent for {SILENT_S:.0f} s\n{self.log}") from None
            if message is None:
                living -= 1
                continue
            self.told.hear(rank, message)
            yield rank, message
        self.told.statuses = [process.wait() for process in self.processes]
        self.told.seconds = time.time() - self.told.began_s

    @property
    def log(self) -> str:
        """The last lines that each rank has written to stderr."""
        found = [(rank, path.read_text(errors="replace").splitlines()[-12:]) for rank, path in enumerate(self._logs)]
        return "\n".join(line for rank, lines in found for line in (f"--- rank {rank}", *lines))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def job(name: str, ranks: int, arguments: list[str], logs: Path) -> Iterator[Job]:
    """No process outlives the block."""
    started = Job(name, ranks, arguments, logs)
    try:
        yield started
    finally:
        started.end()


# --- the three starts ------------------------------------------------------------------------------------------------


def follow(
    running: Job, show: Progress, steps: int, on_step: Callable[[int, int], None] = lambda rank, step: None
) -> None:
    """Draw progress until all ranks have ended. on_step: told each rank's steps."""
    for rank, message in running.messages():
        if message["kind"] == "step":
            step = message["step"]
            losses = running.told.losses[step]
            if len(losses) == running.told.ranks:
                show(f"step {step}/{steps}  loss {sum(losses.values()) / len(losses):.3f}")
            on_step(rank, step)
        elif message["kind"] == "restored" and message["step"] and rank == 0:
            words(f"   They have restored step {message['step']} in {message['seconds']:.1f} s.")
    show.end()


def loses_a_rank(ranks: int, arguments: list[str], steps: int, logs: Path) -> tuple[Told, dict[str, Any]]:
    """The first start, and what became of it."""
    victim, kill_after = ranks // 2, steps // 2 + 1
    killed: dict[str, Any] = {}
    with job(f"{ranks} ranks", ranks, arguments, logs) as running:

        def maybe_kill(rank: int, step: int) -> None:
            # Not while a save is under way: the others would wait for the dead rank's part of it before they end, for some 20 s.
            all_durable = running.told.durable == step - step % EVERY
            if rank == victim and not killed and step >= kill_after and (all_durable or step >= steps - 2):
                running.processes[victim].kill()
                killed.update(rank=victim, after_step=step, at=time.time())

        follow(running, Progress(running.name, steps), steps, maybe_kill)
        statuses = running.told.statuses
        if not killed:
            raise SystemExit(f"demo: the job ended before a rank was killed, with {statuses}\n{running.log}")
        if statuses[victim] != -signal.SIGKILL or 0 in statuses:
            raise SystemExit(
                f"demo: the ranks ended with {statuses}: expected −9 for rank {victim}, and no success of the others\n{running.log}"
            )
    killed["job_ended_s"] = time.time() - killed["at"]
    return running.told, killed


def finishes(name: str, ranks: int, arguments: list[str], steps: int, begin: int, logs: Path) -> Told:
    """The second start, or the reference."""
    with job(name, ranks, arguments, logs) as running:
        follow(running, Progress(name, steps - begin), steps)
        if any(running.told.statuses):
            raise SystemExit(f"demo: the ranks of {name} ended with {running.told.statuses}\n{running.log}")
    return running.told


def copy_of(url: str, target: str) -> None:
    """All objects of a repository that nobody writes to."""
    with contextlib.closing(open_store(url)) as source, contextlib.closing(open_store(target)) as copy:
        for info in source.list(""):
            copy.put(info.key, source.get(info.key))


def counted(n: int) -> str:
    return f"{n} ranks" if n > 1 else "1 rank"


def words(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_all(args: argparse.Namespace, url: str, work: Path) -> dict[str, Any]:
    """All three starts; the result, as demo.py prints it."""
    begun = time.time()
    n, steps = args.ranks, args.steps
    fewer = counted(n - 1)
    forget = ["--forget", args.forget] if args.forget else []
    settings = ["--steps", str(steps), *forget]
    why = "" if WRAPPER == "FSDP2" else f" (FSDP2 of torch {torch.__version__} does not train on a CPU)"
    words(f"1. {n} ranks train with {WRAPPER}{why} and AdamW. A checkpoint is begun every {EVERY} steps.")
    one, killed = loses_a_rank(n, [f"{url}/run", *settings, "--saves"], steps, work)
    words(
        f"   Rank {killed['rank']} was killed with SIGKILL after step {killed['after_step']}. The others found out, and the job had ended "
        f"{killed['job_ended_s']:.1f} s later.\n2. {fewer} go on from the last durable checkpoint."
    )
    copy_of(f"{url}/run", f"{url}/copy")
    begin = one.durable or 0
    two = finishes(fewer, n - 1, [f"{url}/run", *settings, "--saves"], steps, begin, work)
    words(f"3. The reference: {fewer} of another start, from a copy of that checkpoint.")
    ref = finishes("reference", n - 1, [f"{url}/copy", *settings], steps, begin, work)
    found = judge(one, two, ref, steps)
    return {
        "ok": not found,
        "differences": found,
        "url": f"{url}/run",
        "wrapper": WRAPPER,
        "ranks": [n, n - 1],
        "steps": steps,
        "killed": {"rank": killed["rank"], "after_step": killed["after_step"]},
        "job_ended_seconds": killed["job_ended_s"],
        "restored_step": two.restored_at,
        "restore_seconds": two.restore_s,
        "killed_to_next_step_seconds": (two.first_step_s or time.time()) - killed["at"],
        "samples": samples_of(steps),
        "samples_of_each": [two.restored_at * BATCH, samples_of(steps) - two.restored_at * BATCH],
        "values_compared": dict(Counter(name.split("/")[0] for name in ref.states["state at last"])),
        "seconds_of_each": [told.seconds for told in (one, two, ref)],
        "seconds": time.time() - begun,
    }


# --- the comparison --------------------------------------------------------------------------------------------------


def judge(one: Told, two: Told, ref: Told, steps: int) -> list[str]:
    """What is not as it should be, in words. Floats are compared by their bits; JSON keeps all of them."""
    begin, at_first, at_last = two.restored_at, "state at first", "state at last"
    found = []
    if begin != ref.restored_at:
        found.append(f"{counted(two.ranks)} began after step {begin}, the reference after step {ref.restored_at}")
    if begin < (one.durable or 0):
        found.append(f"step {one.durable} was durable, but step {begin} was restored")
    saved = f"state at {begin}"
    found += differences(
        one.states[saved],
        two.states[at_first],
        f"what {one.ranks} ranks had at step {begin}, and what {two.ranks} restored",
    )
    for rank, generators in two.generators[at_first].items():
        found += differences(
            one.generators[saved].get(rank, {}), generators, f"the generators that rank {rank} restored"
        )
    found += differences(ref.states[at_last], two.states[at_last], "the state after the last step and the reference's")
    for rank, generators in two.generators[at_last].items():
        found += differences(
            ref.generators[at_last][rank], generators, f"the generators of rank {rank} after the last step"
        )
    for what, a, b in (("losses", ref.losses, two.losses), ("samples", ref.samples, two.samples)):
        wrong = [step for step in range(begin + 1, steps + 1) if a[step] != b[step]]
        if wrong:
            found.append(f"{what} of {len(wrong)} steps are not the reference's, first at step {wrong[0]}")
    first, last = (statistics.fmean(losses.values()) for losses in (one.losses[1], two.losses[steps]))
    if not math.isfinite(first) or not last < first:
        found.append(f"the run did not learn: loss {first} at first, {last} at last")
    return found + judge_samples(one, two, steps)


def judge_samples(one: Told, two: Told, steps: int) -> list[str]:
    """Whether the steps that the final state has behind it saw each sample of the epoch once, and in the order of a single process."""
    n = samples_of(steps)
    history = [one.done(step) if step <= two.restored_at else two.done(step) for step in range(1, steps + 1)]
    seen = Counter(sample for samples in history for sample in samples)
    found = []
    lost, twice = [k for k in range(n) if not seen[k]], [k for k, times in seen.items() if times > 1]
    if lost or twice:
        found.append(f"of {n} samples {len(lost)} were lost, and {len(twice)} were seen more than once")
    alone = list(fastckpt.ElasticSampler(n, batch_size=BATCH, seed=SEED, rank=0, world=1))
    wrong = [step for step, (a, b) in enumerate(zip(alone, history, strict=False), 1) if a != b]
    if wrong:
        found.append(f"the samples of {len(wrong)} steps are not those of a single process, first at step {wrong[0]}")
    return found


# --- the words -------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    n, fewer = result["ranks"]
    first, then = result["samples_of_each"]
    repeated = result["killed"]["after_step"] - result["restored_step"]
    each = " / ".join(f"{seconds:.1f} s" for seconds in result["seconds_of_each"])
    rows = [
        ("repository", result["url"]),
        ("parallelism", f"{result['wrapper']} over gloo, {n} ranks, then {fewer}"),
        (
            "killed",
            f"rank {result['killed']['rank']}, after step {result['killed']['after_step']} of {result['steps']}",
        ),
        ("the others had ended", f"{result['job_ended_seconds']:.1f} s later"),
        ("restored", f"step {result['restored_step']}: {repeated} steps had to be done again"),
        ("restore", f"{result['restore_seconds']:.3f} s, on {counted(fewer)}, of what {n} had saved"),
        (
            "killed, to the next step",
            f"{result['killed_to_next_step_seconds']:.1f} s, the start of new processes included",
        ),
        ("samples of the epoch", f"{result['samples']}: {first} seen by {n} ranks, {then} by {fewer}"),
        ("the three starts", f"{each}  ({n} ranks / {counted(fewer)} / reference)"),
        ("all of it", f"{result['seconds']:.1f} s"),
    ]
    return "\n".join(f"  {name:<26}{value}" for name, value in rows)


def verdict(result: dict[str, Any]) -> str:
    if not result["ok"]:
        return "DIFFERENT: " + "; ".join(result["differences"])
    n, fewer = result["ranks"]
    counts = ", ".join(f"{part} {count}" for part, count in result["values_compared"].items())
    return (
        f"IDENTICAL: {n} ranks lost one after step {result['killed']['after_step']}, {fewer} went on from step {result['restored_step']} "
        f"and finished step {result['steps']}; all values equal those of a fresh start from a copy of the checkpoint, bit for bit "
        f"({counts}, and each rank's generators). No sample of the epoch was lost or seen twice: steps that had to be done again count "
        "once, because the checkpoint knew nothing of them"
    )
