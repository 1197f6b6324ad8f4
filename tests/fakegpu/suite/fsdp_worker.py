"""One rank of test_fsdp.py: trains in every schedule, and writes what was reported and what was saved wrong.

    python -m tests.fakegpu.suite.fsdp_worker RANK FOLDER SCHEDULES

FOLDER is that of all ranks; SCHEDULES is JSON, [[name, seed], …]. All runs are made by one process, as starting it takes longest.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastckpt.options import Options
from fastckpt.snapshot.side_stream import SideStream
from tests.fakegpu import collectives, device
from tests.fakegpu.suite.models import Job, inputs
from tests.fakegpu.suite.schedules import Schedule
from tests.fakegpu.suite.tools import equal, host, load, reports, train
from tests.support.fake_ranks import each_on_its_own

RANKS = 2
STEPS = 3
OPTIMIZERS: dict[str, dict[str, bool]] = {
    "adamw_loop": {"foreach": False},
    "adamw_foreach": {"foreach": True},
    "adamw_fused": {"fused": True},
}
BUGS: dict[str, tuple[str, Callable[..., None]]] = {
    "no_fence": ("hold_back", lambda self, event: None),
    "no_wait_for_compute": ("begin", lambda self: None),
}


def plain() -> nn.Sequential:
    """Two ranks share only its first layer evenly; one shard is over 1 MiB, and so a chunk of its own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 500), nn.GELU(), nn.Linear(500, 1101), nn.GELU(), nn.Linear(1101, 7))


def batch(number: int, rank: int) -> torch.Tensor:
    return inputs(RANKS * number + rank, 8, 32)


def sharded(mesh: DeviceMesh, optimizer: dict[str, bool]) -> Job:
    model = plain().to("fakegpu:0")
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2, **optimizer)

    def step(number: int) -> None:
        model(batch(number, mesh.get_local_rank()).to("fakegpu:0")).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


def shards(value: Any) -> Any:
    """A state with this rank's parts, copied to the host, in place of all DTensors."""
    if isinstance(value, DTensor):
        return host(value.to_local())
    if isinstance(value, dict):
        return {key: shards(one) for key, one in value.items()}
    return host(value)


def states(job: Job) -> dict[int, Any]:
    """What a run without any saves has after each step."""
    found = {}
    for number in range(1, STEPS + 1):
        job.step(number)
        found[number] = shards({name: one.state_dict() for name, one in job.state.items()})
    return found


@contextlib.contextmanager
def scheduled(name: str, seed: int) -> Iterator[None]:
    """As the fixture `gpu` does, which belongs to another process."""
    # Another seed on each rank: twice as many are seen.
    schedule = Schedule(name, RANKS * seed + torch.distributed.get_rank())
    with pytest.MonkeyPatch.context() as monkeypatch:
        schedule.enter(monkeypatch)
        yield


def learns_as_one(job: Job, rank: int) -> bool:
    """Whether the shards are those of one model on the host that is given all ranks' batches."""
    model = plain()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for number in range(1, STEPS + 1):
        model(torch.cat([batch(number, one) for one in range(RANKS)])).square().mean().backward()
        optim.step()
        optim.zero_grad()
    own = {name: tensor.chunk(RANKS)[rank] for name, tensor in model.state_dict().items()}
    found = shards(job.state["model"].state_dict())
    return all(torch.allclose(found[name], own[name], rtol=1e-3, atol=1e-4) for name in own)


def main(rank: int, folder: Path, schedules: list[tuple[str, int]]) -> None:
    device.load()
    collectives.init(rank, RANKS, folder / "rendezvous")
    mesh = init_device_mesh("fakegpu", (RANKS,))
    results: dict[str, Any] = {}

    device.configure("eager")
    expected = {}
    for name, optimizer in OPTIMIZERS.items():
        job = sharded(mesh, optimizer)
        expected[name] = states(job)
        results[name] = {"learns": learns_as_one(job, rank)}
    assert not reports()

    for name, seed in schedules:
        for what, optimizer in OPTIMIZERS.items():
            with scheduled(name, seed):
                job = sharded(mesh, optimizer)
                saved = train(job.state, job.step, steps=STEPS, compare=False)
                found = reports()
            wrong = [
                step for step, state in expected[what].items() if not equal(state, shards(load(saved.store, step)))
            ]
            results[f"{name}-{seed}-{what}"] = {"reports": found, "wrong": wrong}
        # What verification would refuse first is to be seen by the detector.
        unverified = Options(threads=2, connections=2, host_budget_bytes=256 << 20, verify_snapshot="off")
        for what, (method, instead) in BUGS.items():
            with scheduled(name, seed), mock.patch.object(SideStream, method, instead):
                job = sharded(mesh, OPTIMIZERS["adamw_foreach"])
                train(job.state, job.step, steps=STEPS, compare=False, options=unverified)
                results[f"{name}-{seed}-{what}"] = {"reports": reports()}

    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    collectives.close()


if __name__ == "__main__":
    # Each rank has a repository of its own. What is tested are the copies of shards; several ranks in one checkpoint are refused until
    # they are coordinated.
    with each_on_its_own():
        main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
