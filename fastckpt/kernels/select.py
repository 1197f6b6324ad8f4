"""Chooses the implementation of the kernels."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from fastckpt.host.threads import start
from fastckpt.kernels.reference import Estimate

# Importing numba and compiling takes a second or two; NumPy processes this many bytes in a few milliseconds.
_NUMBA_FROM_BYTES = 256 * 1024

ENV = "FASTCKPT_KERNELS"
_CHOICES = ("auto", "native", "numba", "reference")


class Kernels(NamedTuple):
    """One implementation; `reference` defines the results. Any thread. Buffers are C-contiguous and do not overlap, with one exception: the
    base of merge and decode may be the very memory of `raw`; if these fail, it still has the base's bytes.
    """

    name: str
    crc64nvme: Callable[[Any], int]
    crc64nvme_combine: Callable[[int, int, int], int]
    """(crc of some bytes, crc of the bytes after them, number of these) → crc of all."""
    split: Callable[[Any, Any, int, int, int, Any], int | None]
    """(raw, base, transform, lane bytes, pack bits, stream) → stream bytes; None: the stream does not fit, or the transform cannot take
    these numbers.
    """
    merge: Callable[[Any, Any, int, int, int, Any], bool]
    """(stream, base, transform, lane bytes, pack bits, raw) → whether it can be the stream of such a chunk."""
    sample: Callable[[Any, Any, int], Estimate]
    """(raw, base, lane bytes)."""
    cast: Callable[[Any, Any], None]
    """(float32, bfloat16 out)."""
    cast_equal: Callable[[Any, Any], bool]
    """(bfloat16, float32) → whether `cast` makes the first of the second."""
    equal: Callable[[Any, Any], bool]
    """(bytes, bytes) → whether they are the same; ends soon after the first difference."""
    is_constant: Callable[[Any, int], bool]
    """(raw, lane bytes)."""
    gather: Callable[[Any, Any, Any], None]
    """(addresses, lengths, out)."""
    lines: Callable[[Any, Any, int, Any], None]
    """(addresses, lengths, seed, out)."""
    rows: Callable[[Any, Any, Any], None]
    """(data, keys, out)."""
    encode: Callable[[Any, Any, int, int, int, Any], tuple[int, int, bytes] | None] | None
    """Like split, but makes a complete zstd frame: (stored bytes, their crc64nvme, digest of raw). None: only native kernels have it."""
    decode: Callable[[Any, Any, int, int, int, Any], bytes | None] | None
    """(frame, base, transform, lane bytes, pack bits, raw) → digest of raw; None: the frame is from another writer, or damaged."""
    read_chunks: Callable[[int, Any, Any, Any], None] | None
    """(descriptor or -1, None or memory, rows, outcomes): reads, verifies and decodes chunks (`chunk_table`). None: only native kernels
    have it.
    """


@functools.cache
def load(name: str) -> Kernels:
    """One implementation by its name. ImportError if it is not installed."""
    if name == "native":
        import fastckpt._native as n

        return Kernels(
            name,
            n.crc64nvme,
            n.crc64nvme_combine,
            n.split,
            n.merge,
            lambda raw, base, lane_bytes: Estimate(*n.sample(raw, base, lane_bytes)),
            n.cast,
            n.cast_equal,
            n.equal,
            n.is_constant,
            n.gather,
            n.lines,
            n.rows,
            n.encode,
            n.decode,
            n.read_chunks,
        )
    if name == "numba":
        from fastckpt.kernels import numba_cpu as c

        return load("reference")._replace(name=name, crc64nvme=c.crc64nvme, split=c.split, merge=c.merge)
    from fastckpt.kernels import reference as r

    return Kernels(
        name,
        r.crc64nvme,
        r.crc64nvme_combine,
        r.split,
        r.merge,
        r.sample,
        r.cast,
        r.cast_equal,
        r.equal,
        r.is_constant,
        r.gather,
        r.lines,
        r.rows,
        None,
        None,
        None,
    )


@functools.cache
def native_is_available() -> bool:
    """Whether the native extension can be imported."""
    try:
        load("native")
    except ImportError:
        return False
    return True


@functools.cache
def numba_is_available() -> bool:
    """Whether numba can be imported."""
    try:
        load("numba")
    except ImportError:  # numba follows new Python versions with some delay
        return False
    return True


class Compiling:
    """The thread that compiles the numba kernels; `thread` is None before it was started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, once."""
        with self._lock:
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="fastckpt-compile", daemon=True)
                start(self.thread)  # if the interpreter is ending, no thread starts, and compiling would be useless

    def under_way(self) -> bool:
        """Whether the thread is still compiling."""
        return self.thread is not None and self.thread.is_alive()

    @staticmethod
    def _run() -> None:
        if numba_is_available():
            from fastckpt.kernels import numba_cpu

            numba_cpu.warm_up()


compiling = Compiling()


def warm_up() -> None:
    """Compile the numba kernels on a thread of their own, if they will be used. Returns at once; NumPy is used until they are ready."""
    if os.environ.get(ENV, "auto") == "auto" and not native_is_available():
        compiling.start()


def kernels(n_bytes: int = 1 << 62) -> Kernels:
    """The implementation for a buffer of n_bytes: native; else numba for large buffers, unless `warm_up` is still compiling; else NumPy.

    FASTCKPT_KERNELS forces one (ImportError if it is not there, ValueError for an unknown name).
    """
    choice = os.environ.get(ENV, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"{ENV} is {choice!r}: expected one of {', '.join(_CHOICES)}")
    if choice != "auto":
        try:
            return load(choice)
        except ImportError as error:
            raise ImportError(
                f"{ENV} is {choice!r}, and these kernels are not installed ({error}): expected auto, or others of {', '.join(_CHOICES)}"
            ) from error
    if native_is_available():
        return load("native")
    if n_bytes >= _NUMBA_FROM_BYTES and not compiling.under_way() and numba_is_available():
        return load("numba")
    return load("reference")
