"""The fingerprint of a chunk: 128 bits that tell whether its bytes are those of another time (csrc/cuda/fingerprint.cuh)."""

from __future__ import annotations

from typing import Any

from fastckpt._types import U64
from fastckpt.kernels import reference
from fastckpt.kernels.select import kernels


def fingerprint(data: Any, keys: U64, out: U64) -> None:
    """Compute the fingerprint of `data` into the two words of `out`, with two keys. `reference.fingerprint` defines it. ValueError."""
    if kernels().name == "native":
        import fastckpt._native as native

        native.fingerprint(data, keys, out)
    else:
        reference.fingerprint(data, keys, out)


def cuda_source() -> str:
    """The text of the CUDA kernel that computes it. RuntimeError without the native module, which has it."""
    try:
        from fastckpt._native import cuda_source as found
    except ImportError as error:
        raise RuntimeError(f"the native module, which has the kernel's text, cannot be imported ({error})") from error
    text: str | None = found()
    if text is None:
        raise RuntimeError("this build of the native module has no CUDA kernel")
    return text
