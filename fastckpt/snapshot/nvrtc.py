"""Compiles a CUDA kernel while the program runs, with the compiler library (NVRTC) that torch's CUDA build brings.

Needs no device: tests compile for all architectures with the library alone. Whoever calls this does without the kernel if it raises.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def library(major: int) -> ctypes.CDLL:
    """The library of one major version of CUDA: the one that torch has loaded, or that lies where torch's wheels put it. OSError."""
    name = f"libnvrtc.so.{major}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        for folder in _folders():
            if (folder / name).exists():
                return load_from(folder, name)
        raise OSError(f"{name} is neither loaded nor in {', '.join(map(str, _folders()))}") from error


def load_from(folder: Path, name: str) -> ctypes.CDLL:
    """The library from a folder, and first its second half, which it would look for only where the system has its libraries. OSError."""
    for builtins in sorted(folder.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / name))


def _folders() -> Iterator[Path]:
    packages = Path(torch.__file__).parents[1]
    yield from sorted((packages / "nvidia").glob("*/lib"))  # cuda_nvrtc/lib of CUDA 12, cu13/lib of CUDA 13
    yield packages / "torch" / "lib"
    yield Path(sys.prefix) / "lib"
    yield Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"


def compile_for(nvrtc: ctypes.CDLL, source: str, name: str, capability: int) -> bytes:
    """A module for the driver to load: machine code of this architecture, or PTX of the newest one before it that the library knows.

    name: of the source, in messages. capability: 90 for compute capability 9.0. RuntimeError with the compiler's words.
    """
    known = _architectures(nvrtc)
    usable = max((one for one in known if one <= capability), default=0)
    if not usable:
        raise RuntimeError(f"compute capability {capability / 10:g}: this NVRTC compiles for {known}")
    exact = usable == capability
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        options = (f"--gpu-architecture={'sm' if exact else 'compute'}_{usable}", "--std=c++17")
        texts = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), texts):
            raise RuntimeError(
                f"NVRTC does not compile {name}: {_get(nvrtc, program, 'ProgramLog').decode(errors='replace')}"
            )
        return _get(nvrtc, program, "CUBIN" if exact else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _architectures(nvrtc: ctypes.CDLL) -> list[int]:
    n = ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(n)))
    found = (ctypes.c_int * n.value)()
    _check(nvrtc, nvrtc.nvrtcGetSupportedArchs(found))
    return list(found)


def _get(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    n = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(n)))
    content = ctypes.create_string_buffer(n.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, content))
    return content.raw.rstrip(b"\0") if what == "ProgramLog" else content.raw


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")
