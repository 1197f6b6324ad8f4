"""Ranks that begin in different ways. Functions of this module are called in processes of their own (`tests.support.ranks`)."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

import fastckpt
from fastckpt import Every, Options
from fastckpt.store import LocalStore
from tests.distributed.programs import OPTIONS


def begin(url: str, way: str) -> str:
    """Begin as every rank does, but for the last one, which has it its own way. What this rank is told."""
    logging.basicConfig(level=logging.INFO)
    differs = dist.get_rank() == dist.get_world_size() - 1
    state: dict[str, Any] = {"model": torch.nn.Linear(4, 4), "epoch": {"n": 1}}
    settings: dict[str, Any] = {"every": Every(steps=5), "spot": None, "options": Options(**OPTIONS)}
    if way == "experimental store":
        LocalStore.one_writer = "it is experimental"
    if differs:
        change(way, state, settings)
        url += "-of-its-own" * (way == "another directory")
    try:
        with fastckpt.Checkpointer(url, state, **settings) as ckpt:
            step = 0 if way == "no restore" and differs else ckpt.restore()
            ckpt.save_now(step + 1).wait()
            return f"saved {step + 1}"
    except fastckpt.CheckpointError as error:
        return f"{type(error).__name__}: {error}"


def change(way: str, state: dict[str, Any], settings: dict[str, Any]) -> None:
    if way == "several at once":
        state["ema"] = {"n": 1}
        settings["every"] = None
        settings["fresh"] = True
    elif way == "read only":
        settings["read_only"] = True


def save_twice(url: str, ddp: bool) -> None:
    """Steps 1 and 2. ddp: the module is held alike by all ranks, and written once."""
    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Linear(30, 30)
    state = {
        "weights": torch.nn.parallel.DistributedDataParallel(model) if ddp else model,
        "own": {"rank": dist.get_rank()},
    }
    with fastckpt.Checkpointer(url, state, every=None, spot=None, options=Options(**OPTIONS)) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            ckpt.save_now(step).wait()
