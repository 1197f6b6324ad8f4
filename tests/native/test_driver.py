"""The C++ sources without Python around them: csrc/tests/driver.cpp and csrc/fuzz, built and run by csrc/Makefile.

Each build takes 5 to 20 seconds on two cores, hence few tests that do much each. Everything is built outside of the source tree.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
BUILD_SECONDS, RUN_SECONDS = 200, 100
FUZZ_SECONDS = 2  # for each of two fuzzers

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


def need(*programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"there is no {program}")


def run(command: list[str], seconds: float = RUN_SECONDS, **environment: str) -> str:
    """Standard output; fails with all of both outputs."""
    env = {name: value for name, value in os.environ.items() if name != "FASTCKPT_ISA"} | environment
    done = subprocess.run(command, cwd=CSRC, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        pytest.fail(
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}",
            pytrace=False,
        )
    return done.stdout


def make(build: Path, *arguments: str) -> str:
    return run(["make", "--jobs=2", "--no-print-directory", f"BUILD={build}", *arguments], BUILD_SECONDS)


def links(build: Path, compiler: str, *flags: str) -> bool:
    """Whether `compiler` can link with these flags: a sanitizer's runtime library is a package of its own."""
    command = [compiler, *flags, "-x", "c++", "-", "-o", str(build / "probe")]
    done = subprocess.run(command, input="int main() {}", capture_output=True, text=True, timeout=60, check=False)
    return done.returncode == 0


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="session")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    run([sys.executable, str(CSRC / "tests" / "make_vectors.py"), "make", str(folder)])
    return folder


def check_vectors(driver: list[str], vectors: Path, out: Path) -> None:
    run([*driver, "vectors", str(vectors), str(out)])
    run([sys.executable, str(CSRC / "tests" / "make_vectors.py"), "check", str(vectors), str(out)])


def test_driver(build: Path, vectors: Path, tmp_path: Path) -> None:
    """Streams, digests and crcs are those of NumPy and xxhash; frames are those of zstd. About 12 s, most of it compiling."""
    need("g++")
    make(build, "driver", "CXX=g++")
    driver = [str(build / "driver")]
    run(driver)
    check_vectors(driver, vectors, tmp_path / "out")


def test_with_sanitizers(build: Path, vectors: Path, tmp_path: Path) -> None:
    """Right and damaged bytes in buffers without a byte to spare, for each instruction set. About 25 s: sanitizers slow all of it down."""
    need("g++")
    if not links(build, "g++", "-fsanitize=address,undefined"):
        pytest.skip("the runtime libraries of AddressSanitizer and UndefinedBehaviorSanitizer are missing")
    make(build, "driver-asan", "CXX=g++")
    driver = [str(build / "driver-asan")]
    for arguments in (["arguments"], ["random", "2", "6"], ["hostile", "2", "150"]):
        run([*driver, *arguments])
    check_vectors(driver, vectors, tmp_path / "out")


def test_aarch64(build: Path, vectors: Path, tmp_path: Path) -> None:
    """The plain C++ of another processor gives the same bytes. About 20 s: the processor is emulated."""
    need("aarch64-linux-gnu-g++")
    emulator = [] if platform.machine() == "aarch64" else ["qemu-aarch64"]
    need(*emulator)
    make(build, "driver-aarch64")
    driver = [*emulator, str(build / "driver-aarch64")]
    for arguments in (["arguments"], ["random", "3", "2"], ["hostile", "3", "40"]):
        run([*driver, *arguments])
    check_vectors(driver, vectors, tmp_path / "out")


def test_fuzzers(build: Path) -> None:
    """Four seconds of libFuzzer, and 15 of clang: what it finds in that time would be found by nearly any damaged file."""
    need("clang++", "g++")
    if not links(build, "clang++", "-fsanitize=address,undefined"):
        pytest.skip("clang's sanitizer runtime libraries are missing")
    make(build, "fuzz", f"FUZZ_SECONDS={FUZZ_SECONDS}", "CXX=g++", "CLANGXX=clang++")
