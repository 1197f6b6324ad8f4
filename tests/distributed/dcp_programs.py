"""What ranks run in test_dcp.py. Functions of this module are called in processes of their own (`tests.support.ranks`)."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict

import fastckpt
from fastckpt.dcp import FastckptReader, FastckptWriter
from fastckpt.options import Options
from tests.distributed.programs import Training
from tests.support.dcp import cause, flip, packs

OPTIONS = Options(threads=1, connections=2, host_budget_bytes=256 << 20)


def in_turn(*calls: tuple[Any, ...]) -> list[Any]:
    """Several functions of this module, each given by its name and arguments, in one job: torch's imports take seconds."""
    return [globals()[name](*arguments) for name, *arguments in calls]


def trained(mode: str, seed: int) -> dict[str, Any]:
    """A model that was trained a step, its optimizer, and what is no tensor."""
    training = Training(mode, seed=seed)
    training.step(seed)
    model, optimizer = get_state_dict(training.model, training.optimizer)
    return {"model": model, "optim": optimizer, "extra": {"step": seed, "betas": [0.9, seed]}}


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """Everything of a state as whole tensors and values, by dotted names."""
    found: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{path}.{key}", item)
        else:
            found[path] = value.full_tensor() if hasattr(value, "full_tensor") else value

    walk("", state)
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def writer(url: str | None = None) -> FastckptWriter:
    return FastckptWriter(url, options=OPTIONS)


def save(url: str, mode: str, seed: int, how: str = "save") -> dict[str, Any]:
    """Save in one of the ways that torch has. Returns what was saved, whole."""
    state = trained(mode, seed)
    if how == "save":
        dcp.save(state, checkpoint_id=url, storage_writer=writer())
    elif how == "torch":
        dcp.save(state, checkpoint_id=url, storage_writer=dcp.FileSystemWriter(url))
    elif how == "cached plans":  # the second save gets no plans of the coordinator, and goes elsewhere
        one = writer()
        for n in (1, 2):
            planner = dcp.DefaultSavePlanner(enable_plan_caching=True)  # type: ignore[call-arg, unused-ignore]
            dcp.save(state, checkpoint_id=url if n == 2 else f"{url}-other", storage_writer=one, planner=planner)
    elif how == "alone":
        dcp.save(state, checkpoint_id=url, storage_writer=writer(), use_collectives=False)
    else:
        group = dist.new_group(backend="gloo")
        kind: dict[str, Any] = {}
        if how == "process":
            from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

            kind = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}
        one = writer()
        for n in (1, 2):  # twice: the second replaces the first
            found: Any = dcp.async_save(
                {**state, "n": n}, checkpoint_id=url, storage_writer=one, process_group=group, **kind
            )
            found.result()
    return whole(state)


def load(url: str, mode: str, how: str = "ours") -> dict[str, Any]:
    state = trained(mode, seed=99)
    reader = dcp.FileSystemReader(url) if how == "torch" else FastckptReader(options=OPTIONS)
    dcp.load(state, checkpoint_id=url, storage_reader=reader)
    return whole(state)


class FailingPlanner(dcp.DefaultSavePlanner):
    """Of one rank: has no data to give."""

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1:
            raise fastckpt.StoreFullError("no room on this node")
        return super().resolve_data(write_item)


def save_with_a_failing_rank(url: str) -> list[str]:
    dcp.save({"x": torch.full((5000,), 1.0), "n": 1}, checkpoint_id=url, storage_writer=writer())
    found = []
    for state, planner in (
        ({"x": torch.full((5000,), 2.0), "n": 2, "y": 3}, FailingPlanner()),
        ({"x": torch.eye(3).to_sparse()}, None),
    ):
        try:
            dcp.save(state, checkpoint_id=url, storage_writer=writer(), planner=planner)
        except CheckpointException as error:
            found += [f"{rank} {type(cause(error, rank)).__name__}" for rank in error.failures]
    target = {"x": torch.zeros(5000), "n": 0}
    dcp.load(target, checkpoint_id=url, storage_reader=FastckptReader())
    assert (target["x"] == 1).all()
    assert target["n"] == 1
    return found


def damaged(url: str) -> list[str]:
    target = {"x": torch.zeros(100_000), "y": torch.zeros(100_000)}
    try:
        dcp.load(target, checkpoint_id=url, storage_reader=FastckptReader())
    except CheckpointException as error:
        return [f"{type(e).__name__} {e}" for e, _ in error.failures.values()]
    return []


def save_and_flip(url: str) -> None:
    """Save, and flip one bit of a pack."""
    dcp.save({"x": torch.rand(100_000), "y": torch.rand(100_000)}, checkpoint_id=url, storage_writer=writer())
    if dist.get_rank() == 0:
        first = packs(url)[0]
        flip(first, first.stat().st_size // 2)
    dist.barrier()


def save_until_killed(url: str, place: str, victim: int) -> None:
    """The victim is killed at a place of its second save."""
    from fastckpt.integrations.dcp import writer as module

    dcp.save({"x": torch.rand(5000), "n": 1}, checkpoint_id=url, storage_writer=writer())
    real = getattr(module, place)

    def killing(*arguments: Any, **named: Any) -> Any:
        if dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    setattr(module, place, killing)
    print("saves", flush=True)
    dcp.save({"x": torch.rand(5000), "y": torch.rand(5000), "n": 2}, checkpoint_id=url, storage_writer=writer())


def train_and_checkpoint(url: str, mode: str) -> dict[str, Any]:
    training = Training(mode, seed=4)
    training.step(0)
    with fastckpt.Checkpointer(url, training.state, spot=None, options=OPTIONS) as ckpt:
        ckpt.save_now(1)
    return whole({"model": get_state_dict(training.model, training.optimizer)[0]})


def load_model(url: str, mode: str) -> dict[str, Any]:
    state = {"model": trained(mode, seed=99)["model"]}
    dcp.load(state, checkpoint_id=url, storage_reader=FastckptReader())
    return whole(state)
