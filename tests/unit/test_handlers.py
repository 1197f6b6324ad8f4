"""Signals with several who want to be told, who leave in any order, or are forgotten. Children are forked: a signal may end them."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastckpt import Checkpointer, Every, Options
from fastckpt.host.interrupts import deferred_interrupt
from fastckpt.spot import SignalSource, Watcher, handlers, open_sources, worker_errors
from fastckpt.spot.sources import SLURM_WARNING_S, SlurmSource
from fastckpt.spot.worker_errors import WorkerErrors, may_raise
from fastckpt.store.memory import MemoryStore
from tests.support.stores import HeldStore

SHORT_S = 20.0  # no wait of these tests comes near it
ENDED = -signal.SIGTERM


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    gc.collect()  # Checkpointers of other tests that were not closed give their handlers back now, not during this test
    # A loader with workers, of another test, leaves torch's handler; a Checkpointer that is never closed leaves a guard above it.
    of_others = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
        assert [signal.getsignal(number) for number in numbers] == before
    finally:
        signal.signal(signal.SIGCHLD, of_others)


def outcome(act: Callable[[], Any]) -> int:
    """Of a child that does this and then sends itself SIGTERM: how it ended. 0: it went on."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            act()
            os.kill(os.getpid(), signal.SIGTERM)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def opened(n: int = 1) -> list[SignalSource]:
    sources = [SignalSource(grace_s=7.0) for _ in range(n)]
    for source in sources:
        source.install()
    return sources


def notices(source: SignalSource) -> int:
    return len(source.poll(time.monotonic()))


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("previous", [signal.SIG_DFL, signal.SIG_IGN, print])
def test_sources_may_be_closed_in_any_order(order: tuple[int, ...], previous: Any) -> None:
    before = signal.signal(signal.SIGTERM, previous)
    try:
        sources = opened(3)
        for number in order:
            assert signal.getsignal(signal.SIGTERM) is not previous
            sources[number].close()
            sources[number].close()
        assert signal.getsignal(signal.SIGTERM) is previous
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("chains", [True, False])
@pytest.mark.parametrize("first_closed", [0, 1])
def test_a_handler_set_in_between_is_called_and_stays(chains: bool, first_closed: int) -> None:
    calls = []
    (below,) = opened()
    ours = signal.getsignal(signal.SIGTERM)

    def mine(number: int, frame: Any) -> None:
        calls.append(number)
        if chains:
            ours(number, frame)  # type: ignore[misc]

    signal.signal(signal.SIGTERM, mine)
    (above,) = opened()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (notices(below), notices(above), len(calls)) == (1, 1, 1), "each is told, once"
    pair = [below, above]
    pair[first_closed].close()
    os.kill(os.getpid(), signal.SIGTERM)
    assert (notices(pair[first_closed]), notices(pair[1 - first_closed]), len(calls)) == (0, 1, 2)
    pair[1 - first_closed].close()
    assert signal.getsignal(signal.SIGTERM) is mine
    signal.signal(signal.SIGTERM, ours)  # as somebody does who puts back what he has found
    assert outcome(lambda: None) == ENDED, "nobody wants to be told any more: the default"
    last = opened()[0]
    last.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_forgotten_source_takes_no_signals() -> None:
    def act() -> None:
        opened(2)
        gc.collect()

    assert outcome(act) == ENDED

    def open_and_close() -> None:
        opened()[0].close()

    assert outcome(open_and_close) == ENDED
    kept: list[SignalSource] = []
    assert outcome(lambda: kept.extend(opened(1))) == 0


def test_closed_by_another_thread_it_takes_no_signals() -> None:
    def act() -> None:
        (source,) = opened()
        thread = threading.Thread(target=source.close)
        thread.start()
        thread.join()
        assert callable(signal.getsignal(signal.SIGTERM)), "only the main thread can put it back"

    assert outcome(act) == ENDED


def test_a_forked_child_is_ended_as_if_its_parent_watched_nothing() -> None:
    (source,) = opened()
    try:
        assert outcome(lambda: None) == ENDED
        kept: list[SignalSource] = []
        assert outcome(lambda: kept.extend(opened(1))) == 0, "it may watch for itself"
        assert notices(source) == 0
    finally:
        source.close()


def checkpointer(store: MemoryStore, optimizer: torch.optim.Optimizer, **settings: Any) -> Checkpointer:
    options = Options(threads=1, connections=1)
    state = {"optimizer": optimizer, "weights": torch.randn(100_000)}
    return Checkpointer(store, state, every=Every(steps=1), options=options, **settings)


@pytest.mark.parametrize("spot", ["signal", "signal,file:/nowhere/at/all"])
def test_a_checkpointer_that_was_never_closed_takes_no_signals(spot: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])  # stays: its hooks do not keep the Checkpointer
    ckpt = checkpointer(MemoryStore(), optimizer, spot=spot)
    ckpt.restore()
    ckpt.step(1)
    ckpt.wait()
    thread = ckpt._ending._watcher._thread  # type: ignore[union-attr]
    seen, ckpt = weakref.ref(ckpt), None  # type: ignore[assignment]
    deadline = time.monotonic() + SHORT_S
    while seen() is not None:  # the watcher's thread may just be asking
        gc.collect()
        assert time.monotonic() < deadline
    optimizer.step()
    assert outcome(lambda: None) == ENDED
    (last,) = opened()
    last.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if thread is not None:
        thread.join(SHORT_S)
        assert not thread.is_alive()


def test_a_dropped_checkpointer_stays_until_its_save_has_ended() -> None:
    store = HeldStore()
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter])
    ckpt = checkpointer(store, optimizer, spot=None)
    ckpt.restore()
    store.open.clear()
    handle = ckpt.save_now(1)
    assert store.reached.wait(SHORT_S)
    seen, ckpt = weakref.ref(ckpt), None  # type: ignore[assignment]
    gc.collect()
    assert seen() is not None, "the optimizer's hook has to wait for its copy"
    store.open.set()
    handle.wait(SHORT_S)
    deadline = time.monotonic() + SHORT_S
    while seen() is not None:
        gc.collect()
        assert time.monotonic() < deadline


# -- SLURM -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("FASTCKPT_NOTICE_FILE", raising=False)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "17")


def watched() -> list[str]:
    watchers = [Watcher(open_sources("auto")) for _ in range(2)]  # the first's handler is no reason for the second
    for watcher in watchers:
        watcher.start()
    names = [source.name for watcher in watchers for source in watcher._sources]
    assert names[0] == names[1]
    for watcher in watchers:
        watcher.close()
    return names[0].split()


@pytest.mark.usefixtures("slurm")
def test_under_slurm_its_warning_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched() == ["SIGTERM", "SIGUSR1"]
    monkeypatch.delenv("SLURM_JOB_ID")
    assert watched() == ["SIGTERM"]
    assert [source.name for source in open_sources("SIGTERM, SIGUSR2")] == ["SIGTERM", "SIGUSR2"]


@pytest.mark.usefixtures("slurm")
def test_a_warning_that_somebody_uses_is_left_to_him() -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        assert watched() == ["SIGTERM"]
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert watched() == ["SIGTERM"]
    finally:
        signal.signal(signal.SIGUSR1, before)
    faulthandler.register(signal.SIGUSR1)  # in C: Python's table does not show it
    try:
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        assert watched() == ["SIGTERM"]
    finally:
        faulthandler.unregister(signal.SIGUSR1)
    assert watched() == ["SIGTERM", "SIGUSR1"]


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize(
    ("end_in_s", "left_s"),
    [(90, 90), (None, SLURM_WARNING_S), (40_000, SLURM_WARNING_S), (-5, SLURM_WARNING_S), ("soon", SLURM_WARNING_S)],
)
def test_the_jobs_end_is_the_warnings_deadline(monkeypatch: pytest.MonkeyPatch, end_in_s: Any, left_s: float) -> None:
    if end_in_s is not None:
        text = end_in_s if isinstance(end_in_s, str) else str(int(time.time()) + end_in_s)
        monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    source = SlurmSource((signal.SIGTERM, signal.SIGUSR1), grace_s=7.0)
    source.install()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        now_s = time.monotonic()
        warning, end = source.poll(now_s)
    finally:
        source.close()
    assert warning.seconds_left(now_s) == pytest.approx(left_s, abs=2)
    assert end.seconds_left(now_s) == pytest.approx(7, abs=2)


def test_masks_that_cannot_be_read_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers.Path, "read_text", lambda *a, **k: "SigCgt:\nSigIgn:\tzz\n")  # type: ignore[attr-defined]
    assert handlers.is_default(signal.SIGUSR1)


# -- workers that die with the group -----------------------------------------------------------------------------------


class WorkerDied(RuntimeError):
    pass


@pytest.fixture
def children() -> Iterator[list[int]]:
    """A handler of SIGCHLD that raises, as torch's does."""
    calls: list[int] = []

    def handler(number: int, frame: Any) -> None:
        calls.append(number)
        raise WorkerDied

    before = signal.signal(signal.SIGCHLD, handler)
    yield calls
    signal.signal(signal.SIGCHLD, before)


def die() -> None:
    signal.raise_signal(signal.SIGCHLD)


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a notice keeps for the rest of the process ends with the test."""
    monkeypatch.setattr(worker_errors, "_for_good", set())
    monkeypatch.setattr(worker_errors, "_owners", weakref.WeakSet())


@pytest.mark.usefixtures("keeping")
def test_errors_of_workers_are_kept(children: list[int]) -> None:
    with pytest.raises(WorkerDied):
        die()
    first, second = WorkerErrors(lambda: False), WorkerErrors(lambda: False)
    for _ in range(3):
        first.hold()
        second.hold()
    die()
    assert [type(error) for errors in (first, second) for error in errors.take()] == [WorkerDied] * 2
    first.close()
    die()
    assert (len(first.take()), len(second.take())) == (0, 1)
    assert len(children) == 3, "the handler itself is called each time, once"
    second.close()
    with pytest.raises(WorkerDied):
        die()
    first.hold()
    first = WorkerErrors(lambda: False)  # the other one is forgotten
    gc.collect()
    with pytest.raises(WorkerDied):
        die()


@pytest.mark.usefixtures("keeping")
def test_after_a_notice_they_are_kept_behind_the_end(children: list[int]) -> None:
    errors = WorkerErrors(lambda: False)
    source = SignalSource()
    source.at_once = errors.hold_for_good
    source.install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        die()
    finally:
        source.close()
        errors.close()
    die()
    assert len(errors.take()) == 2


@pytest.mark.usefixtures("keeping")
def test_the_handler_of_a_notice_is_not_ended_by_one(children: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may tell of a worker's end between any two instructions of it."""
    errors = WorkerErrors(lambda: False)
    errors.hold()
    living = handlers._Line.living

    def interrupted(self: Any) -> Any:
        handlers_die()
        return living(self)

    # As if it were in there: what counts is in whose frames the main thread is.
    handlers_die = type(die)(die.__code__, {**die.__globals__, "__name__": "fastckpt.spot.handlers"})  # type: ignore[misc]
    monkeypatch.setattr(handlers._Line, "living", interrupted)
    source = SignalSource()
    source.install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        source.close()
    assert notices(source) == 1
    assert len(errors.take()) >= 1
    errors.close()


@pytest.mark.usefixtures("keeping")
def test_both_at_once_behind_a_deferred_block(children: list[int]) -> None:
    errors = WorkerErrors(lambda: False)
    source = SignalSource()
    source.at_once = errors.hold_for_good
    source.install()
    try:
        with deferred_interrupt():
            die()
            os.kill(os.getpid(), signal.SIGTERM)
            assert children == []
        assert len(errors.take()) == 1
    finally:
        source.close()


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.usefixtures("keeping")
def test_an_error_that_was_kept_ends_the_next_step(children: list[int], noticed: bool) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])
    with checkpointer(MemoryStore(), optimizer, spot="signal") as ckpt:
        ckpt.restore()
        ckpt.step(1)
        die()
        if noticed:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()  # it comes last
            assert ckpt.step(2) is True
            assert ckpt.exit_code == 75
        else:
            with pytest.raises(WorkerDied):
                ckpt.step(2)
            assert ckpt.step(3) is False


@pytest.mark.parametrize(
    ("modules", "raises"),
    [
        (["threading", "queue", "torch.utils.data.dataloader", "__main__"], True),
        (["torchdata.stateful_dataloader.stateful_dataloader", "__main__"], True),
        (["multiprocessing.connection", "mine", "__main__"], True),
        (["torch.optim.adamw", "__main__"], False),
        (["__main__"], False),
        (["mine.threading", "threadingx", "__main__"], False),
        (["threading", "fastckpt.training.save_queue", "fastckpt.training.checkpointer", "__main__"], False),
        (["torch.utils.data.dataset", "fastckpt.spot.handlers", "__main__"], False),
        ([], False),
    ],
)
def test_errors_interrupt_only_who_waits(modules: list[str], raises: bool) -> None:
    assert may_raise(iter(modules), busy=False) is raises
    assert may_raise(iter(modules), busy=True) is False


@pytest.mark.usefixtures("keeping")
def test_nothing_is_held_where_nothing_raises() -> None:
    WorkerErrors(lambda: False).hold()
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
