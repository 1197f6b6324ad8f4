"""What the processes of a soak do: train, read. Their states follow from (writer, step), so what is read is compared with what was saved.

A process writes a journal (`soak_judge.py`), one line a write, so that nothing of it is lost when it is killed.
"""

from __future__ import annotations

import concurrent.futures
import gc
import json
import os
import random
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import fastckpt
from fastckpt.errors import (
    CheckpointError,
    NoCheckpointError,
    ObjectNotFoundError,
    RepositoryError,
    RetiredError,
    SupersededError,
)
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.cloud import open_s3
from fastckpt.store.wrap import Retrying

LANES = 1 << 15
STALL_S = 2.0
GRACE_S = 90.0  # far more than the proxy holds a request back
OPTIONS = fastckpt.Options(threads=1, connections=4, host_budget_bytes=256 << 20)
NAMES = ("fast", "slow", "still")
NOTHING = (NoCheckpointError, RepositoryError, ObjectNotFoundError)
"""Ways of saying that there is no checkpoint: none yet, no repository, and no object either (`fastckpt.load`)."""


class Journal:
    """Lines at the end of a file. Any thread."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, what: str, **facts: Any) -> None:
        os.write(self._file, json.dumps({"t": time.monotonic(), "what": what, **facts}).encode() + b"\n")


def values(name: str, writer: int, step: int) -> torch.Tensor:
    """One changes at every step, one at every eighth, one never: packs of older steps stay needed."""
    part = {"fast": (writer, step), "slow": (writer, step // 8), "still": (0, 0)}[name]
    generator = torch.Generator().manual_seed(part[0] * 1_000_003 + part[1])
    return torch.randn(LANES, generator=generator)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, torch.nn.Parameter(torch.zeros(LANES)))


class Training:
    """Objects as a training loop has them, at a state that (writer, step) names."""

    def __init__(self) -> None:
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=False)
        self.who: dict[str, Any] = {"writer": 0, "step": 0}
        self.state = {"model": self.model, "optimizer": self.optimizer, "who": self.who}

    def advance(self, writer: int, step: int) -> None:
        """A step of the optimizer, which waits for copies under way, and then the values."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones(LANES)
        self.optimizer.step()
        with torch.no_grad():
            for name in NAMES:
                parameter = getattr(self.model, name)
                parameter.copy_(values(name, writer, step))
                self.optimizer.state[parameter]["exp_avg"].copy_(values(name, writer, step) * 0.5)
                self.optimizer.state[parameter]["exp_avg_sq"].copy_(values(name, writer, step) ** 2)
        self.who["writer"], self.who["step"] = writer, step


def found_in(state: dict[str, Any]) -> tuple[list[int], bool]:
    """[writer, step] of a plain state, and whether all of it is that step's."""
    writer, step = state["who"]["writer"], state["who"]["step"]
    exact = True
    for number, name in enumerate(NAMES):
        value, moments = values(name, writer, step), state["optimizer"]["state"][number]
        pairs = [
            (state["model"][name], value),
            (moments["exp_avg"], value * 0.5),
            (moments["exp_avg_sq"], value**2),
        ]
        exact = exact and all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
    return [writer, step], exact


def plain(training: Training) -> dict[str, Any]:
    return {
        "model": {name: value.detach() for name, value in training.model.named_parameters()},
        "optimizer": training.optimizer.state_dict(),
        "who": training.who,
    }


def _store(url: str) -> Retrying:
    return Retrying(
        open_s3(url, stall_timeout_s=STALL_S, connect_timeout_s=2.0, slowest_bytes_per_s=1 << 20), give_up_s=30
    )


def guarded(work: Callable[..., None]) -> Callable[..., None]:
    """Note in the journal what ends a process, unless it is killed."""

    def run(journal: Path, stop: Connection, *arguments: Any) -> None:
        torch.set_num_threads(1)
        notes = Journal(journal)
        try:
            work(notes, stop, *arguments)
        except BaseException:
            notes.note("crashed", error=traceback.format_exc()[-3000:])
            raise

    return run


def _restored(
    ckpt: fastckpt.Checkpointer, training: Training, notes: Journal, writer: int, stop: Connection
) -> int | None:
    """The step to go on from; None: told to stop, or another process has taken over."""
    while not stop.poll(0):
        t0 = time.monotonic()
        try:
            step = ckpt.restore()
        except SupersededError:
            notes.note("superseded")
            return None
        except CheckpointError as error:
            notes.note("failed restore", error=type(error).__name__, text=str(error)[:300])
            continue
        parent, exact = (None, True) if step == 0 else found_in(plain(training))
        exact = exact and (parent is None or parent[1] == step)
        notes.note("restored", writer=writer, t0=t0, parent=parent, exact=exact)
        return step
    return None


def train(notes: Journal, stop: Connection, url: str, writer: int, seed: int, pause_s: float, steady: str) -> None:
    """Restore, and save each step until told to stop, killed, or superseded. steady: a name under which to report one's health."""
    rng = random.Random(seed)
    training = Training()
    try:
        with (
            _store(url) as store,
            fastckpt.Checkpointer(
                store,
                training.state,
                every=None,
                keep=fastckpt.Keep(last=3),
                spot=None,
                grace_s=GRACE_S,
                options=OPTIONS,
            ) as ckpt,
        ):
            step = _restored(ckpt, training, notes, writer, stop)
            while step is not None and not stop.poll(0):
                step += 1
                training.advance(writer, step)
                _save(ckpt, notes, writer, step)
                if steady and step % 4 == 0:
                    _wait(ckpt, notes)
                    health(notes, steady)
                stop.poll(rng.uniform(0, 2 * pause_s))
    except SupersededError:
        notes.note("superseded")
    except CheckpointError as error:  # the store cannot be opened, or the last save has failed
        notes.note("ended", error=type(error).__name__, text=str(error)[:300])


def _save(ckpt: fastckpt.Checkpointer, notes: Journal, writer: int, step: int) -> None:
    def ended(durable: concurrent.futures.Future[Any]) -> None:
        error = durable.exception()
        if error is None:
            notes.note("acked", writer=writer, step=step)
        else:
            notes.note("failed save", error=type(error).__name__, text=str(error)[:300])
            if not isinstance(error, CheckpointError):
                notes.note("crashed", error=f"a save's error is not typed: {error!r}")

    notes.note("begun", writer=writer, step=step)
    try:
        ckpt.save_now(step).durable.add_done_callback(ended)
    except SupersededError:
        raise
    except CheckpointError as error:  # of an earlier save, whose own note says more
        notes.note("told", error=type(error).__name__)


def _wait(ckpt: fastckpt.Checkpointer, notes: Journal) -> None:
    try:
        ckpt.wait(120)
    except SupersededError:
        raise
    except CheckpointError as error:
        notes.note("told", error=type(error).__name__)


def health(notes: Journal, who: str) -> None:
    gc.collect()
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    n_fds, n_threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    notes.note("health", who=who, rss=rss, fds=n_fds, threads=n_threads)


def read(notes: Journal, stop: Connection, url: str, seed: int, pause_s: float) -> None:
    """Read the newest in two ways, and older steps, again and again."""
    rng = random.Random(seed)
    training = Training()
    with _store(url) as store:
        number = 0
        while not stop.poll(rng.uniform(0, 2 * pause_s)):
            number += 1
            t0 = time.monotonic()
            try:
                _read_once(notes, store, url, training, rng, t0)
            except RetiredError as error:
                notes.note("failed read", error=type(error).__name__, text=str(error)[:300])
            except NOTHING as error:
                notes.note("none", t0=t0, error=type(error).__name__, text=str(error)[:300])
            except CheckpointError as error:
                notes.note("failed read", error=type(error).__name__, text=str(error)[:300])
            if number % 4 == 0:
                health(notes, "reader")


def _read_once(notes: Journal, store: Retrying, url: str, training: Training, rng: random.Random, t0: float) -> None:
    how = rng.choice(("restore", "load", "older"))
    if how == "restore":
        with fastckpt.Checkpointer(store, training.state, read_only=True, options=OPTIONS) as ckpt:
            ckpt.restore()
        found, exact = found_in(plain(training))
    elif how == "load":
        found, exact = found_in(fastckpt.load(url))
    else:
        steps = [commit.step for commit in Catalog(Repository(store)).history()]
        if not steps:
            return
        _read_tensor(notes, url, rng.choice(steps))
        return
    notes.note("read", t0=t0, found=found, exact=exact, newest=True)


def _read_tensor(notes: Journal, url: str, step: int) -> None:
    """One tensor of an older step. Its writer is not known, but both of its moments follow from its bits."""
    try:
        with fastckpt.open(url, step=step) as reader:
            value = reader["model.fast"]
            half, square = (reader[f"optimizer.state.0.{name}"] for name in ("exp_avg", "exp_avg_sq"))
    except NoCheckpointError as error:  # retired since it was chosen
        notes.note("failed read", error=type(error).__name__, text=str(error)[:300])
        return
    exact = torch.equal(value * 0.5, half) and torch.equal(value**2, square)
    notes.note("read", t0=0.0, found=None, exact=exact, newest=False)
