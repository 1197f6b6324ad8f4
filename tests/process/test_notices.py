"""Notices by signal, and the metadata server as a program."""

from __future__ import annotations

import os
import subprocess
import sys

from fastckpt.spot import Ec2Source
from fastckpt.spot.sources.imds import ImdsClient

_CHILD = """
import os, signal, sys
from fastckpt.spot import SignalSource, Watcher
seen = []
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
before = signal.getsignal(signal.SIGTERM)
watcher = Watcher([SignalSource(grace_s=7)])
watcher.start()
assert watcher.final is None
os.kill(os.getpid(), signal.SIGTERM)
notice = watcher.final
assert notice.kind == "signal" and notice.source == "SIGTERM", notice
assert seen == [signal.SIGTERM], "the handler that was there is called too"
pid = os.fork()
if pid == 0:
    os._exit(watcher.final is not None)
assert os.waitpid(pid, 0)[1] == 0, "a forked child takes its parent's notice for its own"
watcher.close()
assert signal.getsignal(signal.SIGTERM) is before
"""


def test_signals_are_chained_and_put_back() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _CHILD], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_server_as_a_program() -> None:
    command = [sys.executable, "-m", "fastckpt.testing.metadata_server", "--port", "0", "--notice-after", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as child:
        assert child.stdout is not None
        url = child.stdout.readline().strip().partition("=")[2]
        assert child.stdout.readline() == "notice posted\n"
        assert Ec2Source(ImdsClient(url)).poll(0.0)[0].kind == "terminate"
        child.terminate()
