"""The shaped link shapes: rate and delay are lower bounds of what is measured; nothing of it is left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from fastckpt.testing.null_server import null_server
from tests.support import shaped_link as module
from tests.support.shaped_link import shaped_link, why_not

# Connects, sends a body of 1 MB, reads it again; prints the seconds of each.
CLIENT = """
import http.client, json, sys, time
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
seconds = []
def timed(work):
    started = time.monotonic()
    work()
    seconds.append(time.monotonic() - started)
def ask(method, path, body=None):
    connection.request(method, path, body)
    answer = connection.getresponse()
    assert answer.status == 200, answer.status
    answer.read()
timed(connection.connect)
timed(lambda: ask("PUT", "/any/x", bytes(1_000_000)))
timed(lambda: ask("GET", "/any/x"))
print(json.dumps(seconds))
"""


@pytest.fixture(autouse=True)
def possible() -> None:
    if reason := why_not():
        pytest.skip(f"no shaped link: {reason}")


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if re.match(rf"fastckpt-link\d+-{os.getpid()}\b", line)]


def test_rate_and_delay_are_what_was_asked_for() -> None:
    """50 ms and 8 Mbit/s up, 16 down: 1 MB takes a second, and half of one; what is unshaped takes 1 ms. The burst of 128 KiB is free."""
    with (
        shaped_link(bits_per_s=8e6, down_bits_per_s=16e6, round_trip_s=0.05) as link,
        null_server(port=link.port, prefix=link.prefix) as server,
    ):
        command = [*link.prefix, sys.executable, "-c", CLIENT, str(server.port)]
        connect_s, put_s, get_s = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert server.counts()["bytes_received"] == 1_000_000
    assert connect_s > 0.045
    assert put_s > 0.8
    assert 0.4 < get_s < put_s


def test_other_ports_are_not_shaped() -> None:
    with shaped_link(bits_per_s=1e6, round_trip_s=1.0) as link, null_server(prefix=link.prefix) as server:
        command = [*link.prefix, sys.executable, "-c", CLIENT, str(server.port)]
        seconds = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert max(seconds) < 1.0  # shaped: 8 s and more; this takes 2 ms


def fails_in(processes: list[subprocess.Popen[str]]) -> None:
    with shaped_link(bits_per_s=1e9, round_trip_s=0.01) as link:
        assert namespaces() == [link.namespace]
        command = [*link.prefix, "sh", "-c", "echo inside; exec sleep 1000"]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[0].stdout is not None
        assert processes[0].stdout.readline() == "inside\n"
        raise ZeroDivisionError


def test_nothing_is_left_after_a_failure() -> None:
    processes: list[subprocess.Popen[str]] = []
    with pytest.raises(ZeroDivisionError):
        fails_in(processes)
    with processes[0] as left:
        assert left.wait(60) == -9
    assert namespaces() == []


def test_several_links_at_once() -> None:
    with shaped_link(bits_per_s=1e9, round_trip_s=0.0) as one, shaped_link(bits_per_s=1e9, round_trip_s=0.01) as two:
        assert sorted(namespaces()) == sorted([one.namespace, two.namespace])


def test_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAMS", ("ip", "no-such-program"))
    assert "no-such-program" in (why_not() or "")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert "root" in (why_not() or "")
