"""The first save of a Checkpointer finds its memory made: from the first step on, in the background, within the budget."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.options import Options
from fastckpt.snapshot import pool
from fastckpt.snapshot.pool import SlabPool
from fastckpt.snapshot.slab_maker import SlabMaker
from fastckpt.store.memory import MemoryStore

MIB = 1 << 20
OPTIONS = Options(threads=1, connections=1, host_budget_bytes=512 * MIB)


class Run:
    """12 MiB of state, with AdamW's moments 36."""

    def __init__(self) -> None:
        self.model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(3)])
        self.optim = torch.optim.AdamW(self.model.parameters())
        self.state = {"model": self.model, "optim": self.optim}

    def step(self) -> None:
        self.model(torch.ones(1, 1024)).sum().backward()
        self.optim.step()
        self.optim.zero_grad()


def opened(state: dict[str, Any], options: Options = OPTIONS) -> fastckpt.Checkpointer:
    return fastckpt.Checkpointer(MemoryStore(), state, every=None, keep=None, spot=None, options=options)


def made(ckpt: fastckpt.Checkpointer) -> None:
    """All that is made ahead is there."""
    maker = ckpt._engine.stager._maker
    assert maker is not None
    assert maker._thread is not None
    maker._thread.join(60)


def test_the_first_save_takes_no_new_memory(taken: list[int]) -> None:
    run = Run()
    with opened(run.state) as ckpt:
        run.step()
        ckpt.step(1)
        made(ckpt)
        assert sum(taken) >= 36 * MIB
        assert ckpt.stats.snapshot_bytes == 0
        before = len(taken)
        run.step()
        ckpt.save_now(2).wait(60)
        assert len(taken) == before


def test_nor_do_the_saves_after_it(taken: list[int]) -> None:
    run = Run()
    with opened(run.state) as ckpt:
        run.step()
        ckpt.save_now(1).wait(60)
        of_one = sum(taken)
        ckpt.step(1)
        made(ckpt)  # beside the bytes that are kept of the first one
        assert sum(taken) == 2 * of_one
        for step in range(2, 5):
            run.step()
            ckpt.save_now(step).wait(60)
            ckpt.step(step)
        assert sum(taken) == 2 * of_one


def test_a_save_that_comes_while_memory_is_made(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what is there and makes the rest."""
    first, go = threading.Event(), threading.Event()
    take = SlabPool.take

    def slow(self: SlabPool, n_bytes: int, for_device: bool, **how: Any) -> Any:
        slab = take(self, n_bytes, for_device, **how)
        if threading.current_thread().name == "fastckpt-slabs" and not first.is_set():
            first.set()
            assert go.wait(60)
        return slab

    monkeypatch.setattr(SlabPool, "take", slow)
    run = Run()
    with opened(run.state) as ckpt:
        run.step()
        ckpt.step(1)
        assert first.wait(60)
        stop = SlabMaker.stop
        monkeypatch.setattr(SlabMaker, "stop", lambda self: (go.set(), stop(self)))
        ckpt.save_now(1).wait(60)
        n_bytes = sum(taken)
        run.step()
        ckpt.save_now(2).wait(60)
        assert sum(taken) == 2 * n_bytes, "the first one's bytes are kept"
        run.step()
        ckpt.save_now(3).wait(60)
        assert sum(taken) == 2 * n_bytes


def test_never_beyond_the_budget(taken: list[int]) -> None:
    run = Run()
    options = Options(threads=1, connections=1, host_budget_bytes=64 * MIB)
    with opened(run.state, options) as ckpt:
        run.step()
        ckpt.step(1)
        made(ckpt)
        assert sum(taken) <= options.snapshot_bytes
        run.step()
        ckpt.save_now(2).wait(60)


def test_a_save_at_the_first_step_makes_its_own() -> None:
    run = Run()
    with opened(run.state) as ckpt:
        run.step()
        ckpt.save_now(1).wait(60)
        assert ckpt._engine.stager._maker is None


def test_memory_that_cannot_be_had_is_the_saves_to_tell(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(n_bytes: int) -> Any:
        raise MemoryError("none, said the test")

    run = Run()
    with opened(run.state) as ckpt:
        run.step()
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
            patch.setattr(pool, "fresh_pages", refuse)
            ckpt.step(1)
            made(ckpt)
        assert "could not be made ahead: MemoryError" in caplog.text
        assert ckpt._engine.stager.pool.held_bytes == 0
        run.step()
        ckpt.save_now(2).wait(60)


def test_closing_gives_it_back() -> None:
    run = Run()
    ckpt = opened(run.state)
    run.step()
    ckpt.step(1)
    ckpt.close()
    assert ckpt._engine.stager.pool.held_bytes == 0
