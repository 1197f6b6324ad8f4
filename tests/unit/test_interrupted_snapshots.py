"""Ctrl-C while a snapshot of host tensors is under way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastckpt.errors import SaveError
from fastckpt.snapshot import Stager
from fastckpt.state import Captured
from tests.support.host_training import MIB, SHORT_S, Training, check, checkpointer, committed, options, same
from tests.support.stores import HeldStore


def go_on_and_check(store: HeldStore, ckpt: Any, training: Training) -> None:
    """Change everything by no optimizer's step, as a replayed graph or statistics in forward do: nothing committed may show it."""
    before = training.now()
    with torch.no_grad():
        for tensor in [*training.model.parameters(), *training.norm.buffers()]:
            tensor.add_(1)
    store.open.set()
    with contextlib.suppress(SaveError):
        ckpt.wait(SHORT_S)
    ckpt.close()
    for step in committed(store):
        other = Training(64)
        with checkpointer(store, other) as again:
            assert again.restore(step=step) == 1
        assert same(other.now(), before), "torn"


def test_an_interrupt_while_host_tensors_are_copied(store: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training()
    read = Captured.read

    def interrupted(self: Captured, pieces: Any, out: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGINT)
        read(self, pieces, out)

    with checkpointer(store, training) as ckpt:
        ckpt.step(training.step())
        ckpt.wait(SHORT_S)
        training.step()
        with monkeypatch.context() as patch:
            patch.setattr(Captured, "read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ckpt.step(2)
        ckpt.wait(SHORT_S)
        assert ckpt.stats.snapshot_bytes == 0
        ckpt.save_now(2).wait(SHORT_S)  # either it is, or it is made now
    check(store, [1, 2])


@pytest.mark.parametrize("budget_mib", [128, 32, 16], ids=["whole", "ring", "written_through"])
def test_an_interrupt_in_a_save_that_may_leave_nothing_to_a_hook(
    store: HeldStore, monkeypatch: pytest.MonkeyPatch, budget_mib: int
) -> None:
    """No hook has been seen, so `step` alone sees to it that all is copied before anything changes. An interrupt ends `step`, too: then
    that save is over, or its copies are.
    """
    begin = Stager.begin

    def interrupted(self: Stager, *arguments: Any, **named: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return begin(self, *arguments, **named)

    training = Training(64)
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=budget_mib * MIB, max_stall_s=SHORT_S))
    store.open.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Stager, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpt.step(1)
    go_on_and_check(store, ckpt, training)


@contextlib.contextmanager
def interrupted_once(store: HeldStore) -> Iterator[None]:
    """Ctrl-C comes when the store has been reached; the block ends by it."""
    main = threading.main_thread().ident
    assert main is not None

    def press() -> None:
        assert store.reached.wait(SHORT_S)
        signal.pthread_kill(main, signal.SIGINT)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    presser.join(SHORT_S)


def test_an_interrupt_while_a_ring_waits_in_a_save_without_hooks(store: HeldStore) -> None:
    training = Training(64)
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=32 * MIB, max_stall_s=SHORT_S))
    store.open.clear()

    with interrupted_once(store):
        ckpt.step(1)
    go_on_and_check(store, ckpt, training)


def test_an_interrupt_while_a_state_is_written_through(store: HeldStore) -> None:
    """It is read from where training goes on writing, if the interrupt is caught: so that save must be over."""
    training = Training(64)
    ckpt = checkpointer(store, training, options=options(host_budget_bytes=16 * MIB, max_stall_s=SHORT_S))
    ckpt.step(training.step())
    training.step()
    store.open.clear()
    store.reached.clear()

    with interrupted_once(store):
        ckpt.step(2)
    training.step()
    store.open.set()
    with contextlib.suppress(SaveError):  # of the save that was interrupted
        ckpt.wait(SHORT_S)
    ckpt.save_now(3).wait(SHORT_S)
    ckpt.close()
    check(store, [1, 3], 64)
