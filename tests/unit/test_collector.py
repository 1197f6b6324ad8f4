"""Python's collector is held off for a while, and never for good."""

from __future__ import annotations

import gc
import io
import os
import threading

import pytest
import torch

import fastckpt
from fastckpt.host import cycle_collector


@pytest.fixture(autouse=True)
def _enabled() -> None:
    assert gc.isenabled()


def test_it_runs_again_afterwards_whatever_happens() -> None:
    def interrupted() -> None:
        with cycle_collector.held_off():
            assert not gc.isenabled()
            with cycle_collector.held_off():
                pass
            assert not gc.isenabled(), "the inner one let it run"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gc.isenabled()


def test_who_has_disabled_it_finds_it_disabled() -> None:
    gc.disable()
    try:
        with cycle_collector.held_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_last_of_several_threads_lets_it_run() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with cycle_collector.held_off():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with cycle_collector.held_off():
        pass
    assert not gc.isenabled(), "the other thread is still at it"
    leave.set()
    thread.join()
    assert gc.isenabled()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_a_fork_has_it() -> None:
    """No thread of the parent is there to let it run again."""
    with cycle_collector.held_off():
        child = os.fork()
        if not child:
            right = gc.isenabled()
            with cycle_collector.held_off():
                right = right and not gc.isenabled()
            os._exit(0 if right and gc.isenabled() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()


def test_saving_and_loading_leave_it_on() -> None:
    file = io.BytesIO()
    fastckpt.save({"a": torch.ones(2)}, file)
    with pytest.raises(Exception, match=r"pickle|local object"):
        fastckpt.save({"a": lambda: None}, io.BytesIO())
    file.seek(0)
    fastckpt.load(file)
    assert gc.isenabled()
