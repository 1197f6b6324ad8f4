"""Figures and findings that only a card can give. They are recorded; what is asserted is only that they were measured."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastckpt
from fastckpt.options import Options, _physical_memory_bytes
from fastckpt.snapshot.pool import Slab, SlabPool, empty_host_cache
from fastckpt.snapshot.slots import MAX_SLAB_BYTES
from fastckpt.training.checkpointer import Checkpointer, Keep
from tests.gpu.conftest import Record
from tests.gpu.machines import FAKE, Machine
from tests.gpu.tools import differences

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

ON_FAKE = os.environ.get("FASTCKPT_GPU_TESTS_ON") == FAKE
STATE_MB = int(os.environ.get("FASTCKPT_GPU_STATE_MB") or (8 if ON_FAKE else 1000))
ROUNDS = int(os.environ.get("FASTCKPT_GPU_ROUNDS") or (2 if ON_FAKE else 7))
STEPS = 10  # one of them with a save


def quantiles(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}


# -- step time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 8])
def test_step_time_with_and_without_snapshots(machine: Machine, tmp_path: Path, record: Record, times: int) -> None:
    """Blocks of 10 steps, with a save in the first of them and without, in turns."""
    if times > 1 and STATE_MB < 1000:
        pytest.skip(f"FASTCKPT_GPU_STATE_MB is {STATE_MB}: a trial")
    state_mb, n_rounds = times * STATE_MB, max(2, ROUNDS // times)
    width = 2048 if state_mb >= 200 else 256
    layers = max(1, round(state_mb * 1e6 / (12 * width * (width + 1))))
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(width, width), nn.LayerNorm(width))]).to(
        machine.device
    )
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = (
        torch.randn(2 * width, width, device=machine.device)
        if width > 256
        else torch.randn(16, width).to(machine.device)
    )

    def block(ckpt: Checkpointer | None, at: int) -> tuple[float, list[float]]:
        machine.problems()
        marks: list[Any] = []
        if machine.name == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        started = time.perf_counter()
        for number in range(STEPS):
            model(x).square().mean().backward()
            optim.step()
            optim.zero_grad()
            if ckpt is not None and number == 0:
                called_s = time.perf_counter()
                ckpt.save_now(at + number)
                calls.append(time.perf_counter() - called_s)
            if ckpt is not None:
                ckpt.step(at + number)
            if machine.name == "cuda":
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
        found = machine.problems()  # waits
        assert not found
        seconds = time.perf_counter() - started
        return seconds, [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    plain: list[float] = []
    saving: list[float] = []
    steps: dict[str, list[float]] = {"plain": [], "saving": []}
    durable: list[float] = []
    calls: list[float] = []
    """Seconds that save_now has kept the host."""
    budget = min(_physical_memory_bytes() // 2, 4 * state_mb * 1_000_000 + (256 << 20))
    options = Options(host_budget_bytes=budget, threads=2 if ON_FAKE else 0)
    with Checkpointer(
        tmp_path / "run",
        {"model": model, "optim": optim},
        every=None,
        keep=Keep(last=1),
        spot=None,
        grace_s=0,
        options=options,
    ) as ckpt:
        block(None, 0)
        block(ckpt, STEPS)  # pins the slabs; not counted
        ckpt.wait()
        stalled = ckpt.stats.stall_s
        for number in range(n_rounds):
            seconds, of_steps = block(None, 0)
            plain.append(seconds)
            steps["plain"] += of_steps
            began = time.perf_counter()
            seconds, of_steps = block(ckpt, (number + 2) * STEPS)
            saving.append(seconds)
            steps["saving"] += of_steps
            ckpt.wait()
            durable.append(time.perf_counter() - began)
        stalled = ckpt.stats.stall_s - stalled
    record(
        "step time",
        {
            "state bytes": sum(p.numel() * p.element_size() for p in model.parameters()) * 3,
            "host budget bytes": budget,
            "steps in a block": STEPS,
            "s a block without saves": quantiles(plain),
            "s a block with one save": quantiles(saving),
            "extra s a save, medians": statistics.median(saving) - statistics.median(plain),
            "s that save_now kept the host": quantiles(calls),
            "s that step and hooks kept the host, a save": stalled / n_rounds,
            "s until durable, from the block's begin": quantiles(durable),
            "ms a step on the device": {name: quantiles(values) for name, values in steps.items() if values},
            "ms of each step of a block on the device, the save in the first": {
                name: [round(statistics.median(values[i::STEPS]), 2) for i in range(STEPS)]
                for name, values in steps.items()
                if values
            },
        },
    )
    assert len(plain) == len(saving) == n_rounds


# -- one file ---------------------------------------------------------------------------------------------------------


def _seconds(work: Callable[[], Any], machine: Machine) -> float:
    machine.problems()  # waits
    began = time.perf_counter()
    work()
    machine.problems()
    return time.perf_counter() - began


def test_save_and_load_of_device_tensors(machine: Machine, tmp_path: Path, record: Record) -> None:
    """In turns with torch's own; every tensor is compared. fp32 weights and AdamW's moments after three steps."""
    width = 2048 if STATE_MB >= 200 else 256
    layers = max(1, round(STATE_MB * 1e6 / (12 * width * (width + 1))))
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).to(machine.device)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.randn(64, width).to(machine.device)).square().mean().backward()
        optim.step()
    state = {"model": model.state_dict(), "optim": optim.state_dict()}
    ours, asynchronous, theirs = (str(tmp_path / name) for name in ("ours", "async", "theirs"))
    where = str(machine.device)
    found: dict[str, list[float]] = defaultdict(list)
    loaded: dict[str, Any] = {}

    def save_async() -> None:
        began = time.perf_counter()
        handle = fastckpt.save_async(state, asynchronous)
        found["save_async, blocked"].append(time.perf_counter() - began)
        handle.wait()

    def torch_save() -> None:
        torch.save(state, theirs)
        with open(theirs, "rb+") as file:
            os.fsync(file.fileno())

    ways: dict[str, Callable[[], Any]] = {
        "save": lambda: fastckpt.save(state, ours),
        "save_async, durable": save_async,
        "torch.save + fsync": torch_save,
        "load": lambda: loaded.update(ours=fastckpt.load(ours, map_location=where)),
        "torch.load": lambda: loaded.update(theirs=torch.load(theirs, map_location=where)),
        "torch.load, mmap": lambda: loaded.update(mapped=torch.load(theirs, map_location=where, mmap=True)),
    }
    for _ in range(max(2, ROUNDS // 2)):
        for name, work in ways.items():
            found[name].append(_seconds(work, machine))
    loaded["async"] = fastckpt.load(asynchronous)  # where it was
    for name in ("ours", "async"):
        assert not differences(state, loaded[name]), name
        assert {one.device for one in loaded[name]["model"].values()} == {machine.device}
    n_bytes = sum(one.nbytes for one in state["model"].values()) * 3
    record(
        "save and load, s",
        {
            "state bytes": n_bytes,
            "bytes of the file": os.path.getsize(ours),
            "bytes of torch's": os.path.getsize(theirs),
            **{name: quantiles(values) for name, values in found.items()},
        },
    )


# -- pinned memory -------------------------------------------------------------------------------------------------------


def available_bytes() -> int:
    """Of host memory, now."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, _physical_memory_bytes())
    return _physical_memory_bytes()


def test_pinned_memory_for_a_state_that_fills_the_card(machine: Machine, record: Record) -> None:
    """As much as the card holds, or half of what the host has free: what it takes the first time, and the second, and what is refused."""
    wanted = 128 << 20 if ON_FAKE else torch.cuda.get_device_properties(machine.device).total_memory
    possible = min(wanted, available_bytes() // 2)
    possible = int(os.environ.get("FASTCKPT_GPU_PINNED_BYTES") or possible)
    n_slabs = max(1, possible // MAX_SLAB_BYTES)
    pool = SlabPool(n_slabs * MAX_SLAB_BYTES)
    empty_host_cache()
    before = machine.pinned_bytes()

    def take() -> tuple[list[Slab], float]:
        began = time.perf_counter()
        slabs = pool.take_all([MAX_SLAB_BYTES] * n_slabs, for_device=True)
        assert slabs is not None, "the budget has room for all of them"
        return slabs, time.perf_counter() - began

    slabs, first_s = take()
    n_pinned = sum(slab.pinned for slab in slabs)
    assert n_pinned * MAX_SLAB_BYTES + pool.unpinned_bytes == n_slabs * MAX_SLAB_BYTES
    assert all(slab.tensor.is_pinned() == slab.pinned for slab in slabs)
    source = torch.ones(MAX_SLAB_BYTES, dtype=torch.uint8, device=machine.device)
    rates = {}
    for kind in (True, False):
        some = [slab for slab in slabs if slab.pinned is kind][:16]
        if some:
            machine.problems()
            began = time.perf_counter()
            for slab in some:
                slab.tensor.copy_(source, non_blocking=kind)
            machine.problems()
            rates["pinned" if kind else "pageable"] = len(some) * MAX_SLAB_BYTES / 1e9 / (time.perf_counter() - began)
    told = machine.pinned_bytes()
    pool.give_back(slabs)
    slabs, second_s = take()
    pool.give_back(slabs)
    del slabs
    began = time.perf_counter()
    pool._drop_free()
    record(
        "pinned memory",
        {
            "bytes of the card": wanted,
            "bytes asked for": n_slabs * MAX_SLAB_BYTES,
            "bytes pinned": n_pinned * MAX_SLAB_BYTES,
            "bytes pageable": pool.unpinned_bytes,
            "torch says it pinned": None if told is None or before is None else told - before,
            "s the first time": first_s,
            "GB/s the first time": n_slabs * MAX_SLAB_BYTES / 1e9 / first_s,
            "s again": second_s,
            "s to give back to the system": time.perf_counter() - began,
            "GB/s of copies from the device": rates,
        },
    )


# -- DCP -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch's own, about what it will change
def test_what_torchs_own_async_save_stores(machine: Machine, one_process: None, tmp_path: Path, record: Record) -> None:
    """DefaultStager copies on a stream of its own and never makes it wait for the trainer's. Found on the model of a device; a card has to
    confirm it before anybody claims it. 1.0 is right; 0.0 is the value before the update, 2.0 that after the next one.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    ways: dict[str, Any] = {
        "dcp.save": None,
        "dcp.async_save": {},
        "dcp.async_save, DefaultStager()": {"async_stager": DefaultStager()},
        "dcp.async_save, DefaultStager, not pinned, not shared": {
            "async_stager": DefaultStager(StagingOptions(use_pinned_memory=False, use_shared_memory=False))
        },
        "dcp.async_save, DefaultStager, blocking copies": {
            "async_stager": DefaultStager(StagingOptions(use_non_blocking_copy=False))
        },
    }
    found: dict[str, Any] = {}
    weight = torch.zeros(1 << 20, device=machine.device)
    for name, arguments in ways.items():
        entry = found[name] = {"stored": [], "right": True, "reports": 0}
        for attempt in range(3):  # the first one pins memory, which may make the device wait
            machine.compute_late()
            weight.zero_()
            machine.problems()
            path = str(tmp_path / f"{attempt} {name}")
            try:
                machine.delay(200)
                weight.add_(1)  # an optimizer's step, still under way when the save begins
                if arguments is None:
                    dcp.save({"w": weight}, checkpoint_id=path)
                    weight.add_(1)
                else:
                    response = dcp.async_save({"w": weight}, checkpoint_id=path, **arguments)
                    getattr(response, "staging_completion", response).result()
                    weight.add_(1)  # the next one, once staging was waited for
                    getattr(response, "upload_completion", response).result()
                loaded = {"w": torch.full((1 << 20,), -1.0)}
                dcp.load(loaded, checkpoint_id=path)
                outcome: Any = sorted(loaded["w"].unique().tolist())
            except Exception as error:  # what torch raises here is part of the finding
                outcome = f"{type(error).__name__}: {error}"[:300]
            entry["stored"].append(outcome)
            entry["right"] = entry["right"] and outcome == [1.0]
            entry["reports"] += len(machine.problems())
        if arguments and "async_stager" in arguments:
            arguments["async_stager"].close()
    record("what torch's own saves stored; 1.0 is right", found)
    assert set(found) == set(ways)
