"""SIGKILL at every step of a save and at random: what is at the path is always the old state or the new one."""

from __future__ import annotations

import json
import os
import platform
import random
import select
import signal
import time
from collections import Counter as Tally
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from tests.crash import tools

OLD, NEW = 1, 2
RESULTS = Path(__file__).parent / "results" / "kill.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.fckpt"
    fastckpt.save(tools.state(OLD), path)
    return path


@pytest.mark.parametrize("tmpfile", [True, False], ids=["unnamed", "named"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_at_every_operation(path: Path, when: str, tmpfile: bool) -> None:
    names = tools.operations(path, tmpfile=tmpfile)
    assert names.count("write") >= 6
    assert names.count("fsync") == 2
    assert ("link" in names) == tmpfile
    assert "rename" in names
    renamed = names.index("rename")
    visible = range(names.index("link") if tmpfile else names.index("open") + 1, renamed + 1)
    for n in range(len(names)):
        fastckpt.save(tools.state(OLD), path)

        def child(n: int = n) -> None:
            counter = tools.Counter(n, tools.kill_self)
            hooks: dict[str, Any] = {when: counter}
            with tools.watched(tmpfile=tmpfile, **hooks):
                fastckpt.save(tools.state(NEW), path)

        if when == "after" and not tmpfile and n == names.index("open"):
            continue  # this open is made to fail: there is no "after"
        # An open that fails is not counted afterwards.
        shift = 1 if when == "after" and not tmpfile and n > names.index("open") else 0
        status = tools.exit_status(tools.fork(lambda n=n - shift, child=child: child(n)))
        assert status == -signal.SIGKILL, (n, names[n])
        applied = n + (when == "after")
        assert tools.loaded(path) == (NEW if applied > renamed else OLD), (n, names[n])
        left = tools.debris(path)
        # `applied` operations had happened: a name lies there from link (or the named open) until rename, and at no other time.
        assert len(left) == (1 if applied - 1 in visible and applied <= renamed else 0), (n, names[n], left)
        for name in left:
            (path.parent / name).unlink()
    pid = tools.fork(lambda: fastckpt.save(tools.state(NEW), path))
    assert tools.exit_status(pid) == 0
    assert tools.loaded(path) == NEW


def test_a_killed_first_save_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "first.fckpt"
    names = tools.operations(tmp_path / "model.fckpt")
    (tmp_path / "model.fckpt").unlink()
    for n in range(names.index("link")):

        def child(n: int = n) -> None:
            with tools.watched(tools.Counter(n, tools.kill_self)):
                fastckpt.save(tools.state(NEW), path)

        assert tools.exit_status(tools.fork(child)) == -signal.SIGKILL
        assert os.listdir(tmp_path) == [], (n, names[n])


class Saver:
    """A child that saves 2, 3, … to the path and reports each once save has returned."""

    def __init__(self, path: Path, *, tmpfile: bool, threads: int, rows: int) -> None:
        self.acknowledged = OLD
        self.started = OLD
        self._unread = b""
        self._pipe, theirs = os.pipe()

        def child() -> None:
            os.environ["FASTCKPT_THREADS"] = str(threads)
            number = OLD
            with tools.watched(tmpfile=tmpfile, write_bytes=16 << 20 if threads > 1 else 4 << 10):
                while True:
                    number += 1
                    os.write(theirs, f"s{number}\n".encode())
                    fastckpt.save(tools.state(number, rows), path)
                    os.write(theirs, f"a{number}\n".encode())

        self._pid = tools.fork(child)
        os.close(theirs)

    def _note(self, data: bytes) -> None:
        self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            if line[:1] == b"a":
                self.acknowledged = int(line[1:])
            else:
                self.started = int(line[1:])

    def kill(self, wait_acknowledged: int, then_s: float) -> None:
        """Read until so many saves were acknowledged, for `then_s` longer, then kill; read what was said before death."""
        while self.acknowledged < OLD + wait_acknowledged:
            data = os.read(self._pipe, 4096)
            assert data, "the saver died by itself"
            self._note(data)
        until = time.monotonic() + then_s
        while (left := until - time.monotonic()) > 0:
            if select.select([self._pipe], [], [], left)[0]:
                data = os.read(self._pipe, 4096)
                assert data, "the saver died by itself"
                self._note(data)
        os.kill(self._pid, signal.SIGKILL)
        assert tools.exit_status(self._pid) == -signal.SIGKILL
        while data := os.read(self._pipe, 4096):
            self._note(data)
        os.close(self._pipe)


def kill_at_random(path: Path, kills: int, seed: int) -> dict[str, Any]:
    """Returns figures; AssertionError at the first state that is neither the last acknowledged nor the one begun."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    tally: Tally[str] = Tally()
    for kill in range(kills):
        tmpfile, threads = rng.random() < 0.7, rng.choice((1, 1, 2))
        rows = 6000 if threads > 1 else 120  # 4.8 MB: more than is written without threads
        fastckpt.save(tools.state(OLD, rows), path)
        saver = Saver(path, tmpfile=tmpfile, threads=threads, rows=rows)
        saver.kill(rng.randrange(2), rng.random() * (0.2 if threads > 1 else 0.03))
        found = tools.loaded(path, rows)
        where = f"kill {kill} of seed {seed}: found {found}, acknowledged {saver.acknowledged}, begun {saver.started}"
        assert found in (saver.acknowledged, saver.started), where
        left = tools.debris(path)
        assert len(left) <= 1, where
        for name in left:
            (path.parent / name).unlink()
        inside = saver.started > saver.acknowledged
        tally["kills"] += 1
        tally["inside a save"] += inside
        tally["new state, not yet acknowledged"] += found > saver.acknowledged
        tally["old state"] += inside and found == saver.acknowledged
        tally["saves acknowledged"] += saver.acknowledged - OLD
        tally["temporary left, O_TMPFILE"] += bool(left) and tmpfile
        tally["temporary left, named from the start"] += bool(left) and not tmpfile
        tally["with threads"] += threads > 1
        tally["without O_TMPFILE"] += not tmpfile
    return dict(tally)


# About 3 s: 15 savers, each with a few saves of up to 5 MB and their fsyncs.
def test_kill_at_random(path: Path) -> None:
    figures = kill_at_random(path, 15, random.randrange(1 << 32))
    print(figures)
    assert figures["kills"] == 15
    assert figures["inside a save"] >= 2  # or the kills say nothing


@pytest.mark.slow  # 300 savers: about a minute
def test_kill_300_times(path: Path) -> None:
    seed = random.randrange(1 << 32)
    started = time.monotonic()
    figures = kill_at_random(path, 300, seed)
    assert figures["inside a save"] >= 100
    assert figures["old state"] >= 50
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {
            "fastckpt": fastckpt.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
        },
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "damaged or lost states": 0,  # one would have failed the test above
        "figures": figures,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
