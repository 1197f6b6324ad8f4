"""Weights that are swapped while a save copies them: nothing is acknowledged that was not made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastckpt import Checkpointer, Every, Options
from fastckpt.errors import TornSnapshotError
from fastckpt.snapshot import Sampler, host_copies
from fastckpt.snapshot.host_copies import HostCopies
from fastckpt.snapshot.progress import Copy
from fastckpt.snapshot.tearing import TearWatch
from fastckpt.state import Captured, Recapturer, chunking
from fastckpt.state.chunks import cuts_of
from fastckpt.store.memory import MemoryStore
from fastckpt.training.decisions import OwnDecisions
from tests.support.swaps import MIB, OPTIONS, SHORT_S, Job, committed, open_on

RING = Options(threads=1, connections=1, compress=False, host_budget_bytes=24 * MIB, max_stall_s=SHORT_S)


def check(store: MemoryStore, states: dict[int, dict[str, torch.Tensor]]) -> None:
    """Every checkpoint holds the state of its step."""
    for step in committed(store):
        job = Job()
        with open_on(store, job.state) as ckpt:
            assert ckpt.restore(step) == step
        for name, value in job.model.state_dict().items():
            assert torch.equal(value, states[step][name]), f"step {step}, {name}"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Copies of other threads than the training's begin when the event is set."""
    go, read = threading.Event(), Captured.read

    def waiting(self: Captured, pieces: Any, out: Any) -> None:
        if threading.current_thread().name.startswith("fastckpt-stage"):
            assert go.wait(SHORT_S)
        read(self, pieces, out)

    monkeypatch.setattr(Captured, "read", waiting)
    yield go
    go.set()


def seen_torn(ckpt: Checkpointer, copies: int = 1) -> None:
    """Wait until the newest snapshot has found a copy that is not what it should be, and so many have to be made once more."""
    snapshot = ckpt._engine.fence._snapshot
    assert snapshot is not None
    changed = snapshot._progress.changed
    with changed:
        torn = snapshot._copier.host._torn
        assert changed.wait_for(lambda: snapshot.torn_name is not None and len(torn) >= copies, SHORT_S)


@pytest.mark.parametrize("options", [OPTIONS, RING], ids=["whole", "ring"])
@pytest.mark.parametrize("call", ["step", "save_now"])
def test_a_swap_after_every_save_that_is_undone_loses_no_step(
    slow: threading.Event, caplog: pytest.LogCaptureFixture, call: str, options: Options
) -> None:
    store, job, states = MemoryStore(), Job(), {}
    handles = []
    with open_on(store, job.state, every=Every(steps=1) if call == "step" else None, options=options) as ckpt:
        for step in range(1, 6):
            states[step] = job.step()  # the fence of the save before comes before the update
            ckpt.wait()
            if call == "save_now":
                handles.append(ckpt.save_now(step))
            ckpt.step(step)
            job.swap()
            slow.set()
            if step == 1:
                seen_torn(ckpt)
            job.swap_back()
        ckpt.wait()
        assert all(handle.wait(SHORT_S).save.step == handle.step for handle in handles)
    told = [record.message for record in caplog.records]
    assert committed(store) == [1, 2, 3, 4, 5]
    check(store, states)
    assert len(told) == 1, told
    assert "put back" in told[0]
    assert "ckpt.fence()" in told[0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_swap_that_a_copy_meets_at_its_edge_is_seen(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that runs beside the copy may spoil some bytes that no sample has. It is still at work before the copy, or after it."""
    store, job = MemoryStore(), Job()
    make, read = HostCopies.make, Captured.read
    met: list[int] = []

    def making(self: HostCopies, copy: Copy) -> None:
        first = threading.current_thread().name.startswith("fastckpt-stage") and not met
        met.extend([copy.number] if first else [])
        if first and when == "before":
            job.swap()
        make(self, copy)
        if first and when == "before":
            assert read_by == [], "what is known to be torn is not copied"

    def reading(self: Captured, pieces: Any, out: Any) -> None:
        read(self, pieces, out)
        if threading.current_thread().name.startswith("fastckpt-stage"):
            read_by.append(pieces)
            if when == "after" and len(read_by) == 1:
                job.swap()

    read_by: list[Any] = []

    monkeypatch.setattr(HostCopies, "make", making)
    monkeypatch.setattr(Captured, "read", reading)
    with open_on(store, job.state) as ckpt:
        states = {1: job.step()}
        handle = ckpt.save_now(1)
        seen_torn(ckpt)
        snapshot = ckpt._engine.fence._snapshot
        assert snapshot is not None
        assert met[0] in {copy.number for copy in snapshot._copier.host._torn}
        job.swap_back()
        assert handle.wait(SHORT_S).save.step == 1
    check(store, states)


def test_what_is_copied_while_a_torn_copy_waits_is_copied_once_more(
    slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something may be writing, and spoil bytes that no sample has."""
    store, job = MemoryStore(), Job()
    is_torn = TearWatch.is_torn
    seen: list[Copy] = []

    def misses_the_second(self: TearWatch, copy: Copy, content: Any) -> bool:
        if threading.current_thread().name.startswith("fastckpt-stage"):
            seen.append(copy)
            if len(seen) == 2:
                content[:] = 7
                return False
        return is_torn(self, copy, content)

    monkeypatch.setattr(TearWatch, "is_torn", misses_the_second)
    monkeypatch.setattr(TearWatch, "is_changed", lambda self, copy: False)
    with open_on(store, job.state) as ckpt:
        states = {1: job.step()}
        handle = ckpt.save_now(1)
        job.swap()
        slow.set()
        seen_torn(ckpt, copies=2)
        job.swap_back()
        assert handle.wait(SHORT_S).save.step == 1
    check(store, states)


def test_a_swap_that_stays_loses_that_step_and_the_next_one_is_saved_at_once(
    slow: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    store, job, states = MemoryStore(), Job(), {}
    with open_on(store, job.state, every=Every(steps=100)) as ckpt:
        states[1] = job.step()
        handle = ckpt.save_now(1)
        ckpt.step(1)
        job.swap()
        slow.set()
        seen_torn(ckpt)
        states[2] = job.step()
        with pytest.raises(TornSnapshotError, match=r"not those of the call of save.*ckpt\.fence\(\)"):
            handle.wait(SHORT_S)
        assert ckpt.step(1) is False, "what is there now is not the state of step 1"
        assert ckpt._engine.queue.wait_idle(SHORT_S)
        assert committed(store) == []
        ckpt.step(2)  # not due, and not raised
        job.swap()
        ckpt.wait()
        states[3] = job.step()
        ckpt.step(3)
        ckpt.wait()
        assert committed(store) == [2], "one for one"
        for step in (4, 5):
            states[step] = job.step()
            ckpt.save_now(step)
            job.swap()
    assert committed(store) == [2, 4, 5]
    (told,) = [record.message for record in caplog.records]
    assert "step 1 was not saved" in told
    check(store, states)


@pytest.mark.parametrize("how", ["handle", "future", "wait", "close"])
def test_who_waits_in_the_training_thread_is_told_at_once(slow: threading.Event, how: str) -> None:
    """Nobody would come to the fence meanwhile."""
    store, job = MemoryStore(), Job()
    ckpt = open_on(store, job.state)
    job.step()
    handle = ckpt.save_now(1)
    job.swap()
    slow.set()
    seen_torn(ckpt)
    calls: dict[str, Callable[[], object]] = {
        "handle": lambda: handle.wait(SHORT_S),
        "future": lambda: handle.durable.result(SHORT_S),
        "wait": lambda: ckpt.wait(SHORT_S),
        "close": ckpt.close,
    }
    with pytest.raises(TornSnapshotError):
        calls[how]()
    if how in ("handle", "future"):
        with pytest.raises(TornSnapshotError):  # no newer step makes up for it
            ckpt.close()
    ckpt.close()
    assert committed(store) == []


def test_who_waits_after_the_swap_was_undone_has_the_step(slow: threading.Event) -> None:
    store, job = MemoryStore(), Job()
    with open_on(store, job.state) as ckpt:
        states = {1: job.step()}
        handle = ckpt.save_now(1)
        job.swap()
        slow.set()
        seen_torn(ckpt)
        job.swap_back()
        assert handle.wait(SHORT_S).save.step == 1
    check(store, states)


def test_a_save_whose_training_never_comes_back_ends(slow: threading.Event) -> None:
    """The future is waited for by other means than its own, and there is no fence."""
    store, job = MemoryStore(), Job()
    options = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 * MIB, max_stall_s=0.2)
    ckpt = open_on(store, job.state, options=options)
    job.step()
    ended = threading.Event()
    ckpt.save_now(1).durable.add_done_callback(lambda _: ended.set())
    job.swap()
    slow.set()
    assert ended.wait(SHORT_S)
    with pytest.raises(TornSnapshotError):
        ckpt.close()


def test_a_training_that_goes_back_saves_the_steps_after_it() -> None:
    """What was torn belongs to the branch that was left."""
    store, job = MemoryStore(), Job(2)
    with open_on(store, job.state) as ckpt:
        job.step()
        ckpt.save_now(1).wait(SHORT_S)
        ckpt.step(1)
        job.step()
        ckpt.save_now(9)
        with torch.no_grad():
            job.model[0].bias.add_(1)
        ckpt.fence()
        assert ckpt.restore(step=1) == 1
        job.step()
        decisions = ckpt._decisions
        assert isinstance(decisions, OwnDecisions)
        decisions._due.trigger = "interval"
        ckpt.step(2)
        ckpt.wait()
    assert committed(store) == [1, 2]


@pytest.mark.parametrize("verify", ["first", "always"])
def test_every_byte_is_compared_if_asked_for(slow: threading.Event, verify: str) -> None:
    store, job = MemoryStore(), Job()
    options = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 * MIB, verify_snapshot=verify)
    with open_on(store, job.state, options=options) as ckpt:
        job.step()
        handle = ckpt.save_now(1)
        job.model[3].weight.data[317, 41] += 1
        slow.set()
        with pytest.raises(TornSnapshotError, match=r"model\.3\.weight"):
            handle.wait(SHORT_S)
        ckpt.save_now(2).wait(SHORT_S)
    assert committed(store) == [2]


# -- the first save ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("undone", [True, False])
def test_a_swap_after_every_save_from_the_first_on_loses_no_step(
    undone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store, job, states = MemoryStore(), Job(), {}
    with open_on(store, job.state, proven=False, every=Every(steps=1)) as ckpt:
        for step in range(1, 6):
            states[step] = job.step()
            ckpt._engine.queue.wait_idle(SHORT_S)
            ckpt.step(step)
            job.swap()
            if undone:
                job.swap_back()
    told = [record.message for record in caplog.records]
    assert committed(store) == [1, 2, 3, 4, 5]
    check(store, states)
    assert len(told) <= 1 if undone else len(told) == 1, told


def test_the_first_save_is_copied_at_once_and_a_quiet_interval_proves_the_loop(slow: threading.Event) -> None:
    store, job = MemoryStore(), Job()
    with open_on(store, job.state, proven=False) as ckpt:
        slow.set()
        states = {1: job.step()}
        handle = ckpt.save_now(1)
        assert ckpt._engine.fence._snapshot is not None
        assert ckpt._engine.fence._snapshot._progress.fenced
        job.model(torch.ones(1, 600)).sum().backward()
        states[2] = job.step()
        handle.wait(SHORT_S)
        slow.clear()
        handle = ckpt.save_now(2)  # its copies do not even begin before it returns
        assert not ckpt._engine.fence._snapshot._progress.fenced
        slow.set()
        job.step()
        handle.wait(SHORT_S)
    check(store, states)


WRITES: dict[str, Callable[[Job], object]] = {
    "data": lambda job: job.swap(),
    "counted": lambda job: torch.nn.init.zeros_(job.model[0].bias),  # type: ignore[arg-type]
    "replaced": lambda job: setattr(job.model[0].weight, "data", torch.zeros(600, 600)),
    "resized": lambda job: job.model[3].weight.untyped_storage().resize_(4 * 600 * 600 + 64),
    "moments": lambda job: job.optimizer.state[job.model[0].weight]["momentum_buffer"].data.zero_(),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_in_the_first_interval_harms_nothing_and_ends_all_trust(
    write: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, job = MemoryStore(), Job()
    with open_on(store, job.state, proven=False) as ckpt:
        states = {1: job.step()}
        ckpt.save_now(1)
        WRITES[write](job)
        states[2] = job.step()
        trusted = ckpt._engine.fence.hooks.can_be_trusted
        ckpt.save_now(2)
        if not trusted:  # else this write tears what is still being copied, as it may
            job.swap()
    assert committed(store) == [1, 2]
    told = [record.message for record in caplog.records]
    check(store, states)
    if write == "replaced":
        assert not told, "the storage that was saved is as it was"
        return
    assert not trusted
    (words,) = told
    assert "after the last save" in words


def test_a_fence_before_the_write_is_all_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    store, job, states = MemoryStore(), Job(), {}
    with open_on(store, job.state, proven=False) as ckpt:
        for step in range(1, 4):
            states[step] = job.step()
            ckpt.save_now(step)
            ckpt.fence()
            job.swap()
        assert ckpt._engine.fence._proven
    assert not caplog.records
    check(store, states)


# -- what is sampled ---------------------------------------------------------------------------------------------------


def sampled(tensors: dict[str, Any], seed: int | None = None) -> dict[int, bytes]:
    captured = Recapturer().capture(tensors)
    return Sampler(("rng",)).take(captured, cuts_of(captured), seed).digests


def test_small_tensors_are_looked_at_whole_wherever_they_lie() -> None:
    flat = torch.arange(3.0 * MIB)
    views = {"small": flat[1000:1100], "column": flat[70_000:71_000:10], "end": flat[-3:], "large": flat[2 * MIB :]}
    alone = torch.zeros(16_000)
    state: dict[str, Any] = {"views": views, "alone": alone, "rng": {"words": torch.zeros(600)}}
    before = sampled(state, 1)
    assert sampled(state, 1) == before
    for one in (views["small"][50:51], views["column"][3:4], views["end"][2:], alone[15_999:]):
        one.add_(1)
        assert sampled(state, 1) != before
        one.sub_(1)
    assert sampled(state, 1) == before
    state["rng"]["words"].fill_(1)
    assert sampled(state, 1) == before, "left out"
    assert sampled(state) != sampled(state), "every save chooses anew"


def test_any_swap_of_a_large_tensor_is_seen() -> None:
    for n in (16_384, MIB + 5, 3 * MIB):
        for value in (0.0, 1.0):
            tensor = torch.full((n,), value)
            before = sampled({"t": tensor}, 1)
            tensor.mul_(-1)
            assert sampled({"t": tensor}, 1) != before
            tensor.mul_(-1)
            assert sampled({"t": tensor}, 1) == before


def test_views_without_number_are_looked_at_once() -> None:
    flat = torch.zeros(64 * 1024)
    captured = Recapturer().capture({str(n): flat[n : n + 5000] for n in range(200)})
    sampler = Sampler()
    cuts = cuts_of(captured)
    sampler.take(captured, cuts)
    stretches = sampler._plan.of(0)
    assert stretches is not None
    assert int(stretches.lengths[1:].sum()) == 4 * (200 + 4999)
    assert stretches.n_bytes < chunking.BUNDLE_BYTES


def test_large_chunks_are_copied_by_threads() -> None:
    """What the tests above rely on."""
    assert host_copies._INLINE_BYTES < 600 * 600 * 4
