"""Training on the device gives what it gives on the host, and checkpoints of it are whole, in every schedule and without a report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastckpt.options import Options
from tests.fakegpu.suite.models import JOBS
from tests.fakegpu.suite.schedules import on
from tests.fakegpu.suite.tools import equal, host, train

ROUGHLY = {"rtol": 1e-3, "atol": 1e-4}


@on("eager", "lazy", "random")
@pytest.mark.parametrize("name", sorted(set(JOBS) - {"mixed_precision", "lbfgs", "mixed_devices"}))
def test_training_is_that_of_the_host(gpu: torch.device, name: str) -> None:
    ours, theirs = JOBS[name](gpu), JOBS[name](torch.device("cpu"))
    for number in range(1, 3):
        ours.step(number)
        theirs.step(number)
    for key, expected in theirs.state.items():
        if isinstance(expected, torch.nn.Module):
            for (path, a), b in zip(ours.state[key].state_dict().items(), expected.state_dict().values(), strict=True):
                assert torch.allclose(a.cpu().float(), b.float(), **ROUGHLY), (key, path)


@on("copy_late", "compute_late", "random")
@pytest.mark.parametrize("name", sorted(JOBS))
def test_checkpoints_hold_the_state_of_their_step(gpu: torch.device, name: str) -> None:
    """States are compared with copies that synchronise, so the schedule has less to say; the next test leaves it alone."""
    job = JOBS[name](gpu)
    train(job.state, job.step).check()


@pytest.mark.parametrize("name", sorted(JOBS))
def test_nothing_is_reported_while_copies_run_beside_training(gpu: torch.device, name: str) -> None:
    job = JOBS[name](gpu)
    saved = train(job.state, job.step, compare=False)
    last = {key: host(one.state_dict()) for key, one in job.state.items()}
    other = JOBS[name](gpu)
    for number in range(1, 6):
        other.step(number)
    assert equal(last, {key: host(one.state_dict()) for key, one in other.state.items()}), "saving changes nothing"
    replayed = JOBS[name](gpu)
    saved.states[2] = None
    for number in range(1, 3):
        replayed.step(number)
    saved.states = {2: {key: host(one.state_dict()) for key, one in replayed.state.items()}}
    saved.check()


@pytest.mark.parametrize(
    ("budget_mib", "spills"),
    [(20, False), (32, False), (32, True), (64, True)],
    ids=["20-waits", "32-waits", "32-spills", "64-spills"],
)
def test_a_state_larger_than_the_budget_goes_through_a_ring(
    gpu: torch.device, budget_mib: int, spills: bool, tmp_path: Path
) -> None:
    """With 20 MiB nothing is left for snapshots, and training waits for the upload; with 32 and 64 a ring turns."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(5)]).to(gpu)  # 24 MB, with its moments 73
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> None:
        model(torch.randn(2, 1100, generator=torch.Generator().manual_seed(number)).to(gpu)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    spill_dir = str(tmp_path) if spills else ""
    options = Options(threads=2, connections=1, host_budget_bytes=budget_mib << 20, max_stall_s=60, spill_dir=spill_dir)
    saved = train({"model": model, "optim": optim}, step, steps=2, options=options)
    saved.check()
