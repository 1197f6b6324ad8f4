"""Fingerprints of chunks on a card: the kernel gives what NumPy gives, and what it finds unchanged is not copied."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastckpt import events
from fastckpt.kernels import reference
from fastckpt.options import Options
from fastckpt.snapshot import fingerprint_op
from fastckpt.snapshot.fingerprint_kernel import kernel_on
from fastckpt.snapshot.fingerprint_op import fingerprints
from fastckpt.training.checkpointer import Checkpointer
from tests.gpu.conftest import Record
from tests.gpu.machines import FAKE, Machine
from tests.gpu.tools import Saved, kept_state, wrong_steps

pytestmark = pytest.mark.gpu

KEYS = (0x1234_5678_9ABC_DEF0, -0x0FED_CBA9_8765_4321)
MIB = 1 << 20
ON_FAKE = os.environ.get("FASTCKPT_GPU_TESTS_ON") == FAKE


def expected(contents: list[torch.Tensor]) -> list[list[int]]:
    keys, found = np.array(KEYS, np.int64).view(np.uint64), []
    for content in contents:
        out = np.empty(2, np.uint64)
        reference.fingerprint(content.contiguous().view(-1).view(torch.uint8).numpy(), keys, out)
        found.append(out.view(np.int64).tolist())
    return found


def views(noise: torch.Tensor) -> list[torch.Tensor]:
    """All alignments and tails, other element types, one and many segments, nothing at all."""
    sizes = (0, 1, 7, 8, 9, 16, 1000, 65_528, 65_536, 65_537, 65_552, 2 * MIB, 4 * MIB)
    found = [noise[start : start + n] for start in ((0, 1) if ON_FAKE else (0, 8, 2, 1)) for n in sizes]
    return [*found, noise[: 4 * MIB].view(torch.float32).view(-1, 64), noise[: 2 * MIB].view(torch.bfloat16), noise]


def test_there_is_a_kernel(cuda: torch.device) -> None:
    """Otherwise torch's own operators would compute all of the following, and nobody would notice."""
    torch.zeros(1, device=cuda)
    assert kernel_on(torch.cuda.current_device()) is not None


def test_fingerprints_are_those_of_numpy(gpu: torch.device) -> None:
    noise = torch.randint(0, 256, (5 * MIB + 5,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    on_card = noise.to(gpu)
    assert fingerprints(views(on_card), KEYS).cpu().tolist() == expected(views(noise))
    assert fingerprint_op._on_any(views(on_card), *KEYS).cpu().tolist() == expected(views(noise))


def test_they_are_computed_in_the_order_of_the_stream(machine: Machine, gpu: torch.device) -> None:
    x, side = torch.zeros(MIB, device=gpu), torch.Stream(device=gpu)
    machine.delay(50)
    x.fill_(1)
    side.wait_stream(torch.accelerator.current_stream(gpu))
    with side:
        machine.delay(50)
        x.record_stream(side)
        found = fingerprints([x], KEYS)
        event = side.record_event()
    torch.accelerator.current_stream(gpu).wait_event(event)
    x.fill_(2)
    assert found.cpu().tolist() == expected([torch.ones(MIB)])


def test_a_frozen_backbone_is_copied_once(gpu: torch.device, record: Record) -> None:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(2)]).to(gpu).requires_grad_(False)
    head = torch.nn.Linear(1100, 40).to(gpu)
    optim = torch.optim.AdamW(head.parameters(), lr=1e-2)
    state = {"backbone": backbone, "head": head, "optim": optim}
    staged: list[events.SnapshotStaged] = []
    saved = Saved()
    options = Options(threads=2, connections=2, host_budget_bytes=256 * MIB, verify_snapshot="off")
    seen = events.subscribe(lambda event: staged.append(event) if isinstance(event, events.SnapshotStaged) else None)
    with seen, Checkpointer(saved.store, state, every=None, keep=None, spot=None, options=options) as ckpt:
        for number in range(1, 6):
            head(backbone(torch.randn(8, 1100).to(gpu))).square().mean().backward()
            optim.step()
            optim.zero_grad()
            saved.states[number] = kept_state(state)
            ckpt.save_now(number).wait(60)
            ckpt.step(number)
    assert wrong_steps(saved) == {}
    weights_bytes = sum(p.nbytes for p in backbone.parameters() if p.dim() > 1)
    assert [event.spared_bytes >= weights_bytes for event in staged] == [False, True, True, True, True]
    record("spared bytes of each save", [event.spared_bytes for event in staged])


def test_time_of_fingerprints(machine: Machine, gpu: torch.device, record: Record) -> None:
    """By the kernel, by torch's operators, and of the copy to the host that they may spare: GB/s."""
    n_chunks = 4 if ON_FAKE else 512
    contents = list(torch.zeros(n_chunks * 4 * MIB, dtype=torch.uint8, device=gpu).split(4 * MIB))
    target = torch.empty(4 * MIB, dtype=torch.uint8, pin_memory=True)

    def seconds(work: Callable[[], object]) -> float:
        found = []
        for _ in range(5):
            torch.accelerator.synchronize()
            started = time.perf_counter()
            work()
            torch.accelerator.synchronize()
            found.append(time.perf_counter() - started)
        return min(found)

    ways = {
        "fingerprint": lambda: fingerprints(contents, KEYS),
        "by torch's operators": lambda: fingerprint_op._on_any(contents, *KEYS),
        "copy to pinned memory": lambda: [target.copy_(content, non_blocking=True) for content in contents],
    }
    record("GB/s", {name: n_chunks * 4 * MIB / seconds(work) / 1e9 for name, work in ways.items()})
