"""The CUDA kernel of fingerprints without a device: run on the CPU, compiled for each architecture, launched by another "driver"."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fastckpt.kernels import reference
from fastckpt.kernels.fingerprint import cuda_source
from fastckpt.snapshot import nvrtc
from fastckpt.snapshot.fingerprint_kernel import NAME, FingerprintKernel

CSRC = Path(__file__).parents[2] / "csrc"
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
STREAM = 5  # what tests/emulated_driver.cpp expects


def need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"there is no {program}")


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=CSRC, capture_output=True, text=True, timeout=200, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}", pytrace=False)
    return done.stdout


def test_the_kernel_gives_the_cpus_fingerprints_under_sanitizers(tmp_path: Path) -> None:
    """All alignments and tails, on buffers without a byte to spare, threads in a shuffled order. Over 5 s: compiling with sanitizers."""
    need("make", "g++")
    probe = subprocess.run(
        ["g++", "-fsanitize=address,undefined", "-x", "c++", "-", "-o", str(tmp_path / "probe")],
        input="int main() {}", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if probe.returncode:
        pytest.skip("the runtime libraries of AddressSanitizer and UndefinedBehaviorSanitizer are missing")
    run("make", "--no-print-directory", f"BUILD={tmp_path}", "fingerprint-emulation", "CXX=g++")
    assert "the kernel gives" in run(str(tmp_path / "fingerprint-emulation"))


def test_a_missing_barrier_is_noticed(tmp_path: Path) -> None:
    """Otherwise the emulator would prove nothing."""
    need("g++")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "tests").mkdir()
    text = (CSRC / "cuda" / "fingerprint.cuh").read_text()
    inner = "        __syncthreads();\n"
    assert text.count(inner) == 1
    (tmp_path / "cuda" / "fingerprint.cuh").write_text(text.replace(inner, ""))
    for path in (*CSRC.glob("*.h"), CSRC / "fingerprints.cpp"):
        shutil.copy(path, tmp_path)
    for name in ("grid_emulator.h", "fingerprint_emulation.cpp"):
        shutil.copy(CSRC / "tests" / name, tmp_path / "tests")
    program = str(tmp_path / "program")
    sources = (tmp_path / "tests" / "fingerprint_emulation.cpp", tmp_path / "fingerprints.cpp")
    run("g++", "-std=c++17", "-O1", *map(str, sources), "-o", program)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "other sums than the CPU's" in done.stderr


def test_nvcc_compiles_it(tmp_path: Path) -> None:
    """Over 5 s: the oldest, the commonest and the newest architecture, one after the other."""
    need("nvcc")
    known = run("nvcc", "--list-gpu-code").split()
    wanted = [str(c) for c in (75, 90, 120) if f"sm_{c}" in known]
    assert "90" in wanted
    source = tmp_path / "kernel.cu"
    source.write_text(f'#include "{CSRC}/cuda/fingerprint.cuh"\n')
    codes = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in wanted]
    run(
        "nvcc",
        "-std=c++17",
        "-Werror=all-warnings",
        *codes,
        "-fatbin",
        "-o",
        str(tmp_path / "kernel.fatbin"),
        str(source),
    )


@pytest.mark.parametrize("major", [12, 13])
def test_nvrtc_compiles_it(major: int) -> None:
    """With the library of torch's CUDA build, or of the wheel nvidia-cuda-nvrtc; it needs no device."""
    try:
        library = nvrtc.library(major)
    except OSError as error:
        pytest.skip(f"there is no NVRTC of CUDA {major}: {error}")
    for capability in CAPABILITIES:
        image = nvrtc.compile_for(library, cuda_source(), "fingerprint.cuh", capability)
        assert NAME.encode() in image
    assert b".target sm_" in nvrtc.compile_for(library, cuda_source(), "fingerprint.cuh", 999), (
        "PTX for what it does not know"
    )
    with pytest.raises(RuntimeError, match="this NVRTC compiles for"):
        nvrtc.compile_for(library, cuda_source(), "fingerprint.cuh", 10)
    with pytest.raises(RuntimeError, match=r"does not compile wrong\.cu: wrong\.cu"):
        nvrtc.compile_for(library, "no C++", "wrong.cu", 90)


def test_the_source_in_the_native_module_is_this_one() -> None:
    try:
        assert cuda_source() == (CSRC / "cuda" / "fingerprint.cuh").read_text()
    except RuntimeError as error:
        pytest.skip(str(error))


def test_arguments_reach_the_kernel(tmp_path: Path) -> None:
    """Through ctypes and the driver's interface, behind which the grid emulator stands."""
    need("g++")
    path = str(tmp_path / "driver.so")
    run("g++", "-std=c++17", "-O1", "-shared", "-fPIC", "tests/emulated_driver.cpp", "-o", path)
    kernel = FingerprintKernel(ctypes.CDLL(path), b"an image")
    noise = torch.randint(0, 256, (200_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    contents = [noise, noise[3:1000], noise[:0], noise[16 : 16 + 65_536], noise[8:65_549]]
    table = torch.tensor([(content.data_ptr(), content.numel()) for content in contents])
    sums = torch.zeros((len(contents), 2), dtype=torch.int64)
    keys = (-3, 1 << 62)
    kernel.launch(table, sums, noise.numel(), keys, STREAM)
    for content, found in zip(contents, sums.numpy().view(np.uint64), strict=True):
        expected = np.empty(2, np.uint64)
        reference.fingerprint(content.numpy(), np.array(keys, np.int64).view(np.uint64), expected)
        assert found.tolist() == expected.tolist()
    with pytest.raises(RuntimeError, match=r"CUDA's driver: invalid argument \(1\)"):
        kernel.launch(table, sums, noise.numel(), keys, STREAM + 1)
    with pytest.raises(RuntimeError, match="a grid has at most"):
        kernel.launch(table, sums, 1 << 50, keys, STREAM)
