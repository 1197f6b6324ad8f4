"""Recordings that the environment asks for, to the end of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastckpt
from fastckpt.trace import read

ROOT = Path(fastckpt.__file__).parents[1]


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Over a second: the child imports torch.
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True, text=True)


SAVE = "import torch, fastckpt; fastckpt.save_async({'a': torch.randn(3_000_000)}, 'x.fckpt')"


def test_the_environment_records_a_process_to_its_end(tmp_path: Path) -> None:
    # Nothing waits for the save: what its thread does after the main thread has ended is recorded too.
    done = python(f"import os; os.chdir({str(tmp_path)!r}); {SAVE}", FASTCKPT_TRACE=str(tmp_path / "run-{rank}.jsonl"))
    assert done.stderr == ""
    found = read(tmp_path / "run-0.jsonl")
    assert found.events[-1].kind == "SaveFinished"
    assert not found.notes


def test_an_impossible_path_in_the_environment_is_one_warning(tmp_path: Path) -> None:
    done = python(f"import os; os.chdir({str(tmp_path)!r}); {SAVE}", FASTCKPT_TRACE=str(tmp_path / "none" / "x"))
    assert done.stderr.count("FASTCKPT_TRACE: events are not recorded: FileNotFoundError") == 1
    assert (tmp_path / "x.fckpt").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_writes_nothing_into_its_parents_recording(tmp_path: Path) -> None:
    program = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from fastckpt import events
with events.record({str(tmp_path / "own.jsonl")!r}):
    events.emit(events.SaveDeferred(target="parent", step=1, waiting=0))
    if not (child := os.fork()):
        events.emit(events.SaveDeferred(target="child", step=2, waiting=0))
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    events.emit(events.SaveDeferred(target="parent", step=3, waiting=0))
"""
    python(program, FASTCKPT_TRACE=str(tmp_path / "all.jsonl"))
    assert [event.step() for event in read(tmp_path / "own.jsonl").events] == [1, 3]
    assert [event.step() for event in read(tmp_path / "all.jsonl").events] == [1, 3]
    assert [event.step() for event in read(tmp_path / "all-1.jsonl").events] == [2]
