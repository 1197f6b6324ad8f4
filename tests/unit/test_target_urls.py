"""URLs in paths."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt import cli
from fastckpt.errors import SaveError, StoreError
from fastckpt.store.open import open_store
from tests.support.targets import state, step_in


class Url:
    def __init__(self, text: str) -> None:
        self._text = text

    def __fspath__(self) -> str:
        return self._text


@pytest.mark.parametrize("make", [str, Path, Url], ids=["str", "Path", "PathLike"])
def test_a_path_object_of_a_url_is_the_url(
    make: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    target = make("memory://paths/x")
    fastckpt.save(state(1), target)
    fastckpt.save_async(state(2), target).wait(60)
    assert step_in(target) == step_in("memory://paths/x") == 2
    assert fastckpt.get_unsafe_globals(target) == []
    with fastckpt.open(target) as reader:
        assert reader["w"][0] == 2
    with fastckpt.Checkpointer(
        make(f"memory://paths-{make.__name__}"), {"m": torch.nn.Linear(2, 2)}, spot=None, every=None
    ) as ckpt:
        ckpt.save_now(1).wait()
    assert any(open_store(f"memory://paths-{make.__name__}").list("commits/"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("use", [fastckpt.save, fastckpt.save_async])
@pytest.mark.parametrize("url", ["hdfs://bucket/x", "abfs://bucket/x", "s3://bad bucket/x", "s3://", "http://host/x"])
def test_a_path_object_of_a_url_that_cannot_be_one_makes_no_directory(
    url: str, use: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (Path(url), url):
        with pytest.raises((SaveError, StoreError), match=url.partition(":")[0]):
            use(state(1), target)
        with pytest.raises((SaveError, StoreError)):
            fastckpt.load(target)
        with pytest.raises(StoreError):
            fastckpt.Checkpointer(target, {"m": torch.nn.Linear(2, 2)}, spot=None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("scheme", ["s3", "gs", "memory", "file"])
def test_a_url_that_was_made_absolute_is_refused(scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    target = Path(f"{scheme}://bucket/run").absolute()
    for use in (lambda: fastckpt.save(state(1), target), lambda: fastckpt.load(target), lambda: open_store(target)):
        with pytest.raises(StoreError, match=f"Give '{scheme}://bucket/run' as a string"):
            use()
    assert os.listdir(tmp_path) == []
    (tmp_path / f"{scheme}:").mkdir()  # whoever has one gets at it
    (tmp_path / f"{scheme}:" / "bucket").mkdir()
    fastckpt.save(state(1), target)
    assert step_in(target) == step_in(f"./{scheme}:/bucket/run") == 1


@pytest.mark.parametrize(
    "form", ["file://{}", "file://localhost{}", "file://LOCALHOST{}", "file:{}", "file:///{}"], ids=str
)
def test_file_urls(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    for text in (f"{folder}/a b.ckpt", f"{folder}/a%20b.ckpt".replace(" ", "%20")):
        fastckpt.save(state(5), form.format(text))
        assert step_in(form.format(text)) == step_in(folder / "a b.ckpt") == 5
    fastckpt.save(state(6), Url(form.format(f"{folder}/new/x")))  # makes the directory, as a store does
    assert sorted(os.listdir(folder)) == ["a b.ckpt", "new"]
    with pytest.raises((SaveError, StoreError)):
        fastckpt.save(state(5), form.format(f"{folder}/"))


@pytest.mark.parametrize("url", ["file://host/x", "file://", "file:", "file:///a%00b"])
def test_file_urls_that_are_none(url: str) -> None:
    for use in (lambda: fastckpt.save({}, url), lambda: fastckpt.load(url), lambda: open_store(url)):
        with pytest.raises(StoreError, match="no file URL"):
            use()


@pytest.mark.parametrize("url", ["memory://foreign/x", "file://{}/x"])
def test_torchs_own_files_are_loaded_from_urls(tmp_path: Path, url: str) -> None:
    data = io.BytesIO()
    torch.save(state(8), data)
    url = url.format(tmp_path)
    with open_store(url.rpartition("/")[0]) as store:
        store.put("x", data.getvalue())
    assert step_in(url) == 8
    assert fastckpt.get_unsafe_globals(url) == []


def test_the_command_line_understands_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fastckpt.Checkpointer(tmp_path / "a run", {"m": torch.nn.Linear(2, 2)}, spot=None, every=None) as ckpt:
        ckpt.save_now(1).wait()
    for text in (f"file:{tmp_path}/a run", f"file://localhost{tmp_path}/a%20run"):
        assert cli.main(["ls", text]) == cli.OK
        out = str(tmp_path / "out")
        assert cli.main(["restore", text, "--out", f"file:{out}", "--force"]) == cli.OK
        assert "m" in fastckpt.load(out)
    assert cli.main(["restore", text, "--out", "s3:/bucket/x"]) == cli.USAGE
    assert "--out is 's3:/bucket/x'" in capsys.readouterr().err
    assert cli.main(["ls", "hdfs:/bucket/x"]) == cli.USAGE


@pytest.mark.parametrize("below", ["", "/run", "/run/7"])
def test_a_file_in_the_place_of_a_directory_is_named(tmp_path: Path, below: str) -> None:
    path = tmp_path / "x"
    path.touch()
    for url in (f"{path}{below}", f"file://{path}{below}"):
        with pytest.raises(StoreError, match=f"{path} is a file"):
            fastckpt.Checkpointer(url, {"m": torch.nn.Linear(2, 2)}, spot=None)
    assert path.read_bytes() == b""
