"""Which kernels run, and when numba's are compiled."""

from __future__ import annotations

import threading

import pytest
import torch

import fastckpt
from fastckpt.kernels import select


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> select.Compiling:
    monkeypatch.delenv("FASTCKPT_KERNELS", raising=False)
    monkeypatch.setattr(select, "native_is_available", lambda: False)
    compiling = select.Compiling()
    monkeypatch.setattr(select, "compiling", compiling)
    return compiling


def test_a_checkpointer_compiles_in_the_background(
    no_native: select.Compiling, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Until it is done NumPy serves, however large the chunk: a notice must not wait for a compiler."""
    finish, ran_on = threading.Event(), []

    def slow() -> bool:
        ran_on.append(threading.current_thread().name)
        assert finish.wait(60)
        return False

    monkeypatch.setattr(select, "numba_is_available", slow)
    with fastckpt.Checkpointer(f"{tmp_path}/run", {"model": torch.nn.Linear(600, 600)}, spot=None) as ckpt:
        assert select.kernels(1 << 30).name == "reference"
        ckpt.save_now(1).wait()
        finish.set()
    assert ran_on == ["fastckpt-compile"]
    thread = no_native.thread
    assert thread is not None
    thread.join(60)


def test_afterwards_numba_serves_large_chunks(no_native: select.Compiling) -> None:
    if not select.numba_is_available():
        pytest.skip("numba is not installed")
    assert select.kernels(1 << 30).name == "numba"
    assert select.kernels(1 << 10).name == "reference"


def test_native_kernels_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling = select.Compiling()
    monkeypatch.setattr(select, "compiling", compiling)
    monkeypatch.setattr(select, "native_is_available", lambda: True)
    select.warm_up()
    assert compiling.thread is None


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_KERNELS", "fastest")
    with pytest.raises(ValueError, match="FASTCKPT_KERNELS is 'fastest': expected one of auto, native"):
        select.kernels()


def test_kernels_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> select.Kernels:
        raise ImportError(f"no module {name}")

    monkeypatch.setenv("FASTCKPT_KERNELS", "native")
    monkeypatch.setattr(select, "load", missing)
    with pytest.raises(ImportError, match="FASTCKPT_KERNELS is 'native', and these kernels are not installed"):
        select.kernels()
