"""Exit statuses, what the environment breaks, and that no name of a checkpoint reaches the terminal as it is."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import cli
from fastckpt.cli import output, target
from fastckpt.cli.output import clean
from fastckpt.errors import NoCheckpointError
from fastckpt.format.keys import CheckpointId
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from fastckpt.writing.rank import SaveAsked
from tests.support.command_line import run, run_json
from tests.support.repositories import IN_PARALLEL, flip, keys_of, save_steps
from tests.support.states import sealed

# what goes wrong


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["prune", "{tmp}/none", "--keep-last", "1", "--run-is-stopped"], cli.OS_ERROR),
        (["prune", "{tmp}", "--keep-last", "1", "--run-is-stopped"], cli.BAD_CHECKPOINT),
        (["restore", "{tmp}", "--out", "{tmp}/x"], cli.BAD_CHECKPOINT),
        (["restore", "{tmp}/none", "--out", "{tmp}/x"], cli.OS_ERROR),
        (["salvage", "{tmp}/text", "--out", "{tmp}/x"], cli.BAD_CHECKPOINT),
        (["show", "{tmp}/text", "--step", "3"], cli.USAGE),
        (["ls", "abfs://bucket/x"], cli.USAGE),
        (["show", "s4://bucket/x"], cli.USAGE),
        (["check", "s3:///x"], cli.USAGE),
        (["ls", "file://host/x"], cli.USAGE),
        (["ls", "s3://bucket/x", "--endpoint-url", "foo"], cli.USAGE),
        (["check", "{tmp}/run", "--endpoint-url", "http://host:port"], cli.USAGE),
        (["analyze", "{tmp}"], cli.OS_ERROR),
        (["ls", "memory://empty-{tmp}"], cli.BAD_CHECKPOINT),
        (["show", "memory://nothing/x"], cli.OS_ERROR),
        (["restore", "{tmp}/run", "--out", "{tmp}/no/x"], cli.OS_ERROR),
    ],
)
def test_exit_status(argv: list[str], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("hello, this is no checkpoint")
    save_steps(LocalStore(tmp_path / "run"), [1])
    arguments = [text.replace("{tmp}", str(tmp_path)) for text in argv]
    found, _, err = run(capsys, *arguments)
    assert found == status
    assert err.startswith("fastckpt: ")
    assert "Traceback" not in err
    assert run_json(capsys, *arguments)[1]["exit"] == status


def test_wrong_environment(url: str, store: LocalStore, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    save_steps(store, [1])
    monkeypatch.setenv("FASTCKPT_THREADS", "many")
    status, _, err = run(capsys, "check", url)
    assert status == cli.USAGE
    assert "FASTCKPT_THREADS" in err


@pytest.mark.parametrize("command", ["check", "show", "analyze", "ls"])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("FASTCKPT_KERNELS", "foo", "one of auto, native, numba, reference"),
        ("FASTCKPT_THREADS", "abc", "an integer ≥ 0"),
        ("FASTCKPT_MAX_LOAD_BYTES", "-5", "an integer ≥ 0"),
    ],
)
def test_wrong_environment_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    text: str,
    expected: str,
) -> None:
    file = tmp_path / "a"
    fastckpt.save({"a": torch.ones(3)}, file)
    monkeypatch.setenv(name, text)
    message = f"{name} is {text!r}: expected {expected}"
    assert run(capsys, command, str(file)) == (cli.USAGE, "", f"fastckpt: {message}\n")
    status, value = run_json(capsys, command, str(file))
    assert (status, value["schema"], value["exit"]) == (cli.USAGE, "fastckpt.error/1", cli.USAGE)
    assert value["message"] == message


def test_a_wrong_endpoint_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    err = run(capsys, "ls", "s3://bucket/x", "--endpoint-url", "minio:9000")[2]
    assert "--endpoint-url is 'minio:9000': expected http:// or https:// and a host" in err


def test_an_interrupt(url: str, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(store, [1])

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastckpt.upkeep.check.repository.check_repository", interrupt)
    assert cli.main(["check", url]) == cli.INTERRUPTED


# hostile text


EVIL = "a\x1b]0;owned\x07\x9b31m\u202eb\u2028\x7f\nc"


def test_clean() -> None:
    assert clean(EVIL) == r"a\x1b]0;owned\x07\x9b31m\u202eb\u2028\x7f\x0ac"
    assert clean("a\nb\x1b", keep_lines=True) == "a\nb\\x1b"
    assert clean("ok äé漢字 – ≥ 🙂") == "ok äé漢字 – ≥ 🙂"
    assert clean("\ud800\U000e0041") == "\\ud800\\U000e0041"


def test_names_metrics_and_meta_cannot_reach_the_terminal(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Incarnation(Repository(store), IN_PARALLEL)
    evil = EVIL.replace("\n", "")
    obj = {EVIL: torch.randn(1000)}
    job.save(sealed(obj), SaveAsked(1, trigger=evil, metrics={evil: 1.0}, meta={"x": evil}))
    flip(store, keys_of(store, "data/")[0])
    out = str(tmp_path / "out")
    commands = [["ls", url], ["show", url], ["check", url], ["salvage", url, "--out", out, "--force"]]
    commands.append(["restore", url, "--out", out + "2"])
    for argv in commands:
        for more in ([], ["--json"]):
            _, said, err = run(capsys, *argv, *more)
            assert not set("\x1b\x07\x9b\u202e\u2028\x7f") & set(said + err), argv
            if more:
                json.loads(said)
    value = run_json(capsys, "show", url)[1]
    assert value["ranks"][0]["tensors"][0]["name"] == [EVIL], "JSON says what is there"


def test_a_bar_is_drawn_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    draw = output.bar("x\x1b")
    draw(1, 3)
    draw(1, 3)
    draw(2, 3)
    draw(3, 3)
    assert screen.getvalue().count("%") == 2
    assert screen.getvalue().startswith("\rx\\x1b [")
    assert screen.getvalue().endswith("\r\x1b[K")
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    output.bar("x")(1, 3)
    assert quiet.getvalue() == ""


def test_find() -> None:
    inside = [CheckpointId(3, 9), CheckpointId(1, 5)]
    known = [CheckpointId(1, 5), CheckpointId(1, 7), CheckpointId(2, 7), CheckpointId(3, 9), CheckpointId(2, 5)]

    def found(step: int | None, epoch: int | None, history: list[CheckpointId] | None = inside) -> tuple[int, int]:
        return target.find("url", history, known, step, epoch)

    assert found(None, None) == (3, 9)
    assert found(5, None) == (1, 5), "of several, the history's"
    assert found(7, None) == (2, 7)
    assert found(7, 1) == (1, 7)
    assert found(None, 2) == (2, 7)
    assert found(None, None, None) == (3, 9)
    with pytest.raises(NoCheckpointError, match="step 8 of epoch 1"):
        found(8, 1)
    with pytest.raises(NoCheckpointError):
        found(None, None, [])


def test_an_endpoint_reaches_the_store(monkeypatch: pytest.MonkeyPatch, store: LocalStore) -> None:
    save_steps(store, [1])
    seen = []

    def opened(url: str, **settings: Any) -> LocalStore:
        seen.append((url, settings))
        return store

    monkeypatch.setattr(target, "open_store", opened)
    assert cli.main(["ls", "s3://bucket/run", "--endpoint-url", "http://127.0.0.1:9"]) == cli.OK
    assert cli.main(["check", "s3://bucket/run"]) == cli.OK
    assert seen == [("s3://bucket/run", {"endpoint_url": "http://127.0.0.1:9"}), ("s3://bucket/run", {})]


def test_a_container_at_a_url(
    monkeypatch: pytest.MonkeyPatch, store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = io.BytesIO()
    fastckpt.save({"a": torch.ones(4)}, sink)
    store.put("x/a.fckpt", sink.getvalue())

    def opened(url: str, **_: Any) -> LocalStore:
        return store if url == "s3://bucket/x" else LocalStore("/nonexistent")

    sub = LocalStore(Path(store.url.removeprefix("file://")) / "x")
    monkeypatch.setattr(target, "open_store", lambda url, **_: sub if url == "s3://bucket/x" else opened(url))
    assert cli.main(["check", "s3://bucket/x/a.fckpt"]) == cli.OK
    assert "1 chunks" in capsys.readouterr().out
