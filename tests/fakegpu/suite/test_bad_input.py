"""What goes wrong while a snapshot is under way: an error at the caller, nothing committed of that save, and all else untouched.

Each test ends with `Run.check`: every checkpoint that exists holds the state of its step, training is bit for bit that of a run without
saves, nothing of the budget is lost. The fixture sees to it that nothing was reported.
"""
# ruff: noqa: PT012 - what happens inside of the `with` is what these tests are about

from __future__ import annotations

import contextlib
import linecache
import logging
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastckpt
from fastckpt.errors import SaveError, TornSnapshotError
from fastckpt.options import Options
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.snapshot import device_copies
from fastckpt.snapshot import snapshot as engine
from fastckpt.snapshot.device_copies import DeviceCopies
from fastckpt.snapshot.side_stream import SideStream
from fastckpt.training.checkpointer import Checkpointer, Every
from tests.fakegpu import device
from tests.fakegpu.suite.models import Job, batch_norm_cnn, inputs, moving_average
from tests.fakegpu.suite.tools import Saved, equal, host, reports
from tests.repositories import HeldStore

SHORT_S = 20.0  # no wait of these tests comes near it
UNVERIFIED = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 << 20, verify_snapshot="off")
VERIFIED = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 << 20, verify_snapshot="always")
RING = Options(
    threads=1, connections=1, compress=False, host_budget_bytes=24 << 20, verify_snapshot="off", max_stall_s=SHORT_S
)
"""Two slabs of 4 MiB for snapshots, and as much for packs."""


@pytest.fixture
def late() -> Iterator[torch.device]:
    """As `gpu`, under one schedule, in which copies come as late as they may: for tests that are not about the order of streams."""
    device.configure("copy_late")
    device.cost()
    device.clear()
    yield torch.device("fakegpu:0")
    found = reports()
    assert not found, "\n".join(found)


def small(where: torch.device) -> Job:
    """2 MB with its momentum: a storage that is a chunk of its own, and some that are copied together."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 520), torch.nn.GELU(), torch.nn.Linear(520, 520)).to(where)
    optim = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)

    def step(number: int) -> None:
        model(inputs(number, 16, 32).to(where)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


def wide(where: torch.device) -> Job:
    """29 MB with its moments, and some small ones that are copied together."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(2)]).to(where)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> None:
        model(inputs(number, 2, 1100).to(where)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


class Run:
    """A job that is saved now and then, and what it must come to."""

    def __init__(self, where: torch.device, make: Callable[[torch.device], Job] = small, **settings: Any) -> None:
        self.where, self.make = where, make
        self.job = make(where)
        self.store = HeldStore()
        settings = {"every": None, "keep": None, "spot": None, "options": UNVERIFIED, **settings}
        self.ckpt = Checkpointer(self.store, self.job.state, **settings)
        self.done = 0

    def step(self) -> int:
        """One of training. Its number."""
        self.job.step(self.done + 1)
        self.done += 1
        return self.done

    def save(self) -> fastckpt.CommitHandle:
        """Of the last step, whose optimizers have called their hooks: it is left to the next one's."""
        handle = self.ckpt.save_now(self.done)
        self.ckpt.step(self.done)
        return handle

    def train_and_save(self) -> fastckpt.CommitHandle:
        self.step()
        return self.save()

    def committed(self) -> list[int]:
        return sorted(found.step for found in Catalog(Repository(self.store)).history())

    def check(self, *expected: int, apart_from: tuple[int, ...] = ()) -> None:
        """Train on, save once more, close; then look. expected: steps that have a checkpoint, and no others but the last one.
        apart_from: those that may have one.
        """
        self.store.open.set()
        self.train_and_save().wait(SHORT_S)
        last = self.done
        self.step()
        self.ckpt.wait(SHORT_S)
        assert self.ckpt.stats.snapshot_bytes == 0, "slabs were lost"
        self.ckpt.close()
        now = {name: host(one.state_dict()) for name, one in self.job.state.items()}
        found = self.committed()
        assert set(found) - {*apart_from} == {*expected, last} - {*apart_from}
        undisturbed = self.make(self.where)
        saved = Saved(self.store)
        for number in range(1, self.done + 1):
            undisturbed.step(number)
            if number in found:
                saved.states[number] = {name: host(one.state_dict()) for name, one in undisturbed.state.items()}
        saved.check()
        compare(now, {name: host(one.state_dict()) for name, one in undisturbed.state.items()})
        assert not reports()


def compare(a: Any, b: Any) -> None:
    assert equal(a, b), "training was changed"


def interrupt() -> None:
    """As the user does."""
    signal.raise_signal(signal.SIGINT)


# -- an optimizer's step from elsewhere --------------------------------------------------------------------------------


def in_thread(call: Callable[[], None]) -> None:
    """Run it to its end in another thread, whose current streams are the default ones. Raises what it raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(SHORT_S)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def test_a_step_from_another_thread_on_another_stream_is_held_back_there(gpu: torch.device) -> None:
    """The training thread computes on a stream of its own, the other thread's is the default one; they are ordered by events."""
    own, default = torch.Stream(device=gpu), torch.accelerator.current_stream(gpu)

    def make(where: torch.device) -> Job:
        job = small(where)
        model, optim = job.state["model"], job.state["optim"]
        own.wait_stream(default)

        def update() -> None:
            default.wait_stream(own)
            optim.step()
            own.wait_stream(default)

        def step(number: int) -> None:
            with own:
                model(inputs(number, 16, 32).to(where)).square().mean().backward()
                in_thread(update)
                optim.zero_grad(set_to_none=False)

        return Job(job.state, step)

    run = Run(gpu, make)
    with own:
        run.train_and_save().wait(SHORT_S)
        run.train_and_save()
        assert run.ckpt._hooks is not None
        run.step()
        assert run.ckpt._hooks.can_be_trusted
        run.check(1, 2)


def two_streams(where: torch.device, elsewhere: Callable[[Callable[[], None]], None] = lambda call: call()) -> Job:
    """Two models, each updated on a stream of its own: nothing orders the one update with the other."""
    torch.manual_seed(0)
    first, second = (torch.nn.Linear(600, 600).to(where) for _ in range(2))
    optims = [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9) for model in (first, second)]
    side, main = torch.Stream(device=where), torch.accelerator.current_stream(where)

    def step(number: int) -> None:
        x = inputs(number, 16, 600).to(where)
        (first(x).square().mean() + second(x).square().mean()).backward()
        side.wait_stream(main)

        def update() -> None:
            with side:
                optims[0].step()

        elsewhere(update)
        optims[1].step()
        main.wait_stream(side)
        for optim in optims:
            optim.zero_grad(set_to_none=False)

    return Job({"first": first, "second": second, "one": optims[0], "other": optims[1]}, step)


@pytest.mark.parametrize("elsewhere", [lambda call: call(), in_thread], ids=["same_thread", "other_thread"])
def test_every_stream_that_updates_is_held_back(
    gpu: torch.device, elsewhere: Callable[[Callable[[], None]], None]
) -> None:
    run = Run(gpu, lambda where: two_streams(where, elsewhere))
    for _ in range(3):
        run.train_and_save()
    run.check(1, 2, 3)


def test_a_step_waits_while_another_threads_step_is_in_the_fence(
    late: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring turns as slowly as its store takes packs. Both optimizers' steps must wait, not only that which came first."""
    entered = threading.Event()
    fence = engine.Snapshot.fence

    def told(self: engine.Snapshot, *arguments: Any) -> None:
        entered.set()
        fence(self, *arguments)

    def make(where: torch.device) -> Job:
        torch.manual_seed(0)
        models = [torch.nn.Linear(1100, 1100).to(where) for _ in range(2)]
        optims = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]

        def step(number: int) -> None:
            x = inputs(number, 2, 1100).to(where)
            sum(model(x).square().mean() for model in models).backward()
            # The default stream, for both.
            thread = threading.Thread(target=optims[0].step)
            thread.start()
            if threading.current_thread() is waiting_thread and not store.open.is_set():
                assert entered.wait(SHORT_S)
                threading.Timer(0.2, store.open.set).start()
                optims[1].step()
                waited.append(store.open.is_set())
            else:
                thread.join(SHORT_S)
                optims[1].step()
            thread.join(SHORT_S)
            assert not thread.is_alive()
            for optim in optims:
                optim.zero_grad(set_to_none=False)

        return Job({"a": models[0], "b": models[1], "one": optims[0], "other": optims[1]}, step)

    waiting_thread, waited = threading.current_thread(), list[bool]()
    run = Run(late, make, options=RING)
    store = run.store
    run.train_and_save().wait(SHORT_S)
    run.step()
    store.open.clear()
    run.save()
    monkeypatch.setattr(engine.Snapshot, "fence", told)
    with contextlib.suppress(TornSnapshotError):  # what `waited` and the checkpoints say is what counts
        run.step()
        run.ckpt.wait(SHORT_S)
    assert waited == [True], "the second step went on while the first was still waiting for the copies"
    run.check(1, 2)


# -- out of memory -----------------------------------------------------------------------------------------------------


def test_memory_that_cannot_be_pinned_is_made_up_for(gpu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    device.limit_pinned_bytes(0)
    run = Run(gpu, batch_norm_cnn, options=VERIFIED)
    with caplog.at_level(logging.WARNING, logger="fastckpt"):
        for _ in range(3):
            run.train_and_save()
        run.ckpt.wait(SHORT_S)
    told = [record.message for record in caplog.records if "cannot be pinned" in record.message]
    assert len(told) == 1
    assert "ulimit -l" in told[0]
    assert run.ckpt._stager.pool.unpinned_bytes > 0
    run.check(1, 2, 3)


def test_pinned_memory_that_runs_out_midway_is_made_up_for(late: torch.device) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    device.limit_pinned_bytes(0)
    run.ckpt._stager.pool._drop_free()
    run.train_and_save()
    run.check(1, 2)


@pytest.mark.parametrize(("make", "options"), [(moving_average, UNVERIFIED), (batch_norm_cnn, VERIFIED)])
def test_a_device_without_room_for_anything_is_saved(
    gpu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[torch.device], Job],
    options: Options,
) -> None:
    """No clones, no joint transfers, no fingerprints: slower, as whole."""
    cloned: list[bool] = []
    clone = DeviceCopies.clone

    def noted(self: DeviceCopies, chunks: Any) -> bool:
        cloned.append(clone(self, chunks))
        return cloned[-1]

    monkeypatch.setattr(DeviceCopies, "clone", noted)
    run = Run(gpu, make, options=options)
    for _ in range(3):
        run.step()
        torch.accelerator.synchronize()
        device.limit_device_bytes(0)
        run.save()
        device.limit_device_bytes(1 << 62)
    run.ckpt.wait(SHORT_S)
    assert cloned == [False] * 3
    assert all(side._joint is None for side in run.ckpt._stager._sides.values())
    unverified = [record for record in caplog.records if "no room for fingerprints" in record.message]
    assert len(unverified) == (3 if options is VERIFIED else 0)
    run.check(1, 2, 3)


# -- a device that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2])
def test_a_copy_that_fails_on_the_device_fails_the_save(gpu: torch.device, after: int) -> None:
    run = Run(gpu)
    run.train_and_save().wait(SHORT_S)
    run.step()
    device.fail_copy(after)
    handle = run.ckpt.save_now(run.done)
    with pytest.raises(RuntimeError, match="copy engine"):  # the device's own words
        handle.wait(SHORT_S)
    with pytest.raises(RuntimeError, match="copy engine"):  # for those who hold no handle
        run.ckpt.step(run.done)
    assert run.committed() == [1]
    assert run.ckpt.save_now(run.done).wait(SHORT_S).save.attempt == 1
    run.check(1, 2)


def test_slabs_of_a_device_that_stays_broken_are_not_used_again(
    late: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    run.step()
    run.ckpt.wait(SHORT_S)
    pool = run.ckpt._stager.pool
    held = pool.held_bytes

    def broken(event: torch.Event) -> None:
        raise torch.AcceleratorError("unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(device_copies, "wait_for", broken)
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            run.ckpt.save_now(run.done).wait(SHORT_S)
        with pytest.raises(RuntimeError, match="unspecified launch failure"):
            run.ckpt.wait(SHORT_S)
    assert pool.used_bytes == 0
    assert pool.held_bytes < held, "a device that failed may still write to them"
    assert run.committed() == [1]
    torch.accelerator.synchronize()
    run.check(1)


# -- a second save while one runs --------------------------------------------------------------------------------------


def test_saves_that_come_while_one_runs_are_joined_queued_or_deferred(late: torch.device) -> None:
    run = Run(late, every=Every(steps=1))
    run.step()
    run.store.open.clear()
    first = run.ckpt.save_now(1)
    assert run.ckpt.save_now(1) is first, "the same step, the same save"
    run.ckpt.step(1)
    second = run.train_and_save()
    assert second is not first
    for _ in range(3):
        run.ckpt.step(run.step())
    assert run.ckpt.stats.deferred == 3
    assert run.ckpt.stats.saves == 2
    threading.Timer(0.0, run.store.open.set).start()
    third = run.ckpt.save_now(run.done)  # waits for room
    assert {first.wait(SHORT_S).save.step, second.wait(SHORT_S).save.step, third.wait(SHORT_S).save.step} == {1, 2, 5}
    run.check(1, 2, 5)


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [1, 3])
def test_an_interrupt_inside_of_save(late: torch.device, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    run.step()
    calls: list[int] = []
    copy = SideStream.copy

    def interrupted(self: SideStream, target: Any, pieces: Any, *, pinned: bool) -> None:
        calls.append(1)
        copy(self, target, pieces, pinned=pinned)
        if len(calls) == nth:
            interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(SideStream, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.ckpt.save_now(run.done)
    # It is put off until the snapshot is whole and queued; then the save goes on without its caller.
    run.ckpt.wait(SHORT_S)
    assert run.ckpt.stats.snapshot_bytes == 0
    assert run.committed() == [1, 2]
    run.check(1, 2)


def test_an_interrupt_inside_of_the_fence(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who goes on after it (a notebook does) has a step still to make, and that one must be held back as well."""
    run = Run(gpu)
    run.train_and_save().wait(SHORT_S)
    run.train_and_save()
    model, optim = run.job.state["model"], run.job.state["optim"]

    def interrupted(self: SideStream, event: torch.Event) -> None:
        interrupt()

    model(inputs(run.done + 1, 16, 32).to(gpu)).square().mean().backward()
    with monkeypatch.context() as patch:
        patch.setattr(SideStream, "hold_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optim.step()
    optim.step()
    optim.zero_grad()
    run.done += 1
    run.ckpt.wait(SHORT_S)
    run.check(1, 2)


def test_an_interrupt_while_the_fence_keeps_the_host(late: torch.device) -> None:
    """A ring whose store hangs: the user has enough, and leaves."""
    run = Run(late, wide, options=RING, close_timeout_s=0.01)
    run.train_and_save().wait(SHORT_S)
    run.step()
    run.store.open.clear()
    run.store.reached.clear()
    model, before = run.job.state["model"], host(run.job.state["model"].state_dict())
    main = threading.main_thread().ident
    assert main is not None

    def press() -> None:
        assert run.store.reached.wait(SHORT_S)
        signal.pthread_kill(main, signal.SIGINT)

    presser = threading.Thread(target=press)
    with pytest.raises(KeyboardInterrupt), run.ckpt:
        run.save()
        model(inputs(run.done + 1, 2, 1100).to(late)).square().mean().backward()
        presser.start()
        run.job.state["optim"].step()
        pytest.fail("the step did not wait")  # pragma: no cover
    presser.join(SHORT_S)
    compare(before, host(model.state_dict()))
    run.store.open.set()
    assert run.ckpt._queue.wait_idle(SHORT_S)
    assert run.committed() == [1]
    assert run.ckpt.stats.snapshot_bytes == 0
    other = wide(late)
    with Checkpointer(run.store, other.state, every=None, spot=None, options=UNVERIFIED) as ckpt:
        assert ckpt.restore() == 1
        other.step(2)
        compare(before, host(other.state["model"].state_dict()))
        ckpt.save_now(2).wait(SHORT_S)
    assert run.committed() == [1, 2]


PACKAGE = str(Path(fastckpt.__file__).parent)


class InterruptAtLine:
    """KeyboardInterrupt in this thread, before the nth line of fastckpt's that it runs: wherever a signal can be noticed, and more.

    Not where a `with` ends: an interrupt at the beginning of an `__exit__` in Python leaves a lock locked, or gradients off, and nobody who
    uses either can help it (bpo-29988); nor at a `try`, where nothing can be raised.
    """

    def __init__(self, nth: int) -> None:
        self.nth, self.lines = nth, 0
        self.where = ""

    def __enter__(self) -> InterruptAtLine:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            source = linecache.getline(path, frame.f_lineno).lstrip()
            if self.lines >= self.nth > 0 and not self.where and not source.startswith(("with ", "try:")):
                self.where = f"{Path(path).name}:{frame.f_lineno} {frame.f_code.co_name}"
                signal.raise_signal(signal.SIGINT)  # as a user does: there are places that put it off
        return self._trace


def interrupted_everywhere(late: torch.device, seed: int, n: int, call: Callable[[Run], None]) -> None:
    draw = random.Random(seed)
    print(f"seed {seed}")
    run = Run(late)
    for _ in range(2):
        run.train_and_save().wait(SHORT_S)
    run.step()
    with InterruptAtLine(0) as counted:
        call(run)
    run.ckpt.wait(SHORT_S)
    may_exist = [run.done]
    for _ in range(n):
        run.step()
        with InterruptAtLine(draw.randint(1, counted.lines)) as at, contextlib.suppress(KeyboardInterrupt):
            call(run)
        may_exist.append(run.done)
        run.step()
        with contextlib.suppress(SaveError):  # of a save that was given up
            run.ckpt.wait(SHORT_S)
        assert run.ckpt.stats.snapshot_bytes == 0, f"slabs were lost: interrupted at {at.where}"
        assert not reports(), f"interrupted at {at.where}"
    run.check(1, 2, apart_from=tuple(may_exist))


def test_an_interrupt_anywhere_in_save_now(late: torch.device) -> None:
    def call(run: Run) -> None:
        run.ckpt.save_now(run.done)

    interrupted_everywhere(late, random.randrange(1 << 30), 40, call)


def test_an_interrupt_anywhere_in_step(late: torch.device) -> None:
    def call(run: Run) -> None:
        run.ckpt._due = "interval"
        run.ckpt.step(run.done)

    interrupted_everywhere(late, random.randrange(1 << 30), 40, call)


def test_an_interrupt_anywhere_in_the_fence(late: torch.device) -> None:
    def call(run: Run) -> None:
        run.save()
        run.ckpt.fence()

    interrupted_everywhere(late, random.randrange(1 << 30), 40, call)


# -- what counts as a write ---------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """The names of this thread's operations since copies may run."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = False
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.begun:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [UNVERIFIED, VERIFIED], ids=["unverified", "verified"])
def test_views_of_storages_are_made_before_copies_may_run(
    late: torch.device, monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    """`set_` counts as a write to the storage: CUDA's sanitizer reports it against the side stream's reads."""

    def make(where: torch.device) -> Job:
        job = small(where)
        part = torch.zeros(600, 600, device=where)[:300]  # a view that is not the whole of its storage
        model = job.state["model"]
        model.register_buffer("part", part)
        model.register_buffer("numbers", torch.zeros(300_000, dtype=torch.complex64, device=where))
        return job

    run = Run(late, make, options=options)
    operations, begin = Operations(), SideStream.begin

    def begun(self: SideStream) -> None:
        begin(self)
        operations.begun = True

    monkeypatch.setattr(SideStream, "begin", begun)
    for _ in range(3):
        run.step()
        operations.begun = False
        with operations:
            run.save()
        run.ckpt.wait(SHORT_S)
    assert any("copy_" in name for name in operations.names)
    assert not [name for name in operations.names if "set_" in name]
    run.check(1, 2, 3)


# -- restore and load_state_dict while a save is under way -------------------------------------------------------------


def test_restore_fences_a_save_that_is_under_way(late: torch.device) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    one = host(run.job.state["model"].state_dict())
    run.train_and_save()
    assert run.ckpt.restore(step=1) == 1, "the older one, although that of step 2 is newer by now"
    compare(one, host(run.job.state["model"].state_dict()))
    assert run.ckpt.restore(step=2) == 2
    run.check(1, 2)


def test_a_state_that_is_loaded_over_a_save_under_way_is_refused(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, raw = threading.Event(), engine.Snapshot.raw

    def after_that(self: engine.Snapshot, *arguments: Any) -> Any:
        assert loaded.wait(SHORT_S)
        return raw(self, *arguments)

    run = Run(gpu)
    run.train_and_save().wait(SHORT_S)
    run.step()
    monkeypatch.setattr(engine.Snapshot, "raw", after_that)  # or it might be committed by then
    run.save()
    model = run.job.state["model"]
    values = {name: value.to(gpu) for name, value in host(model.state_dict()).items()}
    model.load_state_dict(values)  # what it has: training does not see it
    loaded.set()
    with pytest.raises(TornSnapshotError, match=r"changed while it was copied.*Nothing was committed.*ckpt\.fence\(\)"):
        run.ckpt.wait(SHORT_S)
    assert run.committed() == [1]
    assert reports(), "nobody has asked for the fence: the writes are not ordered after the copies"
    run.check(1)


def test_a_state_that_is_loaded_after_the_fence_is_no_harm(gpu: torch.device) -> None:
    run = Run(gpu)
    run.train_and_save().wait(SHORT_S)
    run.train_and_save()
    run.ckpt.fence()
    model = run.job.state["model"]
    model.load_state_dict({name: value.to(gpu) for name, value in host(model.state_dict()).items()})
    run.check(1, 2)


def test_an_optimizers_state_that_is_loaded_meanwhile_takes_new_tensors(late: torch.device) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    run.train_and_save()
    optim = run.job.state["optim"]
    optim.load_state_dict(optim.state_dict())
    run.check(1, 2)


# -- storages freed or resized while a save is under way ---------------------------------------------------------------


def replaced(tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """By other values, until the snapshot is over: what the result is to be called for."""
    kept = [(tensor, tensor.data) for tensor in tensors]
    for tensor, data in kept:
        tensor.data = torch.full_like(data, 7.0)

    def back() -> None:
        for tensor, data in kept:
            tensor.data = data

    return back


def replace_parameters(run: Run) -> Callable[[], None]:
    return replaced(run.job.state["model"].parameters())


def moments(run: Run) -> list[torch.Tensor]:
    """Unlike parameters, those very tensors are what a snapshot holds."""
    return [
        value
        for state in run.job.state["optim"].state.values()
        for value in state.values()
        if value.device == run.where
    ]


def replace_moments(run: Run) -> Callable[[], None]:
    """In the bundles that a ring copies last, too."""
    return replaced(moments(run))


def free_storages(run: Run) -> Callable[[], None]:
    """As FSDP does with what it has gathered; they come back with the same values."""
    kept = [(tensor, tensor.data.clone(), tensor.untyped_storage().nbytes()) for tensor in moments(run)]
    for tensor, _, _ in kept:
        tensor.untyped_storage().resize_(0)

    def back() -> None:
        for tensor, values, n_bytes in kept:
            tensor.untyped_storage().resize_(n_bytes)
            tensor.data.copy_(values)

    return back


def grow_storages(run: Run) -> Callable[[], None]:
    """They move."""
    kept = [(tensor.untyped_storage(), tensor.untyped_storage().nbytes()) for tensor in moments(run)]
    for storage, n_bytes in kept:
        storage.resize_(2 * n_bytes)

    def back() -> None:
        for storage, n_bytes in kept:
            storage.resize_(n_bytes)

    return back


def delete(run: Run) -> Callable[[], None]:
    """Nobody but the snapshot has the moments any more."""
    optim = run.job.state["optim"]
    kept = [(p, {name: host(value) for name, value in state.items()}) for p, state in optim.state.items()]
    optim.state.clear()

    def back() -> None:
        for parameter, values in kept:
            optim.state[parameter] = {
                name: value.to(run.where) if value.dim() else value for name, value in values.items()
            }

    return back


CHANGES: list[Callable[[Run], Callable[[], None]]] = [
    replace_parameters,
    replace_moments,
    free_storages,
    grow_storages,
    delete,
]


@pytest.mark.parametrize("options", [UNVERIFIED, RING], ids=["whole", "ring"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_storages_that_are_freed_or_resized_before_the_fence(
    late: torch.device, change: Callable[[Run], Callable[[], None]], options: Options
) -> None:
    """What has been copied by then is whole; if anything has not, the save is whole or refused."""
    run = Run(late, wide if options is RING else small, options=options)
    run.train_and_save().wait(SHORT_S)
    run.step()
    run.store.open.clear()
    run.store.reached.clear()
    handle = run.save()
    assert run.store.reached.wait(SHORT_S)
    back = change(run)
    run.store.open.set()
    try:
        handle.wait(SHORT_S)
    except SaveError as error:
        print(f"refused: {error}")
        with pytest.raises(SaveError):
            run.ckpt.wait(SHORT_S)
        assert options is RING, "all copies had been given out"
        assert run.committed() == [1]
    back()
    run.check(1, 2, apart_from=(2,))
