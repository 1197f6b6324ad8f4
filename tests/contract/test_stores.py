"""The contract on every store and wrapper that needs no server; tests/s3 has it on S3."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from fastckpt.errors import ObjectNotFoundError, StoreAccessError, StoreError
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.store.open import open_store
from fastckpt.store.wrap import Retrying, Wrapper
from fastckpt.testing.faulty_store import FaultyStore
from fastckpt.testing.store_contract import StoreContract


class TestMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestLocal(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return LocalStore(tmp_path / "not" / "there" / "yet")


class TestLocalWithoutUnnamedFiles(StoreContract):
    """As on NFS."""

    @pytest.fixture
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
        monkeypatch.delattr(os, "O_TMPFILE")
        return LocalStore(tmp_path)


class TestRetryingOverFaults(StoreContract):
    many = 300

    @pytest.fixture
    def store(self) -> Store:
        seed = random.randrange(1 << 32)
        print("seed", seed)
        rng = random.Random(seed)
        faulty = FaultyStore(MemoryStore(), lambda number, verb, key: rng.random() < 0.2, "before")
        return Retrying(faulty, sleep=lambda pause_s: None)


class TestWrapper(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return Wrapper(MemoryStore())


@pytest.mark.parametrize("hours", [23, 25])
def test_temporaries_are_not_listed_and_go_with_the_last_object_of_their_directory(tmp_path: Path, hours: int) -> None:
    store = LocalStore(tmp_path)
    for key in ("data/save/b", "data/save/c", "data/other/d"):
        store.put(key, b"x")
    debris = tmp_path / "data" / "save" / ".b.123-00ff.tmp"
    debris.write_bytes(b"half")
    at_s = time.time() - hours * 3600
    os.utime(debris, (at_s, at_s))
    assert [info.key for info in store.list("data/save/")] == ["data/save/b", "data/save/c"]
    store.delete("data/save/b")
    assert debris.exists()
    store.delete("data/save/c")
    assert debris.exists() == (hours < 24), "younger ones may be somebody's who is just writing"
    assert debris.parent.exists() == (hours < 24)
    assert store.get("data/other/d") == b"x"


def test_links_out_of_the_root_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"s")
    store = LocalStore(tmp_path / "root")
    store.put("a", b"x")
    (tmp_path / "root" / "link").symlink_to(outside)
    (tmp_path / "root" / "file").symlink_to(outside / "secret")
    assert [info.key for info in store.list("")] == ["a"]
    with pytest.raises(StoreError):
        store.get("file")
    with pytest.raises(ObjectNotFoundError):
        store.head("file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_permissions_are_access_errors(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreAccessError, match="permissions"):
            LocalStore(tmp_path).put("a/b", b"x")
    finally:
        tmp_path.chmod(0o700)


def test_urls(tmp_path: Path) -> None:
    assert open_store(str(tmp_path)).url == f"file://{tmp_path}"
    assert open_store(f"file://{tmp_path}/a%20b").url == f"file://{tmp_path}/a b"
    assert open_store("memory://x") is open_store("memory://x")
    assert open_store("memory://x") is not open_store("memory://y")
    for wrong in (
        "",
        "abfs://b/p",
        "gs://",
        "az://c@account/p",
        "http://x/y",
        "file://host/x",
        "s3://",
        "s3://Bad_Bucket/x",
    ):
        with pytest.raises(StoreError):
            open_store(wrong)
    with pytest.raises(StoreError, match="takes no settings"):
        open_store(str(tmp_path), sse="AES256")
