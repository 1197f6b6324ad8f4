"""What the engine takes for granted of torch's generic streams and events, on CUDA itself."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch

from fastckpt.snapshot.side_stream import SideStream, is_capturing
from tests.gpu.conftest import Record
from tests.gpu.machines import Machine

pytestmark = pytest.mark.gpu

N = 1 << 20


def current(where: torch.device) -> torch.Stream:
    return torch.accelerator.current_stream(where)


def pinned(n: int = N) -> torch.Tensor:
    return torch.empty(n, pin_memory=True)


# -- on any device -------------------------------------------------------------------------------------------------------


def test_entering_a_generic_stream_makes_it_the_current_one(gpu: torch.device) -> None:
    before, side = current(gpu), torch.Stream(device=gpu)
    with side:
        assert current(gpu) == side
    assert current(gpu) == before
    assert before != side


def test_the_current_stream_is_of_the_thread(gpu: torch.device) -> None:
    seen = []
    with torch.Stream(device=gpu):
        thread = threading.Thread(target=lambda: seen.append(current(gpu)))
        thread.start()
        thread.join()
    assert seen == [current(gpu)]


def test_pinned_memory_is_known_to_be_pinned(gpu: torch.device) -> None:
    assert pinned().is_pinned()
    assert pinned()[7:9].is_pinned()
    assert not torch.empty(N).is_pinned()


def test_a_stream_that_waits_for_an_event_sees_what_was_before_it(machine: Machine, gpu: torch.device) -> None:
    x, side, event = torch.zeros(N, device=gpu), torch.Stream(device=gpu), torch.Event(device=gpu)
    machine.delay(50)
    x.fill_(1)
    event.record(current(gpu))
    side.wait_event(event)
    target = pinned()
    with side:
        target.copy_(x, non_blocking=True)
        done = side.record_event()
    done.synchronize()
    assert done.query()
    assert target.eq(1).all()


def test_memory_recorded_on_a_stream_is_not_used_again_too_early(machine: Machine, gpu: torch.device) -> None:
    x, side, target = torch.ones(N, device=gpu), torch.Stream(device=gpu), pinned()
    side.wait_stream(current(gpu))
    with side:
        machine.delay(100)
        target.copy_(x, non_blocking=True)
    x.record_stream(side)
    del x
    others = [torch.zeros(N, device=gpu) for _ in range(4)]
    side.synchronize()
    assert target.eq(1).all()
    assert len(others) == 4


def test_pinned_memory_in_flight_is_not_given_to_others(machine: Machine, gpu: torch.device) -> None:
    x, side, target = torch.ones(N, device=gpu), torch.Stream(device=gpu), pinned()
    address = target.data_ptr()
    side.wait_stream(current(gpu))
    with side:
        machine.delay(100)
        target.copy_(x, non_blocking=True)
        done = side.record_event()
    del target
    address_of_another = pinned().data_ptr()
    in_flight = not done.query()
    assert not (in_flight and address_of_another == address)
    assert in_flight or machine.name != "cuda", "the delay was too short to show anything"
    side.synchronize()


def test_a_capture_is_seen_by_its_stream_only(machine: Machine, gpu: torch.device) -> None:
    if machine.name != "cuda" and not hasattr(torch.Stream, "is_capturing"):
        pytest.skip(f"torch {torch.__version__} asks only CUDA whether a stream is captured (since 2.13 any device)")
    seen = []
    x = torch.zeros(8, device=gpu)

    def work() -> None:
        x.add_(1)
        seen.append(is_capturing(gpu))
        thread = threading.Thread(target=lambda: seen.append(is_capturing(gpu)) if machine.name == "cuda" else None)
        thread.start()
        thread.join()

    machine.capture(work)
    # In the model the stream of all threads is captured; on CUDA it is one of torch's own.
    assert seen == ([True, False] if machine.name == "cuda" else [True])
    assert not is_capturing(gpu)


# -- CUDA's alone --------------------------------------------------------------------------------------------------------


def test_the_generic_current_stream_is_cudas(cuda: torch.device) -> None:
    for stream in (torch.cuda.current_stream(cuda), torch.cuda.Stream(cuda), torch.cuda.Stream(cuda, priority=-1)):
        with torch.cuda.stream(stream):
            generic = current(cuda)  # never equal to one of CUDA's own class, says torch.cuda.Stream.__eq__
            assert (generic.device, generic.stream_id) == (stream.device, stream.stream_id)
            assert generic.native_handle == stream.cuda_stream


def test_a_generic_stream_is_cudas_current_one(cuda: torch.device) -> None:
    side = torch.Stream(device=cuda)
    with side:
        assert torch.cuda.current_stream(cuda).stream_id == side.stream_id
        assert torch.cuda.current_stream(cuda).cuda_stream == side.native_handle


def test_an_event_has_happened_when_its_stream_got_there(machine: Machine, cuda: torch.device) -> None:
    event = torch.Event(device=cuda)
    machine.delay(200)
    event.record(current(cuda))
    assert not event.query()
    torch.cuda.synchronize()
    assert event.query()


def test_generic_streams_wait_for_cudas_and_the_other_way_round(machine: Machine, cuda: torch.device) -> None:
    theirs, ours, x = torch.cuda.Stream(cuda), torch.Stream(device=cuda), torch.zeros(N, device=cuda)
    torch.cuda.synchronize()
    with torch.cuda.stream(theirs):
        machine.delay(50)
        x.fill_(1)
    ours.wait_stream(theirs)
    with ours:
        machine.delay(50)
        x.mul_(2)
    theirs.wait_stream(ours)
    event = torch.Event(device=cuda)
    with torch.cuda.stream(theirs):
        x.add_(1)
        event.record(theirs)
    ours.wait_event(event)
    with ours:
        x.mul_(2)
        event.record(ours)
    theirs.wait_event(event)
    with torch.cuda.stream(theirs):
        x.add_(1)
    torch.cuda.synchronize()
    assert x.eq(7).all()


def test_the_legacy_default_stream_does_not_hold_up_a_lane(machine: Machine, cuda: torch.device) -> None:
    """Streams of torch do not synchronise with the default stream by themselves."""
    side, x, target = SideStream(cuda), torch.ones(N, device=cuda), pinned()
    side.begin()
    torch.cuda.synchronize()
    machine.delay(300)
    side.copy(target.view(torch.uint8), [x.view(torch.uint8)], pinned=True)
    copied, computed = side.mark(), current(cuda).record_event()
    copied.synchronize()
    assert not computed.query(), "the copy waited for the default stream"


def test_the_host_does_not_wait_for_a_copy_into_pinned_memory(machine: Machine, cuda: torch.device) -> None:
    x, target = torch.ones(N, device=cuda), pinned()
    torch.cuda.synchronize()
    machine.delay(300)
    target.copy_(x, non_blocking=True)
    assert not current(cuda).record_event().query()
    torch.cuda.synchronize()


def test_how_events_are_waited_for(machine: Machine, cuda: torch.device, record: Record) -> None:
    """Whether `Event.synchronize` holds a core: the engine asks and sleeps instead, which should cost next to none."""
    from fastckpt.snapshot.side_stream import wait_for

    figures = {}
    kinds = {
        "torch.Event.synchronize": (torch.Event(device=cuda), lambda event: event.synchronize()),
        "torch.cuda.Event(blocking=True).synchronize": (
            torch.cuda.Event(blocking=True),
            lambda event: event.synchronize(),
        ),
        "wait_for": (torch.Event(device=cuda), wait_for),
    }
    for name, (event, wait) in kinds.items():
        machine.delay(300)
        event.record(torch.cuda.current_stream(cuda))
        wall, cpu = time.perf_counter(), time.thread_time()
        wait(event)
        figures[name] = {"wall s": time.perf_counter() - wall, "cpu s": time.thread_time() - cpu}
    record("waiting 0.3 s for an event", figures)


def test_what_streams_there_are(cuda: torch.device, record: Record) -> None:
    found = {"default native_handle": torch.cuda.default_stream(cuda).native_handle}
    found["streams before ids repeat"] = len({torch.Stream(device=cuda).stream_id for _ in range(100)})
    found["with priority -1"] = len({torch.Stream(device=cuda, priority=-1).stream_id for _ in range(100)})
    record("streams", found)


MIXED = """
import torch
event, side = torch.cuda.Event(), torch.Stream(device="cuda")
x = torch.zeros(1 << 20, device="cuda")
torch.cuda.synchronize()
torch.cuda._sleep(200_000_000)
x.fill_(1)
event.record()
side.wait_event(event)
with side:
    y = x.clone()
side.synchronize()
print("ordered" if y.eq(1).all() else "not ordered")
"""


def test_a_generic_stream_that_waits_for_an_event_of_cudas_own_class(cuda: torch.device, record: Record) -> None:
    """The engine never does it, so nothing is asserted; in a process of its own, because torch may not have been made for it."""
    done = subprocess.run([sys.executable, "-c", MIXED], check=False, capture_output=True, text=True, timeout=120)
    words = done.stdout.strip() or (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
    record("torch.Stream.wait_event(torch.cuda.Event)", {"exit status": done.returncode, "said": words})
