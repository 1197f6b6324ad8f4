"""What save_async keeps from call to call: once taken, used again, within one budget, given back when asked."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.options import Options
from fastckpt.snapshot.kept import kept

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    fastckpt.release_memory()
    yield
    fastckpt.release_memory()
    assert kept.free_bytes == 0


def state(mib: int = 8, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"w{n}": torch.full((MIB // 4,), value + n) for n in range(mib)}


def test_the_second_save_takes_no_new_memory(tmp_path: Path, taken: list[int]) -> None:
    for number in range(3):
        fastckpt.save_async(state(value=number), tmp_path / "f").wait()
        assert fastckpt.load(tmp_path / "f")["w3"].eq(number + 3).all()
    n_bytes = sum(taken)
    assert 8 * MIB <= n_bytes <= 16 * MIB  # slabs are powers of two
    assert kept.free_bytes == n_bytes
    assert fastckpt.release_memory() == n_bytes
    assert fastckpt.release_memory() == 0


class Held(io.BytesIO):
    """A file that takes nothing until it is let: a save to it holds its memory."""

    go = threading.Event()

    def write(self, data: Any, /) -> int:
        assert self.go.wait(60)
        return super().write(data)


@pytest.fixture
def held() -> Iterator[type[Held]]:
    Held.go.clear()
    yield Held
    Held.go.set()


# Room for a few copies of 8 MiB beside what encoding takes.
FEW = Options(threads=1, connections=1, host_budget_bytes=64 * MIB, max_stall_s=0)


def room(options: Options) -> int:
    return options.host_budget_bytes - options.encoder_bytes


def test_saves_at_once_share_one_budget(held: type[Held], taken: list[int], caplog: pytest.LogCaptureFixture) -> None:
    handles = [fastckpt.save_async(state(value=1), held(), options=FEW)]
    n = room(FEW) // sum(taken)
    handles += [fastckpt.save_async(state(value=i), held(), options=FEW) for i in range(2, n + 1)]
    n_bytes = sum(taken)
    assert n_bytes <= room(FEW)
    more = io.BytesIO()
    with caplog.at_level(logging.WARNING):
        assert fastckpt.save_async(state(), more, options=FEW).done()
    assert "what earlier saves leave of it: <BytesIO> is written before save_async returns" in caplog.text
    assert sum(taken) == n_bytes
    held.go.set()
    for handle in handles:
        handle.wait(60)


def test_a_save_waits_for_the_memory_of_an_earlier_one(held: type[Held], taken: list[int]) -> None:
    options = dataclasses.replace(FEW, max_stall_s=60)
    handles = [fastckpt.save_async(state(value=1), held(), options=options)]
    n = room(options) // sum(taken)
    handles += [fastckpt.save_async(state(value=i), held(), options=options) for i in range(2, n + 1)]
    n_bytes, more, file = sum(taken), [], io.BytesIO()
    waiting = threading.Thread(target=lambda: more.append(fastckpt.save_async(state(value=7), file, options=options)))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    held.go.set()
    waiting.join(60)
    for handle in [*handles, *more]:
        handle.wait(60)
    assert sum(taken) == n_bytes
    file.seek(0)
    assert fastckpt.load(file)["w1"].eq(8).all()


def test_a_smaller_budget_gives_back_what_lies_beyond_it(tmp_path: Path) -> None:
    fastckpt.save_async(state(32), tmp_path / "f", options=Options(threads=1, host_budget_bytes=512 * MIB)).wait()
    assert kept.free_bytes >= 32 * MIB
    fastckpt.save_async(state(2), tmp_path / "f", options=FEW).wait()
    assert kept.free_bytes <= room(FEW)


def test_saves_of_many_threads(tmp_path: Path) -> None:
    def run(number: int) -> None:
        for turn in range(5):
            fastckpt.save_async(state(2, number * 10 + turn), tmp_path / str(number)).wait()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for n in range(6):
        assert fastckpt.load(tmp_path / str(n))["w1"].eq(n * 10 + 4 + 1).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 on, of a process with threads
def test_a_forked_child_has_memory_of_its_own(held: type[Held], tmp_path: Path) -> None:
    pending = fastckpt.save_async(state(), held())
    child = os.fork()
    if not child:
        try:
            assert kept.free_bytes == 0
            os._exit(0 if fastckpt.release_memory() == 0 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.go.set()
    pending.wait(60)
