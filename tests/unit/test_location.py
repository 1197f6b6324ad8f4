"""What a text names: a path, a URL, or neither, and then it becomes no directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastckpt
from fastckpt import cli
from fastckpt.errors import StoreError
from fastckpt.snapshot.spill import SpillFile
from fastckpt.store.location import location


@pytest.mark.parametrize("text", ["s3:bucket/run", "s3//bucket/run", "gs//bucket/run", "az:container/run", "s3a:b"])
def test_a_url_with_a_slip_does_not_become_a_directory(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: fastckpt.Checkpointer(text, {"t": torch.ones(1)}, spot=None),
        lambda: fastckpt.save({}, text),
        lambda: fastckpt.load(text),
    ):
        with pytest.raises(StoreError, match="would become a directory") as caught:
            call()
        assert f"{text.partition('/')[0].partition(':')[0]}://" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_called_so_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3").mkdir()
    assert location("s3//run") == "s3//run"
    assert location("./gs//run") == "./gs//run"


@pytest.mark.parametrize("url", ["file:///~/run", "file://~/run", "file:///~me/run"])
def test_no_home_directory_in_a_file_url(url: str) -> None:
    with pytest.raises(StoreError, match="home directory"):
        location(url)


def test_the_home_directory_is_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    (home / "spill").mkdir(parents=True)
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    with fastckpt.Checkpointer("~/run", {"t": torch.ones(1)}, spot=None) as ckpt:
        ckpt.restore()
        ckpt.save_now(1).wait()
    fastckpt.save({"t": torch.ones(1)}, home / "x.fckpt")
    SpillFile("~/spill").close()
    for arguments in (
        ["ls", "~/run"],
        ["show", "~/x.fckpt"],
        ["check", "~/run"],
        ["restore", "~/run", "--out", "~/r.fckpt"],
    ):
        assert cli.main(arguments) == 0, capsys.readouterr().err
    assert (home / "r.fckpt").is_file()
    assert list(here.iterdir()) == []
