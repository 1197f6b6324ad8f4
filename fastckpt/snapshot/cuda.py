"""What torch's generic API does not reach: CUDA's own calls. None of this does anything on other devices.

Not proven without a card: tests/gpu is where it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import torch

_RELAXED = 2  # cudaStreamCaptureModeRelaxed


@functools.cache
def _exchange_mode() -> Callable[[ctypes.c_int], None] | None:
    """cudaThreadExchangeStreamCaptureMode of the run-time library that torch has loaded; None where there is none."""
    if torch.version.cuda is None or not torch.cuda.is_initialized():
        return None
    major = torch.version.cuda.partition(".")[0]
    try:
        call = ctypes.CDLL(f"libcudart.so.{major}").cudaThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):
        return None

    def exchange(mode: ctypes.c_int) -> None:
        call(ctypes.byref(mode))

    return exchange


@contextlib.contextmanager
def while_others_capture(device: torch.device | None) -> Iterator[None]:
    """Ask for events without spoiling a graph that another thread captures meanwhile: by default a capture forbids every thread of the
    process whatever might depend on it, cudaEventQuery included, and is lost when one does it.
    """
    exchange = _exchange_mode() if device is not None and device.type == "cuda" else None
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    exchange(mode)  # the mode that was comes back in its place
    try:
        yield
    finally:
        exchange(mode)
