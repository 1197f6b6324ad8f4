"""A state larger than the budget, a store that takes nothing: with a disk to spill to, training does not wait."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt import Checkpointer, Options
from fastckpt.errors import SaveError, SnapshotStalledError
from fastckpt.format import keys
from fastckpt.snapshot import spill
from fastckpt.snapshot.spill import SpillFile
from fastckpt.store.memory import MemoryStore
from tests.support.stores import HeldStore

WAIT_S = 15.0
MIB = 1 << 20


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(14)])  # 68 MB


def options(spill_dir: str, **more: Any) -> Options:
    return Options(threads=2, connections=1, host_budget_bytes=64 * MIB, spill_dir=spill_dir, **more)


def train_over(store: HeldStore, net: torch.nn.Module, how: Options) -> dict[str, torch.Tensor]:
    """Save, then change everything while the store is held. What was saved."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Checkpointer(store, {"model": net}, every=None, spot=None, keep=None, options=how) as ckpt:
        then = {name: value.clone() for name, value in net.state_dict().items()}
        timer = threading.Timer(WAIT_S, store.open.set)  # ends a test that would hang
        timer.start()
        ckpt.save_now(1)  # fenced at once: there are no hooks that could be trusted
        held = not store.open.is_set()
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        store.open.set()
        timer.cancel()
        ckpt.wait()
        assert held, "training had to wait for the store"
    return then


def restored(store: HeldStore) -> dict[str, torch.Tensor]:
    net = model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    with Checkpointer(store, {"model": net}, spot=None) as ckpt:
        assert ckpt.restore() == 1
    return net.state_dict()


def test_training_does_not_wait_for_a_store_that_takes_nothing(tmp_path: Path) -> None:
    store = HeldStore(held=True)
    then = train_over(store, model(), options(str(tmp_path)))
    now = restored(store)
    assert all(torch.equal(now[name], value) for name, value in then.items())
    assert list(tmp_path.iterdir()) == [], "the file never had a name"


def test_without_a_disk_it_waits_and_gives_the_snapshot_up(tmp_path: Path) -> None:
    store = HeldStore(held=True)
    with pytest.raises(SnapshotStalledError):
        train_over(store, model(), options("", max_stall_s=0.2))


def test_a_full_disk_is_told_and_the_store_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = HeldStore(held=True)
    net = model()
    written = 0

    def full(fd: int, data: Any, at: int) -> int:
        nonlocal written
        written += 1
        if written > 6:
            store.open.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os_pwrite(fd, data, at)

    os_pwrite = os.pwrite
    monkeypatch.setattr(spill.os, "pwrite", full)  # type: ignore[attr-defined]
    with Checkpointer(store, {"model": net}, every=None, spot=None, keep=None, options=options(str(tmp_path))) as ckpt:
        then = {name: value.clone() for name, value in net.state_dict().items()}
        ckpt.save_now(1)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1)
        ckpt.wait()
    assert "spill_dir cannot take more" in caplog.text
    now = restored(store)
    assert all(torch.equal(now[name], value) for name, value in then.items())


def test_a_disk_that_changes_a_bit_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SpillFile.read

    def read(self: SpillFile, number: int, out: Any) -> None:
        start, _ = self._places[number]
        byte = os.pread(self._file.fileno(), 1, start)[0]
        os.pwrite(self._file.fileno(), bytes([byte ^ 1]), start)
        original(self, number, out)

    monkeypatch.setattr(SpillFile, "read", read)
    store = HeldStore(held=True)
    with pytest.raises(SaveError, match=r"came back as .* Nothing was committed"):
        train_over(store, model(), options(str(tmp_path)))
    assert not list(store.list(keys.COMMITS))


def test_a_directory_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"spill_dir .* cannot be used: No such file"):
        Checkpointer(MemoryStore(), {"model": model()}, spot=None, options=options(str(tmp_path / "none")))


def test_chunks_come_back_as_they_went(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    chunks = {n: random.integers(0, 256, random.integers(1, 100_000), np.uint8) for n in range(20)}
    file = SpillFile(str(tmp_path))
    for some in (range(0, 7), range(7, 8), range(8, 20)):
        file.write({n: chunks[n] for n in some})
    assert 3 in file
    assert 99 not in file
    for n in (5, 0, 19, 7, 5):
        out = np.empty(chunks[n].size, np.uint8)
        file.read(n, out)
        assert (out == chunks[n]).all()
    file.close()
    file.close()
