"""How tests share two processes: files stay together, and one that runs alone waits for the others, who then wait for it."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path

import pytest

from tests.support.parallel import Turns, scope_of

SHORT_S = 20.0


def is_waited_for(folder: Path) -> bool:
    """Somebody holds the gate: who waits for its turn."""
    with (folder / "gate").open("rb") as gate:
        try:
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def until_waited_for(folder: Path) -> None:
    """Other processes' locks can only be polled."""
    deadline = time.monotonic() + SHORT_S
    while not is_waited_for(folder):
        assert time.monotonic() < deadline


class Process(threading.Thread):
    """Runs one test; its locks are files opened anew, as another process's are."""

    def __init__(self, folder: Path, *, alone: bool) -> None:
        super().__init__()
        self.turns, self.alone = Turns(folder), alone
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with self.turns.turn(alone=self.alone):
            self.begun.set()
            assert self.may_end.wait(SHORT_S)

    def end(self) -> None:
        self.may_end.set()
        self.join(SHORT_S)
        self.turns.close()


def test_a_test_that_runs_alone_waits_for_others_and_is_not_overtaken(tmp_path: Path) -> None:
    first, second = (Process(tmp_path, alone=False) for _ in range(2))
    assert first.begun.wait(SHORT_S)
    assert second.begun.wait(SHORT_S), "two ordinary ones run at once"
    alone = Process(tmp_path, alone=True)
    until_waited_for(tmp_path)
    third = Process(tmp_path, alone=False)
    first.end()
    assert not alone.begun.is_set()
    assert not third.begun.is_set(), "it would keep `alone` waiting for as long as tests begin"
    second.end()
    assert alone.begun.wait(SHORT_S)
    assert not third.begun.is_set()
    alone.end()
    assert third.begun.wait(SHORT_S)
    third.end()


def test_a_test_that_fails_ends_its_turn(tmp_path: Path) -> None:
    turns = Turns(tmp_path)
    with pytest.raises(KeyError), turns.turn(alone=True):
        raise KeyError
    other = Process(tmp_path, alone=True)
    assert other.begun.wait(SHORT_S)
    other.end()
    turns.close()


def test_files_stay_together() -> None:
    assert scope_of("tests/unit/test_x.py::test_a[1]") == scope_of("tests/unit/test_x.py::test_b")
    assert scope_of("tests/unit/test_x.py::test_a") != scope_of("tests/unit/test_y.py::test_a")
    assert scope_of("tests/s3/test_x.py::test_a") == scope_of("tests/s3/test_y.py::test_a"), "one server"
    names = [f"tests/fakegpu/test_fakegpu.py::test_the_suite[{name}.py]" for name in "ab"]
    assert scope_of(names[0]) != scope_of(names[1])
