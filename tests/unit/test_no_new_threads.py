"""From some moment on no thread can be started, as at the end of Python 3.12: what was accepted is done, by the threads that are there."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import Checkpointer, Every, Keep, Options, events
from fastckpt.errors import SaveError, StoreError
from fastckpt.host import threads
from fastckpt.host.threads import WorkerPool, hurried
from fastckpt.kernels import select
from fastckpt.repository.repository import Repository
from fastckpt.spot import FileSource, Watcher
from fastckpt.spot.sources.imds import ImdsClient
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.testing.metadata_server import MetadataServer
from fastckpt.trace import read
from fastckpt.trace.recorder import Recorder
from fastckpt.training.save_queue import MAX_JOBS
from fastckpt.upkeep.check.repository import check_repository
from fastckpt.writing import background
from tests.support.repositories import check_all, history
from tests.support.stores import HeldStore

MIB = 1 << 20
SHORT_S = 30.0
WORDS = "can't create new thread at interpreter shutdown"  # CPython's
SEVERAL = Options(threads=3, connections=2)
RING = Options(threads=2, connections=1, host_budget_bytes=64 * MIB)

End = Callable[[], None]


@pytest.fixture(params=["refused", "over"])
def end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[End]:
    """To be called when it is to begin. refused: by the interpreter; over: by ourselves, as nobody would wait for the thread."""
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if "process_request_thread" not in self.name:  # a server's: it stands for another process
            raise RuntimeError(WORDS)
        start(self)

    def begin() -> None:
        if request.param == "over":
            monkeypatch.setattr(threads, "_over", True)
        else:
            monkeypatch.setattr(threading.Thread, "start", refuse)

    yield begin
    monkeypatch.undo()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastckpt")]


@pytest.fixture
def ended(end: End) -> None:
    end()


def state(n: int = 3) -> dict[str, Any]:
    """Some MB a number, in pieces that fill no block: what several threads, the direct writer and several packs have to do with."""
    generator = torch.Generator().manual_seed(n)
    return {"step": n, **{f"t{i}": torch.randn(777_777, generator=generator) for i in range(n)}}


def same(found: dict[str, Any], n: int = 3) -> bool:
    expected = state(n)
    return found.keys() == expected.keys() and all(
        torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]
        for name, value in found.items()
    )


# -- one file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["path", "file object", "object"])
def test_saves_that_begin_then_are_done_when_they_return(tmp_path: Path, ended: None, to: str) -> None:
    targets = {"path": tmp_path / "a", "file object": io.BytesIO(), "object": "memory://no-new-threads/a"}
    target: Any = targets[to]
    handle = fastckpt.save_async(state(), target, options=SEVERAL)
    assert handle.staged.done()
    assert handle.done()
    assert handle.wait(0) > 7 * MIB  # compressed a little
    if to == "file object":
        target.seek(0)
    assert same(fastckpt.load(target))
    if to == "path":
        fastckpt.save(state(2), target)
        assert same(fastckpt.load(target), 2)


def test_a_save_that_was_accepted_before_is_whole(tmp_path: Path, end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write = threading.Event(), background.write  # type: ignore[attr-defined]

    def late(*arguments: Any) -> int:
        assert go.wait(SHORT_S)
        return write(*arguments)

    monkeypatch.setattr(background, "write", late)
    handle = fastckpt.save_async(state(), tmp_path / "a", options=SEVERAL)
    end()
    go.set()
    handle.wait(SHORT_S)
    assert same(fastckpt.load(tmp_path / "a"))


def test_an_error_is_raised_at_once_and_leaves_the_old_file(tmp_path: Path, ended: None) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fastckpt.save_async(state(), Full())
    with pytest.raises(Exception, match=r"pickle|local"):
        fastckpt.save_async({"f": lambda: None}, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_all_threads_but_some_may_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end comes while an operation starts its threads: it goes on with those that it has."""
    start = threading.Thread.start
    for allowed in range(6):
        left = [allowed]

        def some(self: threading.Thread, left: list[int] = left) -> None:
            if not left[0]:
                raise RuntimeError(WORDS)
            left[0] -= 1
            start(self)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", some)
            fastckpt.save_async(state(), tmp_path / "a", options=SEVERAL).wait(SHORT_S)
            left[0] = allowed
            assert same(fastckpt.load(tmp_path / "a"))
            store = MemoryStore()
            left[0] = allowed
            with Checkpointer(store, {"s": state()}, every=None, spot=None, options=SEVERAL) as ckpt:
                ckpt.save_now(1)
                ckpt.save_now(2)
        assert [found.step for found in history(store)] == [2, 1]
        check_all(store)


# -- repositories ------------------------------------------------------------------------------------------------------


class Trained:
    """A model whose state says which step it is of."""

    def __init__(self, layers: int = 3) -> None:
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(layers)])  # 4.8 MB each
        self.optim = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.saved: dict[int, dict[str, torch.Tensor]] = {}

    def open(self, store: MemoryStore, *, hooks: bool = True, **settings: Any) -> Checkpointer:
        parts = {"net": self.net} | ({"optim": self.optim} if hooks else {})
        return Checkpointer(store, parts, **{"every": None, "spot": None, "keep": None, "options": SEVERAL, **settings})

    def train(self, step: int) -> int:
        for parameter in self.net.parameters():
            parameter.grad = torch.full_like(parameter, 0.01 * step)
        self.optim.step()
        self.saved[step] = {name: value.clone() for name, value in self.net.state_dict().items()}
        return step

    def check(self, store: MemoryStore, steps: list[int], *, hooks: bool = True) -> None:
        assert [found.step for found in history(store)] == steps[::-1]
        check_all(store)
        for step in steps:
            other = Trained(len(self.net))
            with other.open(store, hooks=hooks) as ckpt:
                assert ckpt.restore(step=step) == step
            assert all(torch.equal(value, self.saved[step][name]) for name, value in other.net.state_dict().items())


@pytest.mark.parametrize("nice", [0, 3])
def test_all_saves_that_are_queued_are_committed(end: End, nice: int) -> None:
    store, job = HeldStore(held=True), Trained()
    options = Options(threads=3, connections=2, background_nice=nice)
    with job.open(store, options=options) as ckpt:
        handles = [ckpt.save_now(job.train(step)) for step in range(1, MAX_JOBS + 1)]
        job.train(3)  # the fence lets go of the copying threads
        end()
        store.open.set()
        with hurried():
            for handle in handles:
                handle.wait(SHORT_S)
    job.check(store, [1, 2])


def test_the_threads_of_every_queued_save_are_there_before_it_is_accepted() -> None:
    """A second save whose turn comes when no thread can be had would otherwise encode and upload with one."""
    store, job = HeldStore(held=True), Trained()
    with job.open(store) as ckpt:
        for step in (1, 2):
            ckpt.save_now(job.train(step))
            names = [thread.name for thread in threading.enumerate()]
            for kind, threads in (("fastckpt-save", 3), ("fastckpt-upload", 2)):
                assert len([name for name in names if name.startswith(kind)]) == threads * step
        store.open.set()


def test_saves_of_a_checkpointer_are_done_when_they_return(ended: None) -> None:
    store, job = MemoryStore(), Trained()
    with job.open(store, keep=Keep(last=2), every=Every(steps=1)) as ckpt:
        for step in (1, 2):
            assert ckpt.save_now(job.train(step)).done()
        for step in (3, 4):
            ckpt.step(job.train(step))
            assert ckpt.stats.durable_step == step
        ckpt.wait(0)
    job.check(store, [3, 4])  # retention has been there too


@pytest.mark.parametrize(("hooks", "spill"), [(True, True), (False, False)], ids=["fenced-spill", "eager-no spill"])
def test_a_state_larger_than_the_budget(tmp_path: Path, ended: None, hooks: bool, spill: bool) -> None:
    store, job = MemoryStore(), Trained(14)  # 68 MB
    options = Options(**{**vars(RING), "spill_dir": str(tmp_path) if spill else ""})
    with job.open(store, hooks=hooks, options=options) as ckpt:
        for step in (1, 2):
            assert ckpt.save_now(job.train(step)).done()
    job.check(store, [1, 2], hooks=hooks)
    assert not list(tmp_path.iterdir())


def test_a_ring_that_turns_when_the_end_comes(tmp_path: Path, end: End) -> None:
    store, job = HeldStore(held=True), Trained(14)
    options = Options(**{**vars(RING), "spill_dir": str(tmp_path)})
    with job.open(store, options=options) as ckpt:
        handle = ckpt.save_now(job.train(1))
        end()
        store.open.set()
        job.train(2)
        handle.wait(SHORT_S)
    job.check(store, [1])


def test_a_state_that_is_written_through(ended: None) -> None:
    """Not even parts of it fit: one storage that is larger than the budget of all copies."""
    store = MemoryStore()
    whole = {"t": torch.arange(20 * MIB)}
    options = Options(threads=2, connections=1, host_budget_bytes=64 * MIB)
    assert fastckpt.save_async(whole, "memory://no-new-threads/large", options=options).done()
    with Checkpointer(store, whole, every=None, spot=None, options=options) as ckpt:
        assert ckpt.save_now(1).done()
    assert torch.equal(fastckpt.load("memory://no-new-threads/large")["t"], whole["t"])
    check_all(store)


def test_a_failure_is_told_and_the_next_save_is_made(ended: None) -> None:
    store, job = HeldStore(), Trained()
    with job.open(store) as ckpt:
        store.failing = StoreError
        handle = ckpt.save_now(job.train(1))
        with pytest.raises(StoreError, match="as the test wants it"):
            handle.wait(0)
        with pytest.raises(StoreError, match="as the test wants it"):
            ckpt.step(job.train(2))
        assert ckpt.stats.snapshot_bytes == 0
        store.failing = None
        ckpt.save_now(job.train(3)).wait(0)
    job.check(store, [3])


def test_an_interrupt_between_queue_and_work_loses_no_save(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler of a signal raises when `save_now` has queued the job and nobody runs it yet."""
    store, job = MemoryStore(), Trained()
    with job.open(store) as ckpt:
        ckpt.save_now(job.train(1)).wait(SHORT_S)
        job.train(2)  # from here on the hook is trusted
        ckpt.step(2)
        end()
        put = ckpt._engine.queue.put

        def interrupted(one: Any) -> bool:
            import signal

            found = put(one)
            signal.raise_signal(signal.SIGINT)  # deferred to the end of the block
            return found

        with monkeypatch.context() as patch:
            patch.setattr(ckpt._engine.queue, "put", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save_now(job.train(3))
        ckpt.wait(0)
    job.check(store, [1, 3])


def test_reading_needs_none_either(tmp_path: Path, end: End) -> None:
    job = Trained()
    with job.open(MemoryStore()):
        pass
    with Checkpointer(tmp_path / "run", {"s": state()}, every=None, spot=None) as ckpt:
        ckpt.save_now(1)
    fastckpt.save(state(), tmp_path / "a")
    end()
    assert same(fastckpt.load(tmp_path / "a"))
    with fastckpt.open(tmp_path / "a") as reader:
        assert torch.equal(reader["t1"], state()["t1"])
    found = state(3)
    for name in ("t0", "t1", "t2"):
        found[name].zero_()
    with Checkpointer(tmp_path / "run", {"s": found}, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 1
    assert same(found)
    report = check_repository(Repository(LocalStore(tmp_path / "run")))
    assert not report.findings


def test_damage_is_found_all_the_same(tmp_path: Path, ended: None) -> None:
    path = tmp_path / "a"
    fastckpt.save(state(), path)
    data = bytearray(path.read_bytes())
    data[5_000_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(fastckpt.CorruptCheckpointError):
        fastckpt.load(path)


# -- what is beside ----------------------------------------------------------------------------------------------------


def test_a_pool_runs_in_the_thread_that_submits(ended: None) -> None:
    pool = WorkerPool(3, "fastckpt-test", nice=5)
    assert pool.inline
    assert pool.submit(threading.current_thread).result(0) is threading.current_thread()
    error = ValueError("mine")

    def fail() -> None:
        raise error

    assert pool.submit(fail).exception(0) is error
    with hurried():
        assert pool.submit(lambda: 4).result(0) == 4
    pool.close()
    assert pool.submit(lambda: 5).cancelled()


def test_only_the_interpreters_end_is_met_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A limit of the machine is an error: it may be gone at the next save, and training should not write in its own thread unasked."""

    def none_left(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        fastckpt.save_async(state(), tmp_path / "a", options=SEVERAL)
    with Checkpointer(MemoryStore(), {"s": state()}, every=None, spot=None, options=SEVERAL) as ckpt:
        with pytest.raises((RuntimeError, SaveError), match="can't start new thread"):
            ckpt.save_now(1)
        assert ckpt.stats.snapshot_bytes == 0
    assert not list(tmp_path.iterdir())


def test_a_recording_that_begins_then_is_written_by_those_who_emit(tmp_path: Path, ended: None) -> None:
    with events.record(tmp_path / "run.jsonl"):
        fastckpt.save_async(state(), tmp_path / "a", options=SEVERAL)
        lines = (tmp_path / "run.jsonl").read_text().splitlines()  # before it is closed: nobody may come to close it
        assert json.loads(lines[0])["fastckpt_recording"] == 1
        assert json.loads(lines[-1])["event"] == "SaveFinished"
    found = read(tmp_path / "run.jsonl")
    assert found.events[-1].kind == "SaveFinished"
    assert not found.notes
    fastckpt.save(state(), tmp_path / "a")
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == len(lines), "closed is closed"


def test_a_recording_that_cannot_go_on_ends_with_one_warning(
    tmp_path: Path, ended: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "run.jsonl")
    monkeypatch.setattr("fastckpt.trace.recorder.MAX_RECORDING_BYTES", 10)
    for step in (1, 2):
        recorder(events.SaveDeferred(target="t", step=step, waiting=0))
    recorder.close()
    assert caplog.text.count("has stopped: OSError: it would be longer than 10 bytes") == 1


def test_a_watcher_goes_without_its_thread(tmp_path: Path, ended: None) -> None:
    job, store = Trained(), MemoryStore()
    with job.open(store, spot=[FileSource(str(tmp_path / "notice"))]) as ckpt:
        ckpt.save_now(job.train(1))
        assert ckpt.notice is None
    job.check(store, [1])
    watcher = Watcher([FileSource(str(tmp_path / "notice"))])
    watcher.start()
    watcher.close()


def test_the_metadata_service_can_be_asked(end: End) -> None:
    with MetadataServer() as server:
        end()
        assert ImdsClient(server.url).get("latest/meta-data/instance-type").text == "g5.xlarge"  # type: ignore[union-attr]


def test_kernels_are_not_compiled_then(ended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "compiling", select.Compiling())
    monkeypatch.setattr(select, "native_is_available", lambda: False)
    monkeypatch.delenv(select.ENV, raising=False)
    select.warm_up()
    assert not select.compiling.under_way()


def test_who_is_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Twice, if somebody begins in between; but never twice for a thread that hangs."""
    monkeypatch.setenv(threads.ENV_EXIT_TIMEOUT, "0.05")
    go = threading.Event()
    hung = threads.start_thread(go.wait, "hung")  # type: ignore[arg-type]
    assert hung is not None
    threads._wait()
    assert caplog.text.count("saves under way, 0.05 s after its main thread (hung)") == 1
    began = time.monotonic()
    monkeypatch.setenv(threads.ENV_EXIT_TIMEOUT, "600")
    later = threads.start_thread(lambda: None, "later")
    assert later is not None
    threads._wait()
    assert time.monotonic() - began < SHORT_S
    assert not later.is_alive()
    assert hung.is_alive()
    go.set()
    hung.join(SHORT_S)


def test_an_interrupt_ends_the_wait_for_good(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    go = threading.Event()
    hung = threads.start_thread(go.wait, "hung")  # type: ignore[arg-type]
    assert hung is not None

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            threads._wait()
    assert "the process ends with saves under way, interrupted by KeyboardInterrupt (hung)" in caplog.text
    threads._wait()  # or it would last for ten minutes
    go.set()
    hung.join(SHORT_S)
