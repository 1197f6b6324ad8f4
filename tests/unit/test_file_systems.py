"""File systems that lack what others have: hard links, unnamed files, renames, fsync of directories (FUSE, SMB)."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.errors import StoreError
from fastckpt.host import files
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore


def failing(number: int) -> Callable[..., Any]:
    def call(*values: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM], ids=errno.errorcode.get)
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(request.param))


@pytest.fixture(params=[True, False], ids=["unnamed files", "none"])
def unnamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.delattr(os, "O_TMPFILE")


@pytest.mark.usefixtures("no_links", "unnamed")
def test_without_links_files_are_saved_and_repositories_work_where_a_rename_can_refuse(tmp_path: Path) -> None:
    path = tmp_path / "x.fckpt"
    for value in (1.0, 2.0):
        fastckpt.save({"a": torch.full((3,), value)}, path)
        path.chmod(0o640)
    assert fastckpt.load(path)["a"].eq(2).all()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["x.fckpt"]
    store = LocalStore(tmp_path / "run")
    Repository(store).initialise()
    with pytest.raises(fastckpt.errors.ObjectExistsError):
        store.put_if_absent("fastckpt.json", b"another")
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".tmp")]


@pytest.mark.usefixtures("no_links", "unnamed")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_without_any_atomic_create_a_repository_is_refused_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(files, "rename_if_absent", failing(number))
    with pytest.raises(StoreError, match=r"cannot hold a repository.*neither hard links.*nor a rename.*s3://"):
        fastckpt.Checkpointer(tmp_path / "run", {"a": torch.zeros(1)}, spot=None)
    assert not [name for _, _, names in os.walk(tmp_path) for name in names]


def test_without_renames_save_says_what_is_lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", failing(errno.ENOSYS))
    with pytest.raises(OSError, match=r"cannot rename files.*s3://"):
        fastckpt.save({"a": torch.zeros(1)}, tmp_path / "x.fckpt")
    assert os.listdir(tmp_path) == []


def test_directories_that_cannot_be_synced_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_warned_of_directories", False)
    original = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        original(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with caplog.at_level(logging.WARNING, "fastckpt"):
        for _ in range(2):
            fastckpt.save({"a": torch.zeros(1)}, tmp_path / "x.fckpt")
    (record,) = [record for record in caplog.records if "cannot sync directories" in record.message]
    assert "power" in record.message


def test_other_errors_of_a_directory_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        fastckpt.save({"a": torch.zeros(1)}, tmp_path / "x.fckpt")
