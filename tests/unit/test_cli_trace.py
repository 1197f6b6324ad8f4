"""fastckpt trace as a person and as a program meet it."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import cli, events


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with events.record(tmp_path / "run.jsonl"):
        fastckpt.save({"a": torch.randn(1_000_000)}, tmp_path / "x.fckpt")
        with fastckpt.Checkpointer(tmp_path / "r", {"m": torch.nn.Linear(500, 500)}, spot=None) as ckpt:
            ckpt.save_now(12).wait()
        fastckpt.load(tmp_path / "x.fckpt")
    return tmp_path / "run.jsonl"


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = cli.main([*argv, "--json"])
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, value


def test_a_table_a_trace_and_a_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["trace", str(run)]) == cli.OK
    out, err = capsys.readouterr()
    assert "bottleneck" in out
    assert "step 12" in out
    assert "x.fckpt" in out
    assert "ui.perfetto.dev" in err
    trace = json.loads((run.parent / "run.trace.json").read_bytes())
    assert {one["ph"] for one in trace["traceEvents"]} == {"M", "X", "C", "i"}
    assert (run.parent / "run.png").read_bytes().startswith(b"\x89PNG")


def test_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, value = run_json(capsys, "trace", str(run), "--no-png")
    assert (status, value["schema"], value["png"]) == (cli.OK, "fastckpt.trace/1", None)
    assert [(save["step"], save["state"]) for save in value["saves"]] == [(None, "written"), (12, "durable")]
    assert value["saves"][0]["stages"]["encode"]["busy_s"] > 0
    assert value["loads"][0]["raw_bytes"] == 4_000_000
    assert Path(value["trace"]).exists()
    assert not (run.parent / "run.png").exists()


def test_several_recordings_are_merged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(run.read_bytes())
    status, value = run_json(capsys, "trace", str(run), str(other), "--no-png", "--out", str(tmp_path / "both.json"))
    assert status == cli.OK
    assert len(value["processes"]) == 2
    assert len(value["saves"]) == 4
    names = [
        e["args"]["name"]
        for e in json.loads((tmp_path / "both.json").read_bytes())["traceEvents"]
        if e["name"] == "process_name"
    ]
    assert ["run.jsonl" in names[0], "other.jsonl" in names[1]] == [True, True]


def test_out_is_a_folder_or_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "d").mkdir()
    assert cli.main(["trace", str(run), "--out", str(tmp_path / "d")]) == cli.OK
    assert cli.main(["trace", str(run), "--out", str(tmp_path / "d" / "b.trace.json")]) == cli.OK
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert names == ["b.png", "b.trace.json", "run.png", "run.trace.json"]
    assert cli.main(["trace", str(run), "--out", str(tmp_path / "d" / "b.txt")]) == cli.USAGE
    assert cli.main(["trace", str(run), "--out", str(tmp_path / "none" / "b.json")]) == cli.OS_ERROR
    assert cli.main(["trace", "s3://bucket/run.jsonl"]) == cli.USAGE


def test_existing_files_are_replaced_only_with_force(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = run.parent / "run.png"
    picture.write_text("somebody's plot")
    assert cli.main(["trace", str(run)]) == cli.USAGE
    assert "--force" in capsys.readouterr().err
    assert picture.read_text() == "somebody's plot"
    assert not (run.parent / "run.trace.json").exists()
    assert cli.main(["trace", str(run), "--no-png"]) == cli.OK
    assert cli.main(["trace", str(run), "--no-png", "--force"]) == cli.OK
    assert picture.read_text() == "somebody's plot"


def test_without_matplotlib_the_trace_is_written_all_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., Any] = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert cli.main(["trace", str(run)]) == cli.OK
    assert "pip install matplotlib" in capsys.readouterr().err
    assert (run.parent / "run.trace.json").exists()
    assert not (run.parent / "run.png").exists()


def test_a_cut_recording_is_read_and_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_bytes(run.read_bytes()[:-5])
    assert cli.main(["trace", str(run), "--no-png"]) == cli.OK
    assert "last line was cut" in capsys.readouterr().err
    status, value = run_json(capsys, "trace", str(run), "--no-png", "--force")
    assert status == cli.OK
    assert "last line was cut" in value["notes"][0]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (None, cli.OS_ERROR),
        ("", cli.BAD_CHECKPOINT),
        ("hello\n", cli.BAD_CHECKPOINT),
        ('{"fastckpt_recording": 99}\n', cli.BAD_CHECKPOINT),
    ],
)
def test_exit_status(text: str | None, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    assert cli.main(["trace", str(path)]) == status
    assert capsys.readouterr().err.startswith("fastckpt: ")
    assert run_json(capsys, "trace", str(path))[1]["exit"] == status
    assert not (tmp_path / "bad.trace.json").exists()


def test_what_a_recording_says_reaches_no_terminal_unescaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with events.record(tmp_path / "run.jsonl"):
        events.emit(events.SaveFailed(target="\x1b[2Jevil", error=RuntimeError("\x1b]0;title\x07")))
    assert cli.main(["trace", str(tmp_path / "run.jsonl"), "--no-png"]) == cli.OK
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "evil" in out
