"""The device itself: memory that traps, streams, events, modelled time, failures."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
import torch

from tests.fakegpu import device
from tests.fakegpu.suite.tools import reports

N = 1 << 14


@pytest.fixture
def lazy() -> torch.device:
    device.configure("lazy")
    device.cost()
    device.clear()
    return torch.device("fakegpu:0")


def compute(where: torch.device) -> torch.Stream:
    return torch.accelerator.current_stream(where)


def pinned(n: int = N) -> torch.Tensor:
    return torch.empty(n, pin_memory=True)


def test_the_host_cannot_read_device_memory(lazy: torch.device) -> None:
    x = torch.ones(N, device=lazy)
    ctypes.string_at(x.data_ptr(), 4)
    assert any("dereferenced device memory" in text for text in reports())


def test_the_host_cannot_read_a_pinned_buffer_before_it_has_synchronised(lazy: torch.device) -> None:
    x, p = torch.ones(N, device=lazy), pinned()
    p.copy_(x, non_blocking=True)
    assert p.sum().item() != N, "the copy has not run"
    assert any("has not synchronised" in text for text in reports())
    p.copy_(x, non_blocking=True)
    torch.accelerator.synchronize()
    assert p.sum().item() == N
    assert not reports()


def test_nor_can_the_kernel_on_its_behalf(lazy: torch.device, tmp_path: Path) -> None:
    x, p = torch.ones(N, device=lazy), pinned()
    p.copy_(x, non_blocking=True)
    with (tmp_path / "x").open("wb", buffering=0) as file, pytest.raises(OSError, match="Bad address"):
        file.write(memoryview(p.numpy()))
    torch.accelerator.synchronize()


def test_a_copy_that_has_run_is_still_the_devices_until_the_host_has_asked() -> None:
    device.configure("eager")
    device.clear()
    x, p = torch.ones(N, device="fakegpu:0"), pinned()
    p.copy_(x, non_blocking=True)
    assert p.sum().item() == N, "the bytes are there, but nothing has said so"
    assert any("has not synchronised" in text for text in reports())


def test_a_wait_for_an_event_that_was_never_recorded_is_reported(lazy: torch.device) -> None:
    event = torch.Event(device=lazy)
    compute(lazy).wait_event(event)
    event.synchronize()
    assert event.query()
    assert len(reports()) == 3
    event.record(compute(lazy))
    torch.Stream(device=lazy).wait_event(event)
    assert not reports()


def test_races_are_reported_whatever_ran_first(lazy: torch.device) -> None:
    for schedule in ("eager", "lazy", "copy_late", "compute_late"):
        device.configure(schedule)
        x, side, p = torch.ones(N, device=lazy), torch.Stream(device=lazy), pinned()
        side.wait_stream(compute(lazy))
        with side:
            p.copy_(x, non_blocking=True)
        x.add_(1)
        (text,) = reports()
        assert "write by 'add'" in text
        assert "read by 'copy to host'" in text


def test_disjoint_rows_and_columns_do_not_race(lazy: torch.device) -> None:
    x, side = torch.zeros(64, 64, device=lazy), torch.Stream(device=lazy)
    side.wait_stream(compute(lazy))
    x[:32].add_(1)
    with side:
        x[32:].add_(1)
    assert not reports()
    x[:, :32].add_(1)
    with side:
        side.wait_stream(compute(lazy))
        x[:, 40:].add_(1)
    x[:, :40].add_(1)
    assert not reports()
    with side:
        x[:, 40:].add_(1)
    x[:, 39:41].add_(1)
    assert reports()


def test_memory_that_is_freed_is_used_again_at_once_unless_it_was_recorded(lazy: torch.device) -> None:
    for record in (False, True):
        x, side, p = torch.ones(N, device=lazy), torch.Stream(device=lazy), pinned()
        side.wait_stream(compute(lazy))
        with side:
            p.copy_(x, non_blocking=True)
        if record:
            x.record_stream(side)
        del x
        torch.zeros(N, device=lazy)
        assert bool(reports()) is not record


def test_pinned_memory_in_flight_is_not_used_again(lazy: torch.device) -> None:
    x, p = torch.ones(N, device=lazy), pinned()
    p.copy_(x, non_blocking=True)
    address = p.data_ptr()
    del p
    assert pinned().data_ptr() != address
    torch.accelerator.synchronize()
    assert address in {one.data_ptr() for one in [pinned() for _ in range(3)]}
    assert not reports()


def test_batch_norm_writes_its_statistics(lazy: torch.device) -> None:
    norm = torch.nn.BatchNorm1d(8).to(lazy)
    side, p = torch.Stream(device=lazy), pinned(8)
    assert norm.running_mean is not None
    torch.accelerator.synchronize()
    with side:
        p.copy_(norm.running_mean, non_blocking=True)
    norm(torch.randn(4, 8).to(lazy))
    assert any("native_batch_norm" in text for text in reports())


def test_streams_come_from_a_pool_of_32(lazy: torch.device) -> None:
    assert len({torch.Stream(device=lazy).stream_id for _ in range(70)}) == 32


def test_modelled_time_is_the_same_in_every_schedule() -> None:
    where, found = torch.device("fakegpu:0"), set()
    for schedule, seed in [
        ("eager", 0),
        ("lazy", 0),
        ("copy_late", 0),
        ("compute_late", 0),
        *(("random", s) for s in range(5)),
    ]:
        device.configure(schedule, seed, poison=False)
        device.cost(copy_gb_s=1, memory_gb_s=1e9, launch_us=10)
        torch.accelerator.synchronize()
        x, p, side = torch.zeros(250_000, device=where), pinned(250_000), torch.Stream(device=where)
        torch.accelerator.synchronize()
        begin, stalled = device.host_us(), device.stall_us(compute(where))
        side.wait_stream(compute(where))
        with side:
            p.copy_(x, non_blocking=True)  # 1 MB at 1 GB/s: 1,000 µs
            copied = side.record_event()
        for _ in range(3):
            x.add(1)  # reads: 10 µs each, at the same time
        compute(where).wait_event(copied)
        x.add_(1)
        torch.accelerator.synchronize()
        found.add((round(device.host_us() - begin, 3), round(device.stall_us(compute(where)) - stalled, 3)))
        assert not reports()
    assert found == {(1010.0, 970.0)}


def test_a_copy_that_fails_is_raised_by_who_synchronises(lazy: torch.device) -> None:
    x, p = torch.ones(N, device=lazy), pinned()
    device.fail_copy(after=1)
    p.copy_(x, non_blocking=True)
    torch.accelerator.synchronize()
    p.copy_(x, non_blocking=True)
    with pytest.raises(RuntimeError, match="copy engine"):
        torch.accelerator.synchronize()
    reports()


def test_memory_can_be_made_short(lazy: torch.device) -> None:
    device.limit_device_bytes(torch.accelerator.memory_allocated() + (1 << 20))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 << 20, dtype=torch.uint8, device=lazy)
    device.limit_pinned_bytes(0)
    with pytest.raises(RuntimeError, match="pinned"):
        pinned()
    device.configure("lazy")
    assert pinned().is_pinned()


def test_registered_host_memory_is_pinned(lazy: torch.device) -> None:
    arena = device.host_arena(4 * N)
    assert arena.is_pinned()
    arena.view(torch.float32).copy_(torch.ones(N, device=lazy), non_blocking=True)
    assert arena[0].item() != 0
    assert reports()
    torch.accelerator.synchronize()
    assert arena.view(torch.float32).sum().item() == N


def test_a_captured_graph_runs_when_it_is_replayed(lazy: torch.device) -> None:
    x = torch.zeros(4, device=lazy)
    with device.capture(compute(lazy)):
        assert compute(lazy).is_capturing()
        x.add_(torch.ones(4, device=lazy))  # this memory stays the graph's
    assert not compute(lazy).is_capturing()
    assert x.cpu().tolist() == [0.0] * 4
    torch.full((4,), 7.0, device=lazy)
    device.replay(compute(lazy))
    device.replay(compute(lazy))
    assert x.cpu().tolist() == [2.0] * 4
    assert not reports()


def test_a_capture_cannot_wait_for_what_is_outside(lazy: torch.device) -> None:
    side, x = torch.Stream(device=lazy), torch.ones(4, device=lazy)
    event = side.record_event()
    with device.capture(compute(lazy)):
        compute(lazy).wait_event(event)
        x.cpu()
    assert [text.partition(":")[0] for text in reports()] == ["CAPTURE", "CAPTURE"]


def test_a_forked_child_is_refused(lazy: torch.device) -> None:
    x = torch.ones(4, device=lazy)
    torch.accelerator.synchronize()
    child = os.fork()
    if not child:
        try:
            x.add_(1)
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_several_devices(lazy: torch.device) -> None:
    other = torch.ones(3, device="fakegpu:1") + 1
    assert other.to("fakegpu:0").cpu().tolist() == [2.0] * 3
    assert not reports()
