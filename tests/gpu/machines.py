"""What the suite runs on: a CUDA device, or, to try the suite itself, the test device of tests/fakegpu (FASTCKPT_GPU_TESTS_ON=fakegpu)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import torch

FAKE = "fakegpu"
CHOICE = "FASTCKPT_GPU_TESTS_ON"


class Machine(Protocol):
    name: str
    device: torch.device

    def begin(self, seed: int) -> None:
        """A test begins."""

    def delay(self, ms: float) -> None:
        """Keep the current stream busy for so long; the host does not wait."""

    def compute_late(self) -> None:
        """From now on what is given to the stream that trains runs as late as it may. Only a model of a device can do that."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture what `work` gives to the current stream; what is returned replays it. Only the model also runs it at once."""

    def pinned_bytes(self) -> int | None:
        """Host memory that torch has pinned so far, used or kept; None if it does not tell."""

    def problems(self) -> list[str]:
        """Wait for the device; what it reports since the last call."""


class Cuda:
    name = "cuda"
    device = torch.device("cuda:0")

    def __init__(self) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # the first one includes loading it
        begin.record()
        torch.cuda._sleep(20_000_000)
        end.record()
        end.synchronize()
        self._cycles_per_ms = 20_000_000 / begin.elapsed_time(end)

    def begin(self, seed: int) -> None:
        torch.cuda.synchronize()

    def delay(self, ms: float) -> None:
        torch.cuda._sleep(int(ms * self._cycles_per_ms))

    def compute_late(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def pinned_bytes(self) -> int | None:
        return torch.cuda.host_memory_stats().get("allocated_bytes.current")

    def problems(self) -> list[str]:
        torch.cuda.synchronize()
        return []


class Fake:
    name = FAKE

    def __init__(self) -> None:
        from tests.fakegpu import device

        device.load()
        self._control = device
        self.device = torch.device(FAKE, 0)

    def begin(self, seed: int) -> None:
        self._control.configure("random", seed)
        self._control.cost()
        self._control.clear()

    def delay(self, ms: float) -> None:
        torch.zeros(64, device=self.device).add_(1)  # the schedule decides how long it takes

    def compute_late(self) -> None:
        self._control.configure("compute_late")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        stream = torch.accelerator.current_stream(self.device)
        with self._control.capture(stream):
            work()
        return lambda: self._control.replay(stream)

    def pinned_bytes(self) -> int | None:
        return None

    def problems(self) -> list[str]:
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
        found = self._control.violations()
        self._control.clear()
        return found


def why_unavailable() -> str | None:
    """In words, if there is nothing to run on."""
    choice = os.environ.get(CHOICE, "cuda")
    if choice == FAKE:
        from tests.fakegpu.build import why_unavailable

        return why_unavailable()
    if choice != "cuda":
        return f"{CHOICE} is {choice!r}: expected cuda or {FAKE}"
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"there is no CUDA device to test on: torch {torch.__version__} was built without CUDA"
    return (
        f"there is no CUDA device to test on: torch {torch.__version__} finds none (torch.cuda.is_available() is False)"
    )


def open_machine() -> Machine:
    """See `why_unavailable`. It becomes this process's accelerator."""
    return Fake() if os.environ.get(CHOICE) == FAKE else Cuda()
