"""The command line as a person and as a program meet it: in process for speed, once as a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import cli


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "a.fckpt"
    fastckpt.save({"w": torch.randn(1000, 1000), "n": [torch.arange(5), torch.zeros(100)]}, path)
    return path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    status = cli.main([*argv, "--json"])
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, value


def test_check_of_a_whole_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, value = run_json(capsys, "check", str(checkpoint))
    assert status == cli.OK
    assert value["schema"] == "fastckpt.check/1"
    (report,) = value["checked"]
    assert report["ok"]
    assert report["raw_bytes"] == 4 * 1000 * 1000 + 5 * 8 + 100 * 4
    assert report["damage"] == []


def test_check_names_the_tensor_and_the_place(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Bytes 64… are the first chunk: canonical order puts "n" before "w", so a byte in the middle belongs to "w".
    flip(checkpoint, checkpoint.stat().st_size // 2)
    status, value = run_json(capsys, "check", str(checkpoint))
    assert status == cli.FOUND_DAMAGE
    (damage,) = value["checked"][0]["damage"]
    assert damage["part"] == "payload"
    assert damage["tensors"] == ["w"]
    assert value["checked"][0]["tensors_lost"] == ["w"]
    assert cli.main(["check", str(checkpoint)]) == cli.FOUND_DAMAGE
    text = capsys.readouterr().out
    assert "DAMAGED" in text
    assert '"w"' in text


def test_check_goes_on_after_a_bad_file(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.fckpt"
    bad.write_bytes(checkpoint.read_bytes()[:-1])
    status, value = run_json(capsys, "check", str(bad), str(checkpoint))
    assert status == cli.FOUND_DAMAGE
    assert [report["ok"] for report in value["checked"]] == [False, True]


@pytest.mark.parametrize("command", ["check", "show"])
def test_what_never_was_ours_is_not_called_damaged(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "model.pt")
    (tmp_path / "junk.txt").write_text("not ours")
    (tmp_path / "empty").touch()
    for name in ("model.pt", "junk.txt", "empty"):
        assert cli.main([command, str(tmp_path / name)]) == cli.BAD_CHECKPOINT
        said = capsys.readouterr()
        assert said.out == ""
        assert f"{name} is no fastckpt container" in said.err


@pytest.mark.parametrize("offset", [0, -1], ids=["header", "footer"])
def test_what_has_the_magic_at_one_end_is_damaged(
    checkpoint: Path, offset: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(checkpoint, offset)
    assert cli.main(["check", str(checkpoint)]) == cli.FOUND_DAMAGE
    assert cli.main(["show", str(checkpoint)]) == cli.BAD_CHECKPOINT
    assert "is damaged" in capsys.readouterr().err
    assert "damaged" in run_json(capsys, "ls", str(checkpoint.parent))[1]["checkpoints"][0]["error"]


def test_show_lists_tensors_and_storage(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, value = run_json(capsys, "show", str(checkpoint))
    assert status == cli.OK
    assert [tensor["name"] for tensor in value["tensors"]] == [["n", 0], ["n", 1], ["w"]]
    assert {group["transform"] for group in value["transforms"]} == {"RAW", "CONST", "ROT"}
    assert value["writer"]["version"] == fastckpt.__version__
    assert cli.main(["show", str(checkpoint)]) == cli.OK
    out = capsys.readouterr().out
    assert "[1000, 1000]" in out
    assert "ROT" in out


def test_ls_shows_folders_and_marks_damage(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("not ours")
    broken = tmp_path / "broken.fckpt"
    broken.write_bytes(checkpoint.read_bytes()[:5000])
    status, value = run_json(capsys, "ls", str(tmp_path))
    assert status == cli.OK
    found = {Path(item["path"]).name: item["error"] for item in value["checkpoints"]}
    assert found["a.fckpt"] is None
    assert "damaged" in found["broken.fckpt"]
    assert len(found) == 2


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["show", "{tmp}/missing"], cli.OS_ERROR),
        (["check", "{tmp}/missing"], cli.OS_ERROR),
        (["show", "{tmp}"], cli.OS_ERROR),
        (["show", "{tmp}/text"], cli.BAD_CHECKPOINT),
        (["show", "{tmp}/empty"], cli.BAD_CHECKPOINT),
        (["ls", "{tmp}/text"], cli.BAD_CHECKPOINT),
    ],
)
def test_exit_status(argv: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello, this is no checkpoint")
    (tmp_path / "empty").write_bytes(b"")
    arguments = [text.replace("{tmp}", str(tmp_path)) for text in argv]
    assert cli.main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("fastckpt: ")
    assert "Traceback" not in error
    assert run_json(capsys, *arguments)[1]["exit"] == status


def test_wrong_usage() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["frobnicate"])
    assert caught.value.code == cli.USAGE


def test_as_a_process_with_a_closed_pipe(checkpoint: Path) -> None:
    # Over 2 s: a child imports torch.
    command = f"{sys.executable} -m fastckpt show {checkpoint} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == cli.OK
    assert done.stderr == ""
    assert done.stdout.startswith("tensor")


def test_help_has_the_exit_status_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "130  interrupted" in capsys.readouterr().out
