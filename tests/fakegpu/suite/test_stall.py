"""What saves cost the compute stream, in modelled time: nothing while copies fit beside forward and backward, else what does not fit.

A step is measured without saves first; the link is then made so slow that the state takes as long as the test wants. The figures are
the same in every schedule, and printed. What a save has the compute stream do itself (clones of what is copied first, fingerprints) is its
*own work*, not stall, and told apart: it is the time that stream took more than without saves, less the stall.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from fastckpt.options import Options
from fastckpt.snapshot import FenceHooks
from fastckpt.snapshot.candidates import LEARNING_SAVES
from fastckpt.snapshot.device_copies import DeviceCopies
from fastckpt.training.checkpointer import Checkpointer
from fastckpt.training.save_queue import MAX_JOBS
from tests.fakegpu import device
from tests.fakegpu.suite.models import inputs
from tests.fakegpu.suite.tools import Saved, host, reports

STEPS = 3
LEARNED = LEARNING_SAVES + MAX_JOBS
"""After so many saves only chunks that may be unchanged get a fingerprint: what saves under way have found is not known yet."""
MEMORY_GB_S = 20.0
"""So slow that a step's operations take as long as those of large models do beside their launches."""


def options(verify: str = "off") -> Options:
    return Options(
        threads=1, connections=1, compress=False, host_budget_bytes=256 << 20, max_stall_s=60, verify_snapshot=verify
    )


class Halves(NamedTuple):
    """A job whose step can be interrupted before the optimizer's: what is between a save and its fence, and the rest."""

    state: dict[str, Any]
    before: Callable[[], None]
    after: Callable[[], None]


def deep(where: torch.device, n_layers: int = 3) -> Halves:
    """10 MB with its moments, statistics that change in forward among them. Its input stays on the device: no copies but those of saves."""
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(520, 520), torch.nn.BatchNorm1d(520)) for _ in range(n_layers)]
    model = torch.nn.Sequential(*layers).to(where)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = inputs(0, 16, 520).to(where)

    def before() -> None:
        model(x).square().mean().backward()

    def after() -> None:
        optim.step()
        optim.zero_grad()

    return Halves({"model": model, "optim": optim}, before, after)


def device_bytes(job: Halves) -> int:
    model, optim = job.state["model"], job.state["optim"]
    tensors = [*model.state_dict().values(), *(t for state in optim.state.values() for t in state.values())]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type != "cpu")


def now_us(where: torch.device) -> float:
    """Modelled time at which the compute stream is done with all it was given."""
    compute = torch.accelerator.current_stream(where)
    compute.synchronize()
    return device.end_us(compute)


class Figures(NamedTuple):
    """Modelled microseconds a save, but for `host_us`."""

    window_us: float
    """Forward and backward: what lies between a save and its fence."""
    copy_us: float
    """All bytes of the state by the link."""
    stall_us: float
    own_work_us: float
    host_us: float
    """What the training thread has waited for the device in the whole run."""

    @property
    def unavoidable_us(self) -> float:
        """What is left of the copy when forward and backward are over."""
        return max(0.0, self.copy_us - self.window_us)


def measured(where: torch.device, ratio: float, verify: str = "off", skip: int = LEARNED) -> Figures:
    """Train with a save after each step, copies taking `ratio` times as long as forward and backward. skip: saves that do not count: at
    first each chunk gets a fingerprint.
    """
    compute = torch.accelerator.current_stream(where)
    device.cost(copy_gb_s=25, memory_gb_s=MEMORY_GB_S)
    alone, job = deep(where), deep(where)
    alone.before()
    alone.after()
    begin = now_us(where)
    alone.before()
    window = now_us(where) - begin
    alone.after()
    step = now_us(where) - begin

    saved, last = Saved(), skip + STEPS
    with Checkpointer(saved.store, job.state, every=None, keep=None, spot=None, options=options(verify)) as ckpt:
        job.before()
        job.after()  # its hook has been seen, and there are moments
        device.cost(copy_gb_s=device_bytes(job) / (ratio * window * 1e3), memory_gb_s=MEMORY_GB_S)
        for number in range(1, last + 1):
            if number == skip + 1:
                ckpt.fence()
                begin, stalled, waited = now_us(where), device.stall_us(compute), device.host_us()
            ckpt.save_now(number)
            ckpt.step(number)
            job.before()
            job.after()
        waited = device.host_us() - waited
        took, stall = now_us(where) - begin, device.stall_us(compute) - stalled
    for _ in range(2, last):
        alone.before()
        alone.after()
    saved.states = {last: {name: host(one.state_dict()) for name, one in alone.state.items()}}
    saved.check()
    assert not reports()
    figures = Figures(window, ratio * window, stall / STEPS, (took - stall) / STEPS - step, waited)
    print(
        f"\n{ratio:g} x, verify_snapshot={verify}: forward + backward {window:,.0f} us, copy {figures.copy_us:,.0f} us: stall "
        f"{figures.stall_us:,.1f} us a save, unavoidable {figures.unavoidable_us:,.1f} us; own work {figures.own_work_us:,.1f} us"
    )
    return figures


# With "first", the snapshot that is verified is among those that do not count: it is work of the device's own.
verified = pytest.mark.parametrize("verify", ["off", "first"])


@verified
def test_copies_that_fit_beside_forward_and_backward_cost_nothing(gpu: torch.device, verify: str) -> None:
    figures = measured(gpu, 0.9, verify)
    assert figures.stall_us == 0
    assert figures.host_us == 0, "nor does the host wait"
    # Two clones, of statistics and of counters of batches: a hundredth of the state.
    assert 0 < figures.own_work_us < 0.05 * figures.window_us


@verified
def test_of_longer_copies_only_the_rest_is_waited_for(gpu: torch.device, verify: str) -> None:
    figures = measured(gpu, 2, verify)
    assert 0.95 * figures.unavoidable_us < figures.stall_us <= 1.05 * figures.unavoidable_us
    assert figures.host_us == 0, "the device's stream waits, the host does not"
    assert 0 < figures.own_work_us < 0.05 * figures.window_us


def test_learning_which_chunks_change_costs_reading_the_state_once(gpu: torch.device) -> None:
    """This device reads as fast as it copies; real ones read some thirty times as fast."""
    figures = measured(gpu, 0.9, skip=0)
    read_us = device_bytes(deep(gpu)) / (MEMORY_GB_S * 1e3) * 3  # its moments, too
    assert 0 < figures.stall_us < 1.2 * read_us
    assert figures.host_us == 0


@pytest.mark.parametrize("verify", ["sampled", "always"])
def test_a_snapshot_pays_for_its_fingerprints_with_its_own_work(gpu: torch.device, verify: str) -> None:
    """Nothing is said of the host: it makes the keys of fingerprints by an operation for which this device, unlike real ones, stops."""
    figures = measured(gpu, 0.9, verify)
    assert figures.stall_us == 0
    assert figures.own_work_us > 0.1 * figures.window_us, "the state was not read"


def test_without_hooks_to_trust_the_whole_copy_is_waited_for(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it costs where nothing may be left to a hook, and that the figures above could be others."""
    monkeypatch.setattr(FenceHooks, "can_be_trusted", False)
    figures = measured(gpu, 0.9)
    assert figures.stall_us >= figures.copy_us
    assert figures.host_us == 0


def test_what_is_too_much_to_clone_is_waited_for(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a device that has no room for clones: the stream waits for the copies of what is copied first, and for no others."""
    monkeypatch.setattr(DeviceCopies, "clone", lambda self, chunks: False)
    figures = measured(gpu, 0.9)
    assert 0 < figures.stall_us < 0.05 * figures.copy_us
    assert figures.own_work_us == pytest.approx(0, abs=0.1)
