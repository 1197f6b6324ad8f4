"""What goes wrong while a snapshot is under way: an error at the caller, nothing committed of that save, and all else untouched.

Each test ends with `Run.check`: every checkpoint that exists holds the state of its step, training is bit for bit that of a run without
saves, nothing of the budget is lost. The fixture sees to it that nothing was reported.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastckpt.options import Options
from fastckpt.snapshot import device_copies
from fastckpt.snapshot.device_copies import DeviceCopies
from fastckpt.training.checkpointer import Every
from tests.fakegpu import device
from tests.fakegpu.suite.models import Job, batch_norm_cnn, moving_average
from tests.fakegpu.suite.run import SHORT_S, UNVERIFIED, VERIFIED, Run

# -- out of memory -----------------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_pinned_is_made_up_for(gpu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    device.limit_pinned_bytes(0)
    run = Run(gpu, batch_norm_cnn, options=VERIFIED)
    with caplog.at_level(logging.WARNING, logger="fastckpt"):
        for _ in range(3):
            run.train_and_save()
        run.ckpt.wait(SHORT_S)
    told = [record.message for record in caplog.records if "cannot be pinned" in record.message]
    assert len(told) == 1
    assert "ulimit -l" in told[0]
    assert run.ckpt._engine.stager.pool.unpinned_bytes > 0
    run.check(1, 2, 3)


def test_pinned_memory_that_runs_out_midway_is_made_up_for(late: torch.device) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    device.limit_pinned_bytes(0)
    run.ckpt._engine.stager.pool._drop_free()
    run.train_and_save()
    run.check(1, 2)


@pytest.mark.parametrize(("make", "options"), [(moving_average, UNVERIFIED), (batch_norm_cnn, VERIFIED)])
def test_a_device_without_room_for_anything_is_saved(
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[torch.device], Job],
    options: Options,
) -> None:
    """No clones, no joint transfers, no fingerprints: slower, as whole."""
    cloned: list[bool] = []
    clone = DeviceCopies.clone

    def noted(self: DeviceCopies, chunks: Any) -> bool:
        cloned.append(clone(self, chunks))
        return cloned[-1]

    monkeypatch.setattr(DeviceCopies, "clone", noted)
    run = Run(gpu, make, options=options)
    for _ in range(3):
        run.step()
        torch.accelerator.synchronize()
        device.limit_device_bytes(0)
        run.save()
        device.limit_device_bytes(1 << 62)
    run.ckpt.wait(SHORT_S)
    assert cloned == [False] * 3
    assert all(side._joint is None for side in run.ckpt._engine.stager._sides.values())
    unverified = [record for record in caplog.records if "no room for fingerprints" in record.message]
    assert len(unverified) == (3 if options is VERIFIED else 0)
    run.check(1, 2, 3)


# -- a device that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2])
def test_a_copy_that_fails_on_the_device_fails_the_save(gpu: torch.device, after: int) -> None:
    run = Run(gpu)
    run.train_and_save().wait(SHORT_S)
    run.step()
    device.fail_copy(after)
    handle = run.ckpt.save_now(run.done)
    with pytest.raises(RuntimeError, match="copy engine"):  # the device's own words
        handle.wait(SHORT_S)
    with pytest.raises(RuntimeError, match="copy engine"):  # for those who hold no handle
        run.ckpt.step(run.done)
    assert run.committed() == [1]
    assert run.ckpt.save_now(run.done).wait(SHORT_S).save.attempt == 1
    run.check(1, 2)


def test_slabs_of_a_device_that_stays_broken_are_not_used_again(
    late: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    run.step()
    run.ckpt.wait(SHORT_S)
    pool = run.ckpt._engine.stager.pool

    def broken(event: torch.Event) -> None:
        raise torch.AcceleratorError("unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(device_copies, "wait_for", broken)
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            run.ckpt.save_now(run.done).wait(SHORT_S)
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            run.ckpt.wait(SHORT_S)
    assert pool.used_bytes == 0
    assert pool.held_bytes == pool.bases.n_bytes, "a device that failed may still write to the others"
    assert run.committed() == [1]
    torch.accelerator.synchronize()
    run.check(1)


# -- a second save while one runs --------------------------------------------------------------------------------------


def test_saves_that_come_while_one_runs_are_joined_queued_or_deferred(late: torch.device) -> None:
    run = Run(late, every=Every(steps=1))
    run.step()
    run.store.open.clear()
    first = run.ckpt.save_now(1)
    assert run.ckpt.save_now(1) is first, "the same step, the same save"
    run.ckpt.step(1)
    second = run.train_and_save()
    assert second is not first
    for _ in range(3):
        run.ckpt.step(run.step())
    assert run.ckpt.stats.deferred == 3
    assert run.ckpt.stats.saves == 2
    threading.Timer(0.0, run.store.open.set).start()
    third = run.ckpt.save_now(run.done)  # waits for room
    assert {first.wait(SHORT_S).save.step, second.wait(SHORT_S).save.step, third.wait(SHORT_S).save.step} == {1, 2, 5}
    run.check(1, 2, 5)
