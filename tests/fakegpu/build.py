"""Builds the test device with the machine's own compiler, once for each version of its sources, torch and compiler."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = sorted((HERE / "csrc").glob("*.cpp"))
HEADERS = sorted((HERE / "csrc").glob("*.h"))
TORCH_MINORS = ("2.11", "2.13")
"""The device is written against torch's inner interfaces, which change with every minor version."""
FLAGS = ("-std=c++20", "-O1", "-g0", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-interference-size")


def compiler() -> str | None:
    """CXX, or the first that is installed."""
    return next(
        (shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if shutil.which(name)), None
    )


def why_unavailable() -> str | None:
    """In words, if the device cannot be built here."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the test device is for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    version = torch.__version__
    if not version.startswith(tuple(f"{minor}." for minor in TORCH_MINORS)):
        return f"the test device is written for torch {' and '.join(TORCH_MINORS)}, this is torch {version}"
    if compiler() is None:
        return "the test device needs a C++ compiler (g++ or clang++)"
    return None


def build() -> Path:
    """The library, built if it is not there. RuntimeError with the compiler's words. Several processes may call it at once."""
    cxx = compiler()
    assert cxx is not None, "see why_unavailable"
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True).stdout
    key = hashlib.sha256(version + " ".join([torch.__version__, str(torch.compiled_with_cxx11_abi()), *FLAGS]).encode())
    for path in (*SOURCES, *HEADERS):
        key.update(path.read_bytes())
    folder = HERE / ".build"
    library = folder / f"fakegpu-{key.hexdigest()[:16]}.so"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that want it at once, one builds it
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = _compile(cxx, Path(scratch))
                made.replace(library)
    return library


def _compile(cxx: str, scratch: Path) -> Path:
    home = Path(torch.__file__).parent
    include = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]

    def compile_one(source: Path) -> Path:
        target = scratch / f"{source.stem}.o"
        _run([cxx, *FLAGS, *include, "-c", str(source), "-o", str(target)])
        return target

    # The one that takes longest first.
    ordered = sorted(SOURCES, key=lambda source: source.stem not in ("autocast", "operators"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_one, ordered)]
    library = scratch / "fakegpu.so"
    _run(
        [
            cxx,
            "-shared",
            *objects,
            "-o",
            str(library),
            f"-L{home}/lib",
            "-ltorch_cpu",
            "-lc10",
            f"-Wl,-rpath,{home}/lib",
        ]
    )
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
