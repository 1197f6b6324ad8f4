"""SIGKILL at every operation of the store, and at random: the last acknowledged step or a newer one, and nothing is lost.

Children are forked, so that each costs milliseconds. A child reports an acknowledged step through a pipe.
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fastckpt
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.repository.retention import Keep
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.testing.faulty_store import FaultyStore
from tests.support.repositories import check_all, incarnation, read
from tests.support.states import same, sealed, small_state

RESULT = Path(__file__).parent / "results" / "repository_kill.json"
CHANGE = ("put", "put_if_absent", "delete")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Forked children have none of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(store: Store, report: Callable[[int], None], steps: int = 2) -> None:
    """Restore, save some steps with retention: what a training job does to its repository."""
    run = incarnation(store)
    choice = run.choose_and_claim()
    start = 0 if choice is None else choice.commit.save.step
    for step in range(start + 1, start + 1 + steps):
        run.save(sealed(small_state(step)), step)
        report(step)
        run.retain(Keep(last=2), grace_s=0.0)


def forked(root: Path, act: Callable[[Store, Callable[[int], None]], None]) -> tuple[int, int, int]:
    """Run `act` in a child; (its last acknowledged step or 0, its pid, its status)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            act(LocalStore(root), lambda step: os.write(writing, step.to_bytes(4, "little")) and None)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    acknowledged = b""
    while piece := os.read(reading, 4096):
        acknowledged += piece
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    last = int.from_bytes(acknowledged[-4:], "little") if acknowledged else 0
    return last, pid, status


def judge(root: Path, acknowledged: int, before: int) -> str:
    """What a restore finds: "acknowledged" or "newer". Fails for anything else, and if the repository cannot go on."""
    store = LocalStore(root)
    check_all(store)
    run = incarnation(store)
    choice = run.choose_and_claim()
    step = 0 if choice is None else choice.commit.save.step
    least = max(acknowledged, before)
    assert step >= least, f"step {least} was acknowledged, a restore finds {step}"
    if choice is not None:
        assert same(read(store, choice.commit), small_state(step))
    run.save(sealed(small_state(step + 1)), step + 1)
    for _ in range(3):
        run.retain(Keep(last=2), grace_s=0.0)
    check_all(store)
    kept = [c.step for c in Catalog(Repository(store)).history()]
    assert kept[0] == step + 1
    assert len(kept) <= 2
    saves = {info.key.split("/")[1] for info in store.list("data/")}
    assert len(saves) <= 3, f"debris stays: {saves}"
    return "acknowledged" if step == least else "newer"


def prepare(root: Path) -> int:
    job(LocalStore(root), lambda step: None, steps=3)
    return 3


def test_killed_at_every_operation_that_changes_something(tmp_path: Path) -> None:
    """About 8 s: before and after each of some 20 operations that change the store, a child each. Reads change nothing: who is killed at
    one leaves what is there after the operation before it.
    """
    base = tmp_path / "base"
    before = prepare(base)
    shutil.copytree(base, tmp_path / "count")
    counting = FaultyStore(LocalStore(tmp_path / "count"))
    job(counting, lambda step: None)
    outcomes = {"acknowledged": 0, "newer": 0}
    changing = [n for n, (verb, _) in enumerate(counting.operations) if verb in CHANGE]
    assert len(changing) > 10
    for n in changing:
        for when in ("before", "after"):
            root = tmp_path / "run"
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(base, root)

            def kill(number: int, verb: str, key: str, moment: str, n: int = n, when: str = when) -> None:
                if number == n and moment == when:
                    os.kill(os.getpid(), signal.SIGKILL)

            last, _, status = forked(root, lambda store, report, kill=kill: job(FaultyStore(store, hook=kill), report))  # type: ignore[misc]
            assert os.WIFSIGNALED(status), f"operation {n} was not reached"
            outcomes[judge(root, last, before)] += 1
    assert outcomes["newer"] > 0
    assert outcomes["acknowledged"] > 0


def random_kills(tmp_path: Path, kills: int) -> dict[str, object]:
    """Children, until so many were killed; those that ended before their alarm are counted, and the alarms come earlier for it."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    base = tmp_path / "base"
    before = prepare(base)
    started = time.monotonic()
    shutil.copytree(base, tmp_path / "whole")
    forked(tmp_path / "whole", lambda store, report: job(store, report, steps=3))
    whole_s = time.monotonic() - started
    outcomes = {"acknowledged": 0, "newer": 0, "finished": 0}
    while outcomes["acknowledged"] + outcomes["newer"] < kills:
        assert outcomes["finished"] < 10 * kills, "no child was killed: the alarm never meets them"
        root = tmp_path / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(base, root)
        delay_s = rng.uniform(0, whole_s)

        def act(store: Store, report: Callable[[int], None], delay_s: float = delay_s) -> None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the test runner's own handler must not get it
            signal.setitimer(
                signal.ITIMER_REAL, max(delay_s, 1e-4)
            )  # SIGALRM's default action is to end the process at once
            job(store, report, steps=3)

        last, _, status = forked(root, act)
        found = judge(root, last, before)
        if not os.WIFSIGNALED(status):
            found, whole_s = "finished", whole_s * 0.95  # the machine was busy when it was measured
        outcomes[found] += 1
    return {"seed": seed, "kills": kills, "outcomes": outcomes}


def test_killed_at_random(tmp_path: Path) -> None:
    """Some 4 s: 15 children, and a whole restore, save and retention after each."""
    random_kills(tmp_path, 15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_500_times(tmp_path: Path) -> None:
    """Minutes: 500 children killed."""
    found = random_kills(tmp_path, 500)
    versions = {"fastckpt": fastckpt.__version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    RESULT.write_text(
        json.dumps({"date": time.strftime("%Y-%m-%d"), "versions": versions, "lost": 0, **found}, indent=1) + "\n"
    )
