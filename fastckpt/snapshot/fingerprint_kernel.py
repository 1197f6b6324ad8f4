"""The CUDA kernel of fingerprints (csrc/cuda/fingerprint.cuh): compiled once for a device, launched through CUDA's driver.

On a machine without CUDA it is tested with another library in the driver's place, which runs the kernel's text on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from fastckpt.events import logger
from fastckpt.kernels.fingerprint import cuda_source
from fastckpt.snapshot import nvrtc

NAME = "fastckpt_fingerprint_kernel"
_THREADS = 256
_SEGMENT_BYTES = 64 << 10
"""Both as in the kernel's source: threads of a block, and what one block reads."""
_MAX_BLOCKS = (1 << 31) - 1


class FingerprintKernel:
    """The kernel in one device's context. Any thread whose current device that is."""

    def __init__(self, driver: ctypes.CDLL, image: bytes) -> None:
        """driver: libcuda. image: what NVRTC has made. Loads it on the current device. RuntimeError."""
        self._driver, self._image = driver, image
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(driver.cuModuleLoadData(ctypes.byref(module), image))
        self._check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, NAME.encode()))

    def launch(
        self, chunks: torch.Tensor, sums: torch.Tensor, longest_bytes: int, keys: Sequence[int], stream: int
    ) -> None:
        """Enqueue the kernel. Nothing is checked, and nothing is kept alive.

        chunks: on the device, address and length of each chunk; sums: on the device, two zeros for each. longest_bytes: of any chunk.
        keys: two numbers of 64 bits. stream: the driver's handle. RuntimeError.
        """
        segments = max(1, -(-(longest_bytes // 8 * 8) // _SEGMENT_BYTES))
        n_blocks = segments * sums.shape[0]
        if n_blocks > _MAX_BLOCKS:
            raise RuntimeError(f"{n_blocks} blocks: a grid has at most {_MAX_BLOCKS}")
        values = (ctypes.c_uint64 * 5)(chunks.data_ptr(), sums.data_ptr(), segments, *(key % (1 << 64) for key in keys))
        size = ctypes.sizeof(ctypes.c_uint64)
        arguments = (ctypes.c_void_p * 5)(*(ctypes.addressof(values) + size * i for i in range(5)))
        grid = (ctypes.c_uint(n_blocks), ctypes.c_uint(1), ctypes.c_uint(1))
        block = (ctypes.c_uint(_THREADS), ctypes.c_uint(1), ctypes.c_uint(1))
        self._check(
            self._driver.cuLaunchKernel(
                self._function, *grid, *block, ctypes.c_uint(0), ctypes.c_void_p(stream), arguments, None
            )
        )

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA's driver: {(text.value or b'unknown error').decode()} ({status})")


@functools.cache
def kernel_on(index: int) -> FingerprintKernel | None:
    """The kernel for a CUDA device that is current and has been used by this thread. None, logged once, if there is none."""
    try:
        assert torch.version.cuda is not None, "torch is not built for CUDA"
        library = nvrtc.library(int(torch.version.cuda.partition(".")[0]))
        major, minor = torch.cuda.get_device_capability(index)
        image = nvrtc.compile_for(library, cuda_source(), "fingerprint.cuh", 10 * major + minor)
        return FingerprintKernel(ctypes.CDLL("libcuda.so.1"), image)
    except Exception as error:
        logger.info(
            "cuda:%d: no kernel for fingerprints (%s: %s); torch's own operators compute them, in more time",
            index,
            type(error).__name__,
            error,
        )
        return None
