"""CUDA calls that torch's generic API does not offer. On other devices these functions do nothing.

Tested only with a GPU, by tests/gpu.
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
    """cudaThreadExchangeStreamCaptureMode of the run-time library that torch has loaded; None if there is none."""
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
    """Context in which events may be queried while another thread captures a graph. By default, a capture forbids calls such as
    cudaEventQuery in every thread of the process, and fails if one is made.
    """
    exchange = _exchange_mode() if device is not None and device.type == "cuda" else None
    if exchange is None:
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    exchange(mode)  # restores the previous mode
    try:
        yield
    finally:
        exchange(mode)
