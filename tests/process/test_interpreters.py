"""The native module in an interpreter with a GIL of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

_native: Any = pytest.importorskip("fastckpt._native", reason="no native kernels: there was no compiler")

INSIDE = """
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("fastckpt._native", {path!r})
spec = importlib.util.spec_from_loader("fastckpt._native", loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
assert module.crc64nvme(b"123456789") == 0xAE8B14860A799888
stored, raw = bytearray(9000), bytes(range(240)) * 10
n, crc, digest = module.encode(raw, None, 3, 2, 0, stored)
back = bytearray(len(raw))
assert module.decode(bytes(stored[:n]), None, 3, 2, 0, back) == digest
assert back == raw
"""
# The modules are private: public ones come with Python 3.14. Where another interpreter was made, PyGILState_Check says yes to everybody for
# the rest of the process, and torch's autograd refuses to run: so this has a process of its own.
OUTSIDE = """
import importlib, sys
for name in ("_interpreters", "_xxsubinterpreters"):
    try:
        interpreters = importlib.import_module(name)
        break
    except ImportError:
        continue
else:
    sys.exit("none")
identity = interpreters.create()
failed = interpreters.run_string(identity, sys.argv[1])
interpreters.destroy(identity)
sys.exit(None if failed is None else f"failed: {failed}")
"""


def test_an_interpreter_with_a_gil_of_its_own_can_load_it() -> None:
    """From Python 3.12 on such an interpreter refuses modules that do not say that they are made for it."""
    command = [sys.executable, "-c", OUTSIDE, INSIDE.format(path=_native.__file__)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.stderr == "none\n":
        pytest.skip("this Python has no interpreters to make")
    assert done.returncode == 0, done.stderr
