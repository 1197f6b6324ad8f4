"""Checkpoints of training on the device hold the state of their step: every kind of model, pinned and pageable memory, any budget."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import pytest
import torch

from fastckpt.options import Options
from fastckpt.snapshot import stager
from fastckpt.snapshot.copier import Copier
from fastckpt.snapshot.pool import Slab, SlabPool, empty_host_cache
from fastckpt.snapshot.side_stream import SideStream
from tests.fakegpu.suite.models import JOBS, Job, mlp
from tests.fakegpu.suite.tools import train
from tests.gpu.conftest import Record
from tests.gpu.machines import FAKE, Machine
from tests.gpu.tools import Delays, rounds, train_kept, wrong_steps

pytestmark = pytest.mark.gpu

ON_FAKE = os.environ.get("FASTCKPT_GPU_TESTS_ON") == FAKE
SNAPSHOTS = int(os.environ.get("FASTCKPT_GPU_SNAPSHOTS") or (40 if ON_FAKE else 1000))
ROUND = 25  # so many saves between two comparisons: their states wait on the device
DELAYED = ["adamw_fused", "batch_norm_cnn", "gpt", "accumulation", "moving_average"]
UNVERIFIED = Options(threads=2, connections=2, host_budget_bytes=256 << 20, verify_snapshot="off")


@pytest.mark.parametrize("name", sorted(JOBS))
def test_checkpoints_hold_the_state_of_their_step(gpu: torch.device, name: str) -> None:
    job = JOBS[name](gpu)
    train(job.state, job.step).check()


@pytest.mark.parametrize("name", sorted(JOBS))
def test_so_they_do_while_the_host_never_waits(gpu: torch.device, name: str) -> None:
    """What a save should hold is copied on the device: nothing keeps the next step from running into the copies but the fence."""
    job = JOBS[name](gpu)
    assert not wrong_steps(train_kept(job.state, job.step, steps=6))


# -- delays --------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DELAYED)
def test_a_thousand_snapshots_with_delays_on_either_stream(
    machine: Machine, seed: int, monkeypatch: pytest.MonkeyPatch, record: Record, name: str
) -> None:
    """FASTCKPT_GPU_SNAPSHOTS of all models together. Every byte of every checkpoint is compared."""
    delays = Delays(machine, seed)
    job = JOBS[name](machine.device)
    delays.install(monkeypatch, job.state)
    done = 0

    def step(number: int) -> None:
        delays.perhaps()
        job.step(done + number)
        delays.perhaps()

    for steps in rounds(SNAPSHOTS // len(DELAYED), ROUND):
        wrong = wrong_steps(train_kept(job.state, step, steps=steps))
        assert not wrong, f"{name}, after {done} snapshots, seed {seed}: {wrong}"
        done += steps
    record(f"snapshots of {name}", {"compared": done, "wrong": 0, "seed": seed, "delays": delays.given})
    assert done < 20 or min(delays.given.values()) > 0, "no delay was given"


def late_copies(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SideStream.copy

    def copy(side: SideStream, *args: object, **kwargs: object) -> None:
        with side.stream:
            machine.delay(30)
        original(side, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(SideStream, "copy", copy)


def test_delays_show_a_missing_fence(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, the thousand snapshots prove nothing. (The model of a device reports it, whether or not bytes are wrong.)"""
    job = mlp(machine.device)
    late_copies(machine, monkeypatch)
    monkeypatch.setattr(SideStream, "hold_back", lambda side, event: None)
    wrong = wrong_steps(train_kept(job.state, job.step, options=UNVERIFIED))
    assert machine.problems() or wrong


def test_delays_show_copies_that_do_not_wait_for_the_step(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    job = mlp(machine.device)

    def before_the_update(*args: object) -> None:
        machine.delay(30)

    job.state["optim"].register_step_pre_hook(before_the_update)
    machine.compute_late()
    monkeypatch.setattr(SideStream, "begin", lambda side: None)
    wrong = wrong_steps(train_kept(job.state, job.step, options=UNVERIFIED))
    assert machine.problems() or wrong


# -- host memory ---------------------------------------------------------------------------------------------------------


def pools(monkeypatch: pytest.MonkeyPatch, **arguments: object) -> list[SlabPool]:
    """The pools that Checkpointers make from now on."""
    made: list[SlabPool] = []

    @functools.wraps(SlabPool)
    def make(budget_bytes: int) -> SlabPool:
        made.append(SlabPool(budget_bytes, **arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(stager, "SlabPool", make)
    return made


def test_slabs_are_pinned(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pools(monkeypatch)
    slabs: list[Slab] = []
    take = SlabPool.take

    def kept(self: SlabPool, n_bytes: int, for_device: bool) -> Slab | None:
        slab = take(self, n_bytes, for_device)
        slabs.extend([slab] if slab is not None else [])
        return slab

    monkeypatch.setattr(SlabPool, "take", kept)
    job = mlp(gpu)
    train(job.state, job.step)
    (pool,) = made
    assert pool.unpinned_bytes == 0
    assert pool.used_bytes == 0
    assert any(slab.for_device for slab in slabs)
    assert all(slab.tensor.is_pinned() for slab in slabs if slab.for_device)


def test_where_nothing_can_be_pinned_copies_go_to_pageable_memory(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(n_bytes: int) -> torch.Tensor:
        raise RuntimeError("the memlock limit, said the test")

    made = pools(monkeypatch, allocate_pinned=refuse)
    job = mlp(gpu)
    with caplog.at_level(logging.WARNING):
        assert not wrong_steps(train_kept(job.state, job.step))
    (pool,) = made
    assert pool.unpinned_bytes > 0
    assert pool.used_bytes == 0
    assert len([one for one in caplog.records if "cannot be pinned" in one.getMessage()]) == 1


def large(where: torch.device) -> Job:
    """24 MB, with its moments 73."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(5)]).to(where)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> None:
        x = torch.randn(2, 1100, generator=torch.Generator().manual_seed(number)).to(where)
        model(x).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


@pytest.mark.parametrize(("budget_mib", "way"), [(20, "none"), (32, "ring"), (64, "ring"), (400, "whole")])
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
def test_a_state_goes_through_any_budget(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, seed: int, budget_mib: int, way: str, pinned: bool
) -> None:
    """Larger than the budget: through a ring; where there is not even room for that, it is uploaded while training waits. What torch has
    pinned is within the budget, too, its rounding included.
    """

    def refuse(n_bytes: int) -> torch.Tensor:
        raise RuntimeError("the memlock limit, said the test")

    made = pools(monkeypatch, **({} if pinned else {"allocate_pinned": refuse}))
    job = large(machine.device)
    Delays(machine, seed, longest_ms=3.0).install(monkeypatch, job.state)
    empty_host_cache()
    before = machine.pinned_bytes()
    most = {"held": 0, "pinned": 0}
    take = SlabPool.take

    def taking(pool: SlabPool, n_bytes: int, for_device: bool) -> Slab | None:
        slab = take(pool, n_bytes, for_device)
        most["held"] = max(most["held"], pool.held_bytes)
        if before is not None:
            most["pinned"] = max(most["pinned"], (machine.pinned_bytes() or 0) - before)
        return slab

    monkeypatch.setattr(SlabPool, "take", taking)
    ways: list[str] = []
    start = Copier.start

    def started(copier: Copier, *arguments: Any) -> bool:
        ways.append("ring" if len(copier._ring._slabs) < len(copier._ring._slab_bytes) else "whole")
        return start(copier, *arguments)

    monkeypatch.setattr(Copier, "start", started)
    options = Options(threads=2, connections=1, host_budget_bytes=budget_mib << 20, max_stall_s=120)
    assert not wrong_steps(train_kept(job.state, job.step, steps=3, options=options))
    assert set(ways) == ({way} if way != "none" else set())
    (pool,) = made
    assert pool.used_bytes == 0
    assert most["held"] <= options.snapshot_bytes
    assert most["pinned"] <= options.snapshot_bytes + (1 << 20)  # fingerprints are pinned, too
