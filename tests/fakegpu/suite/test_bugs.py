"""Each way to get it wrong is reported or refused, in every schedule. If one of these fails, the detector is blind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt.errors import TornSnapshotError
from fastckpt.options import Options
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.snapshot import FencedTensors, FenceHooks, device_copies
from fastckpt.snapshot import snapshot as engine
from fastckpt.snapshot.copier import Copier
from fastckpt.snapshot.host_copies import HostCopies
from fastckpt.snapshot.pool import Slab, SlabPool
from fastckpt.snapshot.progress import Copy
from fastckpt.snapshot.side_stream import SideStream, bytes_of
from tests.fakegpu import device
from tests.fakegpu.suite.models import Job, batch_norm_cnn, closure, inputs, mlp, moving_average
from tests.fakegpu.suite.schedules import Schedule
from tests.fakegpu.suite.tools import reports, train
from tests.support.training import SHORT_S

# What verification would refuse first is to be seen by the detector.
UNVERIFIED = Options(threads=2, connections=2, host_budget_bytes=256 << 20, verify_snapshot="off")


def run(job: Job, options: Options = UNVERIFIED, steps: int = 4) -> list[str]:
    train(job.state, job.step, steps=steps, compare=False, options=options)
    return reports()


def test_without_a_bug_nothing_is_reported(gpu: torch.device) -> None:
    for make in (mlp, batch_norm_cnn, moving_average):
        assert not run(make(gpu))


def test_no_fence(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideStream, "hold_back", lambda self, event: None)
    assert any("copy to host" in text for text in run(mlp(gpu)))


def test_no_wait_for_the_compute_stream(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideStream, "begin", lambda self: None)
    assert any("RACE: read" in text for text in run(mlp(gpu)))


def test_the_host_reads_too_early(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copies, "wait_for", lambda event: None)
    assert any("HOST ACCESS" in text for text in run(mlp(gpu)))


def test_a_slab_is_used_again_too_early(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, Slab] = {}
    original = SlabPool.take

    def take(self: SlabPool, n_bytes: int, for_device: bool, **how: bool) -> Slab | None:
        if n_bytes not in kept:
            slab = original(self, n_bytes, for_device, **how)
            assert slab is not None
            kept[n_bytes] = slab
        return kept[n_bytes]

    monkeypatch.setattr(SlabPool, "take", take)
    monkeypatch.setattr(SlabPool, "give_back", lambda self, slabs: None)
    job = mlp(gpu)
    # A save whose upload is slow has its slabs while the next one is staged.
    store_waits(monkeypatch)
    assert any("HOST ACCESS" in text or "pinned memory" in text for text in run(job))


def store_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder begins with a save when the next one has been staged."""
    two = threading.Semaphore(0)
    begun: list[int] = []
    first_raw, start = engine.Snapshot.raw, Copier.start

    def counted(self: Copier, *arguments: Any) -> bool:
        looked = start(self, *arguments)
        begun.append(1)
        if len(begun) > 1:
            two.release()
        return looked

    def raw(self: engine.Snapshot, number: int, scratch: Any) -> Any:
        if number == 0:
            two.acquire(timeout=1)
        return first_raw(self, number, scratch)

    monkeypatch.setattr(Copier, "start", counted)
    monkeypatch.setattr(engine.Snapshot, "raw", raw)


def test_the_event_is_recorded_on_another_stream(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def mark(self: SideStream) -> torch.Event:
        event = torch.Event(device=self.device)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    monkeypatch.setattr(SideStream, "mark", mark)
    assert run(mlp(gpu))


def test_a_temporary_is_not_recorded_on_the_stream(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(self: SideStream, target: torch.Tensor, pieces: Sequence[torch.Tensor], *, pinned: bool) -> None:
        with self.stream:
            target.copy_(self._join(pieces) if len(pieces) > 1 else bytes_of(pieces[0]), non_blocking=pinned)

    monkeypatch.setattr(SideStream, "copy", copy)
    # Their fingerprints would record them.
    without = replace(UNVERIFIED, deltas=False)
    assert any("allocation" in text or "RACE: write" in text for text in run(batch_norm_cnn(gpu), without))


@pytest.mark.parametrize("make", [batch_norm_cnn, moving_average])
def test_what_forward_changes_is_not_copied_first(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, make: Callable[[torch.device], Job]
) -> None:
    job = make(gpu)

    def all_fenced(optimizers: Any) -> FencedTensors:
        found = FencedTensors(optimizers)
        modules = [one for one in job.state.values() if isinstance(one, torch.nn.Module)]
        found.addresses |= {t.untyped_storage().data_ptr() for m in modules for t in m.state_dict().values()}
        return found

    monkeypatch.setattr("fastckpt.training.fence.FencedTensors", all_fenced)
    assert any("RACE: write" in text for text in run(job))


def test_the_hook_returns_before_the_last_copy_is_given_out(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copier, "is_settled", True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(5)]).to(gpu)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> None:
        model(torch.randn(2, 1100).to(gpu)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    ring = Options(threads=2, connections=1, host_budget_bytes=24 << 20, verify_snapshot="off")
    # Copies that come after the fence read what the step has written, or will: refused by the versions, or reported.
    try:
        assert run(Job({"model": model, "optim": optim}, step), ring)
    except TornSnapshotError:
        reports()


def test_a_wait_for_an_event_that_is_not_recorded_yet(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def hold_back(self: SideStream, event: torch.Event) -> None:
        torch.accelerator.current_stream(self.device).wait_event(torch.Event(device=self.device))

    monkeypatch.setattr(SideStream, "hold_back", hold_back)
    assert any("never recorded" in text for text in run(mlp(gpu)))


def replayed(gpu: torch.device) -> Job:
    """A job whose whole step is captured once and then replayed: its optimizer calls no hook any more."""
    job = mlp(gpu, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9))
    model, optim = job.state["model"], job.state["optim"]
    stream, x = torch.accelerator.current_stream(gpu), torch.empty(16, 32, device=gpu)

    def eager_step() -> None:
        model(x).square().mean().backward()
        optim.step()
        optim.zero_grad(set_to_none=False)

    def step(number: int) -> None:
        x.copy_(inputs(number, 16, 32))
        if number <= 2:
            eager_step()
            return
        if number == 3:
            with device.capture(stream):
                eager_step()
        device.replay(stream)

    return Job(job.state, step)


def test_a_replayed_graph_calls_no_hook_and_is_fenced_at_once(gpu: torch.device) -> None:
    job = replayed(gpu)
    saved = train(job.state, job.step, steps=6)
    saved.check()
    assert not reports()
    assert not run(replayed(gpu), steps=6)


def test_a_graph_whose_hooks_are_trusted(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FenceHooks, "can_be_trusted", True)
    assert any("replayed" in text for text in run(replayed(gpu), steps=6))


def test_a_captured_step_that_waits_for_an_event_outside(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastckpt.snapshot.side_stream.is_capturing", lambda device: False)
    assert any("CAPTURE" in text for text in run(replayed(gpu), steps=4))


def meddling(job: Job, write: Callable[[], None]) -> Callable[[int], None]:
    """Writes between the save and the fence, from the second save on."""

    def step(number: int) -> None:
        if number > 2:
            write()
        job.step(number)

    return step


def test_a_write_through_data_is_reported(gpu: torch.device) -> None:
    job = mlp(gpu)
    weight = job.state["model"][2].weight
    assert any("RACE: write" in text for text in run(Job(job.state, meddling(job, lambda: weight.data.add_(1)))))


# The copy comes at once, or not before somebody waits for it. Under the other schedules a device with nothing else to do goes on to the
# copy: whether the write has come by then depends on how fast the host is.
SPOILT = {"eager": False, "lazy": True}


def test_a_write_through_data_is_refused_if_it_spoils_the_copy(
    gpu: torch.device, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it comes after the copy, the snapshot is whole and is committed."""
    wrote, raw = threading.Event(), engine.Snapshot.raw

    def not_before_the_write(self: engine.Snapshot, *arguments: Any) -> Any:
        # An encoder that asks for a chunk has the device copy it now, whatever the schedule would have done.
        assert self._progress.step != 2 or wrote.wait(SHORT_S)
        return raw(self, *arguments)

    monkeypatch.setattr(engine.Snapshot, "raw", not_before_the_write)
    schedule: Schedule = request.node.callspec.params["gpu"]
    job = mlp(gpu)
    weight = job.state["model"][2].weight
    verified = Options(threads=2, connections=2, host_budget_bytes=256 << 20, verify_snapshot="always")
    states: dict[int, Any] = {}

    def step(number: int) -> None:
        if number > 2:
            weight.data.add_(1)
            wrote.set()
        job.step(number)

    saved = None
    with contextlib.suppress(TornSnapshotError):
        saved = train(job.state, step, steps=2, options=verified, compare=False)
    reports()
    assert (saved is None) == SPOILT.get(schedule.name, saved is None)
    if saved is None:
        return
    other = mlp(gpu)
    for number in range(1, 3):
        other.step(number)
        states[number] = {name: dict(one.state_dict()) for name, one in other.state.items()}
    saved.states = {2: states[2]}
    saved.check()


def test_a_write_that_torch_counts_is_refused_once_and_later_saves_are_copied_first(
    gpu: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    job = mlp(gpu)
    weight = job.state["model"][2].weight

    def write() -> None:
        with torch.no_grad():
            weight.add_(1)

    saved = train(job.state, meddling(job, write), steps=5, options=UNVERIFIED)
    reports()
    assert sum("changed while it was copied" in record.message for record in caplog.records) == 1
    assert sorted(found.step for found in Catalog(Repository(saved.store)).history()) == [1, 3, 4, 5]
    saved.states.pop(2)
    saved.check()


def test_an_optimizer_that_writes_host_memory_by_pointers_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    device.configure("eager")
    job = mlp(torch.device("cpu"))
    weight = job.state["model"][2].weight
    view = weight.detach().numpy()
    raw = np.frombuffer(view.data, np.float32)
    verified = Options(threads=1, connections=1, host_budget_bytes=256 << 20, verify_snapshot="always")
    original = HostCopies.make

    def after_the_write(self: HostCopies, copy: Copy) -> None:
        raw.flags.writeable = True
        raw[0] += 1
        original(self, copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopies, "make", after_the_write)
        saved = train(job.state, job.step, steps=4, options=verified)
    committed = sorted(found.step for found in Catalog(Repository(saved.store)).history())
    assert committed == [1, 3, 4], "nothing of the first was left to a hook"
    assert "not those of the call of save" in caplog.text


def stall_us(gpu: torch.device, job: Job) -> float:
    compute = torch.accelerator.current_stream(gpu)
    device.cost(copy_gb_s=5, memory_gb_s=1e6, launch_us=200)
    torch.accelerator.synchronize()
    before = device.stall_us(compute)
    train(job.state, job.step, steps=6, compare=False, options=UNVERIFIED)
    torch.accelerator.synchronize()
    reports()
    return device.stall_us(compute) - before


def test_a_fence_before_the_closure_has_run_costs_the_whole_copy(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = stall_us(gpu, closure(gpu))

    def early(closure: Callable[..., Any], fence: Callable[[], None]) -> Callable[..., Any]:
        fence()
        return closure

    monkeypatch.setattr("fastckpt.snapshot.hooks.fence_after", early)
    assert stall_us(gpu, closure(gpu)) > 2 * ours + 100
