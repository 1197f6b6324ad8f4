"""Ctrl-C while a snapshot is under way: at any line of fastckpt's."""

# ruff: noqa: PT012 - what happens inside of the `with` is what these tests are about

from __future__ import annotations

import contextlib
import linecache
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.errors import SaveError
from fastckpt.snapshot.side_stream import SideStream
from fastckpt.training.checkpointer import Checkpointer
from tests.fakegpu.suite.models import inputs
from tests.fakegpu.suite.run import RING, SHORT_S, UNVERIFIED, Run, compare, interrupt, wide
from tests.fakegpu.suite.tools import host, reports


@pytest.mark.parametrize("nth", [1, 3])
def test_an_interrupt_inside_of_save(late: torch.device, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    run.step()
    calls: list[int] = []
    copy = SideStream.copy

    def interrupted(self: SideStream, target: Any, pieces: Any, *, pinned: bool) -> None:
        calls.append(1)
        copy(self, target, pieces, pinned=pinned)
        if len(calls) == nth:
            interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(SideStream, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.ckpt.save_now(run.done)
    # It is put off until the snapshot is whole and queued; then the save goes on without its caller.
    run.ckpt.wait(SHORT_S)
    assert run.ckpt.stats.snapshot_bytes == 0
    assert run.committed() == [1, 2]
    run.check(1, 2)


def test_an_interrupt_inside_of_the_fence(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on after it (a notebook does) has a step still to make, and that one must be held back as well."""
    run = Run(gpu)
    run.train_and_save().wait(SHORT_S)
    run.train_and_save()
    model, optim = run.job.state["model"], run.job.state["optim"]

    def interrupted(self: SideStream, event: torch.Event) -> None:
        interrupt()

    model(inputs(run.done + 1, 16, 32).to(gpu)).square().mean().backward()
    with monkeypatch.context() as patch:
        patch.setattr(SideStream, "hold_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optim.step()
    optim.step()
    optim.zero_grad()
    run.done += 1
    run.ckpt.wait(SHORT_S)
    run.check(1, 2)


def test_an_interrupt_while_the_fence_keeps_the_host(late: torch.device) -> None:
    """A ring whose store hangs: the user has enough, and leaves."""
    run = Run(late, wide, options=RING, close_timeout_s=0.01)
    run.train_and_save().wait(SHORT_S)
    run.step()
    run.store.open.clear()
    run.store.reached.clear()
    model, before = run.job.state["model"], host(run.job.state["model"].state_dict())
    main = threading.main_thread().ident
    assert main is not None

    def press() -> None:
        assert run.store.reached.wait(SHORT_S)
        signal.pthread_kill(main, signal.SIGINT)

    presser = threading.Thread(target=press)
    with pytest.raises(KeyboardInterrupt), run.ckpt:
        run.save()
        model(inputs(run.done + 1, 2, 1100).to(late)).square().mean().backward()
        presser.start()
        run.job.state["optim"].step()
        pytest.fail("the step did not wait")  # pragma: no cover
    presser.join(SHORT_S)
    compare(before, host(model.state_dict()))
    run.store.open.set()
    assert run.ckpt._engine.queue.wait_idle(SHORT_S)
    assert run.committed() == [1]
    assert run.ckpt.stats.snapshot_bytes == 0
    other = wide(late)
    with Checkpointer(run.store, other.state, every=None, spot=None, options=UNVERIFIED) as ckpt:
        assert ckpt.restore() == 1
        other.step(2)
        compare(before, host(other.state["model"].state_dict()))
        ckpt.save_now(2).wait(SHORT_S)
    assert run.committed() == [1, 2]


PACKAGE = str(Path(fastckpt.__file__).parent)


class InterruptAtLine:
    """KeyboardInterrupt in this thread, before the nth line of fastckpt's that it runs: wherever a signal can be noticed, and more.

    Not where a `with` ends: an interrupt at the beginning of an `__exit__` in Python leaves a lock locked, or gradients off, and nobody who
    uses either can help it (bpo-29988); nor at a `try`, where nothing can be raised.
    """

    def __init__(self, nth: int) -> None:
        self.nth, self.lines = nth, 0
        self.where = ""

    def __enter__(self) -> InterruptAtLine:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            source = linecache.getline(path, frame.f_lineno).lstrip()
            if self.lines >= self.nth > 0 and not self.where and not source.startswith(("with ", "try:")):
                self.where = f"{Path(path).name}:{frame.f_lineno} {frame.f_code.co_name}"
                signal.raise_signal(signal.SIGINT)  # as a user does: there are places that put it off
        return self._trace


def interrupted_everywhere(late: torch.device, seed: int, n: int, call: Callable[[Run], None]) -> None:
    draw = random.Random(seed)
    print(f"seed {seed}")
    run = Run(late)
    for _ in range(2):
        run.train_and_save().wait(SHORT_S)
    run.step()
    with InterruptAtLine(0) as counted:
        call(run)
    run.ckpt.wait(SHORT_S)
    may_exist = [run.done]
    for _ in range(n):
        run.step()
        with InterruptAtLine(draw.randint(1, counted.lines)) as at, contextlib.suppress(KeyboardInterrupt):
            call(run)
        may_exist.append(run.done)
        run.step()
        with contextlib.suppress(SaveError):  # of a save that was given up
            run.ckpt.wait(SHORT_S)
        assert run.ckpt.stats.snapshot_bytes == 0, f"slabs were lost: interrupted at {at.where}"
        assert not reports(), f"interrupted at {at.where}"
    run.check(1, 2, apart_from=tuple(may_exist))


def test_an_interrupt_anywhere_in_save_now(late: torch.device) -> None:
    def call(run: Run) -> None:
        run.ckpt.save_now(run.done)

    interrupted_everywhere(late, random.randrange(1 << 30), 40, call)


def test_an_interrupt_anywhere_in_step(late: torch.device) -> None:
    def call(run: Run) -> None:
        run.ckpt._decisions._due.trigger = "interval"
        run.ckpt.step(run.done)

    interrupted_everywhere(late, random.randrange(1 << 30), 40, call)


def test_an_interrupt_anywhere_in_the_fence(late: torch.device) -> None:
    def call(run: Run) -> None:
        run.save()
        run.ckpt.fence()

    interrupted_everywhere(late, random.randrange(1 << 30), 40, call)
