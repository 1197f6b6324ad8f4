"""Which implementation of the kernels runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

# Importing numba and compiling takes about a second; the NumPy code does this much in a few milliseconds.
_NUMBA_FROM_BYTES = 256 * 1024

ENV = "FASTCKPT_KERNELS"
_CHOICES = ("auto", "native", "numba", "reference")


class Kernels(NamedTuple):
    """One implementation. Buffers are C-contiguous; `out` is writable, as long as `source`, and does not overlap it."""

    name: str
    crc64nvme: Callable[[Any], int]
    rot_split: Callable[[Any, Any, int], None]
    """(raw, out stream, lane bytes in {2, 4, 8}); ValueError when the length is no multiple of the lane."""
    rot_merge: Callable[[Any, Any, int], None]
    """(stream, out raw, lane bytes): the inverse."""


@functools.cache
def _load(name: str) -> Kernels:
    if name == "native":
        import fastckpt._native as native

        return Kernels("native", native.crc64nvme, native.rot_split, native.rot_merge)
    if name == "numba":
        from fastckpt.kernels import numba_cpu

        return Kernels("numba", numba_cpu.crc64nvme, numba_cpu.rot_split, numba_cpu.rot_merge)
    from fastckpt.kernels import reference

    return Kernels("reference", reference.crc64nvme, reference.rot_split, reference.rot_merge)


@functools.cache
def _native_available() -> bool:
    try:
        _load("native")
    except ImportError:
        return False
    return True


@functools.cache
def _numba_available() -> bool:
    try:
        _load("numba")
    except ImportError:  # numba follows new Python versions with some delay
        return False
    return True


def kernels(n_bytes: int = 1 << 62) -> Kernels:
    """The implementation for a buffer of n_bytes: native; else numba for large buffers; else NumPy.

    FASTCKPT_KERNELS forces one (ImportError if it is not there, ValueError for an unknown name).
    """
    choice = os.environ.get(ENV, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"{ENV} is {choice!r}; it may be one of {', '.join(_CHOICES)}")
    if choice != "auto":
        return _load(choice)
    if _native_available():
        return _load("native")
    if n_bytes >= _NUMBA_FROM_BYTES and _numba_available():
        return _load("numba")
    return _load("reference")
