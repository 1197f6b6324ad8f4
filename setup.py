"""Builds the C++ kernels, `fastckpt._native`. All else about the package stands in pyproject.toml.

The kernels are optional: without them fastckpt uses slower ones; each reads what the others write. Environment variables:

    FASTCKPT_NO_NATIVE=1                  do not build them
    FASTCKPT_REQUIRE_NATIVE=1             if they cannot be built, fail
    FASTCKPT_SANITIZE=address,undefined   build them with these sanitizers, for tests
"""

import os
import sys
import textwrap
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


if sys.byteorder != "little":  # neither the format nor the kernels swap bytes; `import fastckpt` would refuse, too
    raise SystemExit(
        f"fastckpt runs on little-endian machines only, and this one is {sys.byteorder}-endian: nothing is built."
    )

REQUIRED = is_set("FASTCKPT_REQUIRE_NATIVE")


class BuildNative(build_ext):
    """build_ext that survives a missing compiler, says so, and then leaves no older build in place."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # the flags come from the environment, which no time stamp shows

    def build_extension(self, ext: Extension) -> None:
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception as error:
            if REQUIRED:
                raise
            reason = textwrap.shorten(str(error), 100) or type(error).__name__
            print(
                f"fastckpt: the C++ kernels were not built ({reason}); the Numba and NumPy kernels are used instead: "
                "the same checkpoints, more slowly.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:  # unlinked, not overwritten: a running process may have it mapped
            Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def native_extension() -> Extension:
    # For GCC and Clang. Other compilers refuse the sources and get the fallback.
    # GCC 12 warns of its own AVX-512 headers: __Y may be used uninitialized.
    compile_args = [*Path("csrc/compile_flags.txt").read_text().split(), "-Wno-maybe-uninitialized"]
    link_args = []
    if sanitizers := os.environ.get("FASTCKPT_SANITIZE"):
        compile_args += ["-O1", "-g", "-fno-omit-frame-pointer", "-UNDEBUG"]  # asserts about slack, too
        compile_args += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        link_args += [f"-fsanitize={sanitizers}"]
    else:
        # Aligned, because the same loop (AVX2, SUBPACK's decoder) lost 18 % when a change elsewhere moved it by 16 bytes.
        compile_args += ["-O3", "-DNDEBUG", "-falign-functions=64"]
    return Extension(
        "fastckpt._native",
        sources=sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h") + glob("csrc/*.inl") + glob("csrc/cuda/*.cuh") + ["csrc/compile_flags.txt"]),
        language="c++",
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        optional=not REQUIRED,
    )


setup(
    ext_modules=[] if is_set("FASTCKPT_NO_NATIVE") else [native_extension()],
    cmdclass={"build_ext": BuildNative},
)
