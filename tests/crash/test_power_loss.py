"""Power loss at every step of a save over a good file: every state that a disk may be left in loads, whole, as the old or the new one."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastckpt
from fastckpt.host import files
from tests.crash import tools
from tests.crash.power import Op, Recorder, states_after_power_loss

OLD, NEW = 1, 2
NAME = "model.fckpt"


@dataclass
class Recording:
    old: bytes
    ops: list[Op]


def record(tmp_path: Path, *, tmpfile: bool) -> Recording:
    path = tmp_path / NAME
    fastckpt.save(tools.state(OLD), path)
    old = path.read_bytes()
    recorder = Recorder(tmp_path)
    with tools.watched(after=recorder, tmpfile=tmpfile):
        fastckpt.save(tools.state(NEW), path)
    recorder.ops.append(Op("returned"))
    assert b"".join(op.data for op in recorder.ops) == path.read_bytes(), "the recording lacks a write"
    return Recording(old, recorder.ops)


@dataclass
class Verdict:
    problems: list[str]
    states: int
    """Pairs of a moment and a content."""
    contents: int
    found: set[int]


def judge(recording: Recording) -> Verdict:
    """Load every state that the model makes possible."""
    known: dict[bytes | None, str | int] = {None: "no file"}
    verdict = Verdict([], 0, 0, set())
    for done, returned, content in states_after_power_loss(recording.ops, NAME, recording.old):
        verdict.states += 1
        if content not in known:
            assert content is not None
            try:
                known[content] = tools.check_state(fastckpt.load(io.BytesIO(content)))
            except fastckpt.CheckpointError as error:
                known[content] = f"{type(error).__name__} ({len(content)} bytes)"
        result = known[content]
        if isinstance(result, int):
            verdict.found.add(result)
        if result != NEW and (returned or result != OLD):
            last = recording.ops[done - 1].kind if done else "start"
            verdict.problems.append(
                f"after {done} operations ({last}), save {'' if returned else 'not '}returned: {result}"
            )
    verdict.contents = len(known)
    return verdict


def without(kind: str) -> Callable[[list[Op]], list[Op]]:
    def change(ops: list[Op]) -> list[Op]:
        at = max(i for i, op in enumerate(ops) if op.kind == kind)
        return ops[:at] + ops[at + 1 :]

    return change


def fsync_after_rename(ops: list[Op]) -> list[Op]:
    kinds = [op.kind for op in ops]
    sync, rename = kinds.index("fsync"), kinds.index("rename")
    return [*ops[:sync], *ops[sync + 1 : rename + 1], ops[sync], *ops[rename + 1 :]]


def directory_before_rename(ops: list[Op]) -> list[Op]:
    kinds = [op.kind for op in ops]
    rename, sync = kinds.index("rename"), kinds.index("fsyncdir")
    return [*ops[:rename], ops[sync], ops[rename], *ops[rename + 1 : sync], *ops[sync + 1 :]]


def write_after_fsync(ops: list[Op]) -> list[Op]:
    kinds = [op.kind for op in ops]
    sync, last = kinds.index("fsync"), max(i for i, kind in enumerate(kinds) if kind == "write")
    return [*ops[:last], *ops[last + 1 : sync + 1], ops[last], *ops[sync + 1 :]]


def return_before_directory(ops: list[Op]) -> list[Op]:
    return [*(op for op in ops if op.kind not in ("fsyncdir", "returned")), Op("returned"), Op("fsyncdir")]


def unlink_first(ops: list[Op]) -> list[Op]:
    rename = [op.kind for op in ops].index("rename")
    return [*ops[:rename], Op("unlink", name=NAME), *ops[rename:]]


def in_place(ops: list[Op]) -> list[Op]:
    """What torch.save does: the name is the target from the start."""
    made = next(op for op in ops if op.kind == "create")
    kept = [op for op in ops if op.kind in ("write", "fsync", "returned")]
    return [Op("create", made.file, name=NAME), *kept[:-1], Op("fsyncdir"), kept[-1]]


@pytest.mark.parametrize("tmpfile", [True, False], ids=["unnamed", "named"])
def test_every_state_after_power_loss_is_old_or_new(tmp_path: Path, tmpfile: bool) -> None:
    recording = record(tmp_path, tmpfile=tmpfile)
    kinds = [op.kind for op in recording.ops if op.kind != "write"]
    assert kinds == ["create", "fsync", *(["link"] if tmpfile else []), "rename", "fsyncdir", "returned"]
    verdict = judge(recording)
    print(f"{verdict.states} states, {verdict.contents} different contents")
    assert verdict.problems == []
    assert verdict.found == {OLD, NEW}


@pytest.mark.parametrize("tmpfile", [True, False], ids=["unnamed", "named"])
@pytest.mark.parametrize(
    "break_it",
    [
        without("fsync"),
        without("fsyncdir"),
        fsync_after_rename,
        directory_before_rename,
        write_after_fsync,
        return_before_directory,
        unlink_first,
        in_place,
    ],
    ids=["no fsync", "no fsyncdir", "fsync late", "fsyncdir early", "write late", "return early", "unlink", "in place"],
)
def test_the_detector_reports_each_mistake(
    tmp_path: Path, break_it: Callable[[list[Op]], list[Op]], tmpfile: bool
) -> None:
    recording = record(tmp_path, tmpfile=tmpfile)
    recording.ops = break_it(recording.ops)
    verdict = judge(recording)
    print(len(verdict.problems), verdict.problems[:2])
    assert verdict.problems
    if break_it in (return_before_directory, directory_before_rename) or break_it.__qualname__.startswith("without"):
        assert any("save returned" in problem for problem in verdict.problems)


def test_the_detector_reports_a_mistake_in_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "sync_directory", lambda path: None)
    verdict = judge(record(tmp_path, tmpfile=True))
    assert any("save returned" in problem for problem in verdict.problems)
