"""Restores that read straight into the memory of a device: through slabs alone, in order with the compute stream, whatever the schedule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastckpt import Checkpointer
from fastckpt.errors import PartialRestoreError
from fastckpt.reading import window
from fastckpt.store.memory import MemoryStore
from tests.fakegpu import device
from tests.fakegpu.suite.tools import OPTIONS, reports
from tests.support.repositories import flip
from tests.support.straight import addresses, all_straight, place_of, plain


@pytest.fixture(autouse=True)
def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    all_straight(monkeypatch)


def made(where: torch.device, seed: int, *, steps: int = 1) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 7)).to(where)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape).to(where)
        optimizer.step()
    return {"m": model, "o": optimizer}


def saved(where: torch.device) -> tuple[MemoryStore, Any]:
    store, state = MemoryStore(), made(where, 1)
    with Checkpointer(store, state, every=None, spot=None, options=OPTIONS) as ckpt:
        ckpt.save_now(1).wait()
    return store, plain(state)


@pytest.fixture
def host_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of host memory for loaded storages, slabs aside."""
    taken: list[int] = []
    new = window._new_memory

    def watched(n_bytes: int) -> Any:
        taken.append(n_bytes)
        return new(n_bytes)

    monkeypatch.setattr(window, "_new_memory", watched)
    return taken


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("overlap", [False, True])
def test_no_second_copy_on_the_host(gpu: torch.device, host_bytes: list[int], steps: int, overlap: bool) -> None:
    store, held = saved(gpu)
    state = made(gpu, 2, steps=steps)
    before = addresses({"m": state["m"], "o": state["o"]})
    work = state["m"](torch.ones(4, 64, device=gpu)).sum()  # under way when the restore begins
    with Checkpointer(store, state, every=None, spot=None, options=OPTIONS) as ckpt:
        host_bytes.clear()
        assert ckpt.restore(overlap=overlap) == 1
        assert sum(host_bytes) <= 64, "numbers of steps, which lie on the host"
        state["m"](torch.ones(4, 64, device=gpu)).sum().backward()  # at once after it
        for parameter in state["m"].parameters():
            parameter.grad = None
        ckpt.fence()
        assert plain(state) == held
    after = addresses({"m": state["m"], "o": state["o"]})
    assert {name: after[name] for name in before} == before
    del work


def test_an_optimizers_step_at_once_after_it(gpu: torch.device) -> None:
    store, _ = saved(gpu)
    found = []
    for asked in ({"overlap": True}, {}, {"atomic": True}):
        state = made(gpu, 3, steps=0)
        with Checkpointer(store, state, every=None, spot=None, options=OPTIONS) as ckpt:
            ckpt.restore(**asked)
            for parameter in state["m"].parameters():
                parameter.grad = torch.ones(parameter.shape).to(gpu)
            state["o"].step()
            torch.accelerator.synchronize()
        found.append(plain(state))
    assert found[0] == found[1] == found[2]


def test_damage(late: torch.device) -> None:
    store, _ = saved(late)
    state = made(late, 2)
    flip(store, *place_of(store, 1, "o.state.2.exp_avg"))
    with Checkpointer(store, state, every=None, spot=None, options=OPTIONS) as ckpt:
        with pytest.raises(PartialRestoreError, match=r"latest-valid"):
            ckpt.restore()
        with pytest.raises(PartialRestoreError):
            ckpt.step(2)


def test_a_copy_that_fails(late: torch.device) -> None:
    store, held = saved(late)
    state = made(late, 2)
    with Checkpointer(store, state, every=None, spot=None, options=OPTIONS) as ckpt:
        device.fail_copy(2)
        with pytest.raises(PartialRestoreError):
            ckpt.restore()
        device.mend()
        reports()
        assert ckpt.restore() == 1
        assert plain(state) == held


def test_what_an_optimizer_keeps_on_the_host_stays_there(late: torch.device) -> None:
    store, _ = saved(late)
    before = copy.copy(store)
    state = made(late, 2)
    with Checkpointer(before, state, every=None, spot=None, options=OPTIONS) as ckpt:
        ckpt.restore()
    one = state["o"].state[state["m"][0].weight]
    assert (one["exp_avg"].device, one["step"].device) == (late, torch.device("cpu"))


@pytest.mark.parametrize("wait", ["begin", "hold_back"])
def test_each_wait_is_needed(gpu: torch.device, wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug switch: without it the device reports."""
    store, _ = saved(gpu)
    state = made(gpu, 2)
    state["m"](torch.ones(4, 64, device=gpu))
    monkeypatch.setattr(f"fastckpt.snapshot.side_stream.SideStream.{wait}", lambda *_: None)
    with Checkpointer(store, state, every=None, spot=None, options=OPTIONS) as ckpt:
        ckpt.restore(overlap=True)
        for parameter in state["m"].parameters():
            parameter.grad = torch.ones(parameter.shape).to(gpu)
        state["o"].step()
    assert reports()
