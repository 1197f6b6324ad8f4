"""Saves of a Checkpointer whose state is mostly frozen: what leaves the device, and that every checkpoint is whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastckpt.options import Options
from tests.fakegpu import device
from tests.fakegpu.suite.models import Job, inputs
from tests.fakegpu.suite.run import Run
from tests.fakegpu.suite.schedules import on
from tests.fakegpu.suite.tools import reports

OPTIONS = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 << 20, verify_snapshot="off")
VERIFIED = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 << 20, verify_snapshot="always")
ON = on("eager", "copy_late", "compute_late", "starve_copies")


def adapters(where: torch.device) -> Job:
    """A backbone that no optimizer has, and a small head."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(*[torch.nn.Linear(800, 800) for _ in range(3)]).to(where).requires_grad_(False)
    head = torch.nn.Linear(800, 40).to(where)
    optim = torch.optim.SGD(head.parameters(), lr=1e-2, momentum=0.9)

    def step(number: int) -> None:
        head(backbone(inputs(number, 4, 800).to(where))).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"backbone": backbone, "head": head, "optim": optim}, step)


def bytes_of_saves(run: Run, n: int, between: Callable[[], None] = lambda: None) -> list[int]:
    """What each of some saves copies to the host."""
    found = []
    for _ in range(n):
        run.step()
        between()
        before = device.bytes_to_host()
        run.save().wait(20)
        found.append(device.bytes_to_host() - before)
    return found


@ON
def test_a_frozen_backbone_leaves_the_device_once(gpu: torch.device) -> None:
    run = Run(gpu, adapters, options=OPTIONS)
    backbone_bytes = sum(
        parameter[0].nbytes * 800 for parameter in run.job.state["backbone"].parameters() if parameter.dim() > 1
    )
    first, *later = bytes_of_saves(run, 4)
    assert first > backbone_bytes
    # One bundle has the biases of both, and the head.
    assert all(0 < n <= first - backbone_bytes + 5000 for n in later)
    run.check(1, 2, 3, 4)


@ON
def test_a_backbone_that_thaws_is_copied_again(gpu: torch.device) -> None:
    run = Run(gpu, adapters, options=VERIFIED)
    weight = run.job.state["backbone"][1].weight

    def write() -> None:
        weight.data.mul_(1.25)

    first, second = bytes_of_saves(run, 2)
    third, fourth = bytes_of_saves(run, 2, write)
    assert second < first
    assert min(third, fourth) >= weight.nbytes + second - 1000  # 16 bytes for a fingerprint
    run.store.open.set()
    run.ckpt.close()
    assert run.committed() == [1, 2, 3, 4]
    assert not reports()


@on("eager", "copy_late")
def test_saves_that_overlap_compare_with_both(gpu: torch.device) -> None:
    """While one uploads, the next is staged: whichever is the base then has the bytes."""
    run = Run(gpu, adapters, options=OPTIONS)
    bytes_of_saves(run, 2)
    run.store.open.clear()
    run.train_and_save()
    weight = run.job.state["backbone"][1].weight
    before = device.bytes_to_host()
    run.train_and_save()
    run.step()
    assert device.bytes_to_host() - before < weight.nbytes
    run.check(1, 2, 3, 4)


@on("eager")
def test_a_full_save_copies_everything(gpu: torch.device) -> None:
    run = Run(gpu, adapters, options=OPTIONS)
    first, second = bytes_of_saves(run, 2)
    run.step()
    before = device.bytes_to_host()
    run.ckpt.save_now(run.done, full=True).wait(20)
    assert device.bytes_to_host() - before >= first - 1000 > second
    run.check(1, 2, 3)
