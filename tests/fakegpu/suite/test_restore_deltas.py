"""Chunks with bases that go to a device: each chain is decoded in one room, whatever the schedule, and nowhere else on the host."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from fastckpt import Checkpointer, Options
from fastckpt.kernels.transform import Transform
from fastckpt.reading import window
from fastckpt.repository.commit import open_vote
from fastckpt.store.memory import MemoryStore
from tests.fakegpu.suite.tools import reports
from tests.support.deltas import save_again
from tests.support.repositories import commit_of
from tests.support.straight import all_straight, plain

FULL = Options(threads=2, connections=2, host_budget_bytes=128 << 20, deltas=False)


@pytest.fixture(autouse=True)
def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    all_straight(monkeypatch)
    monkeypatch.setattr("fastckpt.state.chunking.BUNDLE_BYTES", 0)


def made(where: torch.device, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 70)).to(where)
    return {"m": model, "w": {name: one.detach().bfloat16() for name, one in model.named_parameters()}}


@functools.cache
def _saved(where: torch.device) -> tuple[MemoryStore, Any]:
    """Step 3 is the state of step 2, against step 1; its bfloat16 copies are those of the masters."""
    store, state = MemoryStore(), made(where, 1)
    with Checkpointer(store, state, every=None, spot=None, options=FULL) as ckpt:
        for step in (1, 2):
            with torch.no_grad():
                for name, one in state["m"].named_parameters():
                    one.mul_(1 + 1e-6 * step)
                    state["w"][name].copy_(one.bfloat16())
            ckpt.save_now(step).wait()
    casts = {f"w.{name}": f"m.{name}" for name in state["w"]}
    save_again(store, 3, commit_of(store, 2), commit_of(store, 1), casts)
    records = open_vote(store, commit_of(store, 3).vote(0)).records
    assert {Transform.CAST, Transform.SUB} <= set(records["transform"].tolist())
    return store, plain(state)


def saved(where: torch.device) -> tuple[MemoryStore, Any]:
    """As `_saved`, in a store of its own."""
    template, held = _saved(where)
    store = MemoryStore()
    for one in template.list(""):
        store.put(one.key, template.get(one.key))
    return store, held


@pytest.mark.parametrize("asked", [{}, {"overlap": True}])
def test_it_is_what_was_saved(gpu: torch.device, asked: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    store, held = saved(gpu)
    state = made(gpu, 2)
    taken: list[int] = []
    new = window._new_memory
    monkeypatch.setattr(window, "_new_memory", lambda n_bytes: taken.append(n_bytes) or new(n_bytes))
    with Checkpointer(store, state, every=None, spot=None, options=FULL) as ckpt:
        assert ckpt.restore(step=3, **asked) == 3
        state["m"](torch.ones(4, 64, device=gpu)).sum()  # at once after it
        ckpt.fence()
        assert plain(state) == held
    assert sum(taken) == 0
    assert not reports()
