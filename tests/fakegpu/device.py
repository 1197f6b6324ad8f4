"""The Python face of the test device: loads it as torch's accelerator "fakegpu", drives its schedules, reads its reports.

    device.load()
    device.configure("random", seed=3)
    … use torch.device("fakegpu:0") …
    torch.accelerator.synchronize()
    assert not device.violations()

It becomes the accelerator of the whole process, for good: tests of plain CPU code run in another one.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Iterator
from typing import Any

import torch

from tests.fakegpu.build import build

SCHEDULES = ("eager", "lazy", "copy_late", "compute_late", "random", "threads")
_MAX_REPORTS = 64
_library: Any = None


def load() -> None:
    """Build it if need be, and make it this process's accelerator. May be called again."""
    global _library  # noqa: PLW0603 - there is one accelerator
    if _library is not None:
        return
    path = str(build())
    torch.utils.rename_privateuse1_backend("fakegpu")
    torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    library.fakegpu_violation.restype = ctypes.c_char_p
    for name in ("stall_us", "end_us", "host_us"):
        getattr(library, f"fakegpu_{name}").restype = ctypes.c_double
    for name in ("operations", "copies", "bytes_to_host"):
        getattr(library, f"fakegpu_{name}").restype = ctypes.c_uint64
    library.fakegpu_advance_host_us.argtypes = [ctypes.c_double]
    library.fakegpu_cost.argtypes = [ctypes.c_double] * 3
    library.fakegpu_configure.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    library.fakegpu_fail_copy.argtypes = [ctypes.c_long, ctypes.c_bool]
    library.fakegpu_limit_device.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.fakegpu_limit_pinned.argtypes = [ctypes.c_uint64]
    library.fakegpu_host_arena.argtypes = [ctypes.c_uint64]
    library.fakegpu_host_arena.restype = ctypes.c_void_p
    _library = library
    torch._register_device_module("fakegpu", _device_module())
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.Event = _checked_event(torch.Event)  # type: ignore[misc]


def _device_module() -> types.ModuleType:
    module: Any = types.ModuleType("torch.fakegpu")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = _library.fakegpu_device_count
    module.current_device = _library.fakegpu_current_device
    module.set_device = torch.accelerator.set_device_index
    module.synchronize = torch.accelerator.synchronize
    module.current_stream = torch.accelerator.current_stream
    module.set_stream = torch.accelerator.set_stream
    module.memory_allocated = torch.accelerator.memory_allocated
    module.Stream, module.Event = torch.Stream, torch.Event
    module.manual_seed = module.manual_seed_all = lambda seed: None  # its generator is the CPU's
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]

    @contextlib.contextmanager
    def stream(one: torch.Stream | None) -> Iterator[None]:
        if one is None:
            yield
        else:
            with one:
                yield

    class Device:
        def __init__(self, device: Any) -> None:
            self._index = device if isinstance(device, int) else torch.device(device).index

        def __enter__(self) -> None:
            self._before = _library.fakegpu_current_device()
            torch.accelerator.set_device_index(self._before if self._index is None else self._index)

        def __exit__(self, *error: object) -> None:
            torch.accelerator.set_device_index(self._before)

    module.stream, module.device = stream, Device
    return module


def _checked_event(base: Any) -> Any:
    """torch does not even tell the device of a wait for an event that was never recorded. So ours are born as recorded nowhere."""

    class Event(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            self.record(_nowhere(self.device))

    return Event


def _nowhere(device: torch.device | None) -> torch.Stream:
    index = device.index if device is not None and device.index is not None else 0
    kind = torch._C._autograd.DeviceType.PrivateUse1.value  # type: ignore[attr-defined]
    return torch.Stream(stream_id=_library.fakegpu_nowhere(), device_index=index, device_type=kind)


def configure(
    schedule: str = "eager", seed: int = 0, *, poison: bool = True, trap: bool = True, races: bool = True
) -> None:
    """Finish what is queued, then run by another schedule. Limits, failures and starved streams are forgotten.

    ValueError: no such schedule, or the process is in "threads", which cannot be left.
    """
    if _library.fakegpu_configure(schedule.encode(), seed, poison, trap, races):
        raise ValueError(f"{schedule!r} cannot be entered: expected one of {SCHEDULES}; threads cannot be left")


def violations() -> list[str]:
    """What broke the rules since `clear`: the first 64, and how many more there are."""
    n = _library.fakegpu_violations()
    texts = [_library.fakegpu_violation(i).decode() for i in range(min(n, _MAX_REPORTS))]
    return [*texts, f"… and {n - _MAX_REPORTS} more"] if n > _MAX_REPORTS else texts


def clear() -> None:
    """Forget all reports."""
    _library.fakegpu_clear()


def cost(copy_gb_s: float = 25, memory_gb_s: float = 2000, launch_us: float = 5) -> None:
    """What operations take in modelled time: copies to and from the host by the link, others by launch and memory."""
    _library.fakegpu_cost(copy_gb_s, memory_gb_s, launch_us)


def stall_us(stream: torch.Stream) -> float:
    """Modelled time that a stream has waited for others, of what has run so far."""
    return float(_library.fakegpu_stall_us(stream.stream_id))


def end_us(stream: torch.Stream) -> float:
    """Modelled time at which a stream was done with what has run so far."""
    return float(_library.fakegpu_end_us(stream.stream_id))


def host_us() -> float:
    """Modelled time of the host: it moves when the host synchronises, and by `advance_host_us`."""
    return float(_library.fakegpu_host_us())


def advance_host_us(us: float) -> None:
    """The host is busy for so long."""
    _library.fakegpu_advance_host_us(us)


def operations() -> int:
    """Given to streams since the process began."""
    return int(_library.fakegpu_operations())


def copies() -> int:
    """Given to streams since the process began, between host and device."""
    return int(_library.fakegpu_copies())


def bytes_to_host() -> int:
    """Of all copies from a device to the host that were given to streams since the process began."""
    return int(_library.fakegpu_bytes_to_host())


def starve(stream: torch.Stream | None) -> None:
    """This stream runs only what somebody waits for. None: all streams are fed again."""
    _library.fakegpu_starve(-1 if stream is None else stream.stream_id)


def fail_copy(after: int, *, sticky: bool = False) -> None:
    """The copy after `after` others fails on the device; a later call that synchronises raises it.

    sticky: and so does every call after that one, as when a CUDA context is lost; until `mend` or `configure`.
    """
    _library.fakegpu_fail_copy(after, sticky)


def mend() -> None:
    """Forget a failure that is to come or has come."""
    _library.fakegpu_fail_copy(-1, False)


def limit_device_bytes(n_bytes: int, device: int = 0) -> None:
    """More than this many allocated bytes are torch.OutOfMemoryError."""
    _library.fakegpu_limit_device(device, n_bytes)


def limit_pinned_bytes(n_bytes: int) -> None:
    """More than this many pinned bytes cannot be had."""
    _library.fakegpu_limit_pinned(n_bytes)


def host_arena(n_bytes: int) -> torch.Tensor:
    """Host memory that was registered with the device after the host had made it. Never freed."""
    address = _library.fakegpu_host_arena(n_bytes)
    if not address:
        raise RuntimeError("host memory cannot be registered")
    return torch.frombuffer((ctypes.c_ubyte * n_bytes).from_address(address), dtype=torch.uint8)


@contextlib.contextmanager
def capture(stream: torch.Stream) -> Iterator[None]:
    """Remember what this stream is given, for `replay`; it does not run now. Waiting for what is not captured is reported."""
    _library.fakegpu_capture(stream.stream_id, 1)
    try:
        yield
    finally:
        _library.fakegpu_capture(stream.stream_id, 0)


def replay(stream: torch.Stream) -> None:
    """Give the stream all that was captured once more. No Python of the captured code runs, and so none of its hooks."""
    _library.fakegpu_replay(stream.stream_id)
