"""Scripts in a process of their own that costs 0.1 s instead of two: forked from a server that has imported torch, before any thread began.

Not for tests of imports, signals, exit codes, kills, inherited descriptors or the interpreter's end: those start a real Python.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
import warnings
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock


def run_forked(script: str, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """As `python -W error -c SCRIPT ARGUMENTS` would, both outputs caught. TimeoutExpired after it has been killed."""
    context = _context()
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name) / "out", Path(name) / "err"
        process = context.Process(target=_run, args=(textwrap.dedent(script), arguments, str(out), str(err)))
        process.start()
        process.join(timeout_s)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(script, timeout_s, out.read_bytes(), err.read_bytes())
        process.close()
        return subprocess.CompletedProcess(
            ["-c", *arguments], code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        )


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    """The server is started by the first script, and ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fastckpt", __name__])
    # A fork would lose the threads that OpenBLAS, which comes with NumPy, starts when it is imported; Python warns of that.
    with mock.patch.dict(os.environ, OPENBLAS_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def _run(script: str, arguments: tuple[str, ...], out: str, err: str) -> None:
    """In the child. What the script raises, multiprocessing writes to stderr; the status is then 1."""
    for descriptor, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["-c", *arguments]
    warnings.simplefilter("error")
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
