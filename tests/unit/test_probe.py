"""What a store is asked, at opening and by `fastckpt probe`: each thing that a store can lack is found, by a store that lacks it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.cli.main import main
from fastckpt.errors import RepositoryError, StoreAccessError, StoreError, StoreUnavailableError
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.store.findings import Checksum, Create, Listing, Ranges, Replace, StoreFindings, losses, refusals
from fastckpt.store.goodput import measure_goodput
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.store.open import open_store
from fastckpt.store.probe import look, look_closely
from fastckpt.store.wrap import Wrapper
from fastckpt.testing.faulty_store import FaultyStore


class Overwrites(Wrapper):
    """Ignores the condition of a create."""

    def put_if_absent(self, key: str, data: Any) -> None:
        self.inner.put(key, data)


class HasNoCreate(Wrapper):
    def put_if_absent(self, key: str, data: Any) -> None:
        raise StoreError("refused (HTTP 400 InvalidArgument)")


class Races(Wrapper):
    """Looks first, and writes then: a second create is refused, but several at once all succeed."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._all_have_looked = threading.Barrier(8)

    def put_if_absent(self, key: str, data: Any) -> None:
        if "/race/" not in key:
            self.inner.put_if_absent(key, data)
            return
        self._all_have_looked.wait(30)
        self.inner.put(key, data)


class ListsLate(Wrapper):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())


class ListsBackwards(Wrapper):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(sorted(self.inner.list(prefix), reverse=True))


class ReadsElsewhere(Wrapper):
    def get_into(self, key: str, offset: int, out: Any) -> None:
        self.inner.get_into(key, 0, out)


class ForgetsConditions(Wrapper):
    def replace_if_match(self, key: str, data: Any, version: str) -> None:
        self.inner.put(key, data)


CASES: list[tuple[Callable[[Store], Store], str, Any, str]] = [
    (Overwrites, "create", Create.IGNORED, "overwrites where it was asked to create"),
    (HasNoCreate, "create", Create.UNSUPPORTED, "no create-if-absent"),
    (ListsLate, "strong", Listing.NO, "does not show what was just written"),
    (ReadsElsewhere, "ranges", Ranges.WRONG, "not what was written"),
]


@pytest.mark.parametrize(("lacking", "name", "finding", "words"), CASES)
def test_an_opening_for_writing_refuses(lacking: Callable[[Store], Store], name: str, finding: Any, words: str) -> None:
    memory = MemoryStore()
    store = lacking(memory)
    assert getattr(look(store), name) is finding
    assert getattr(look_closely(store), name) is finding
    with (
        pytest.raises(RepositoryError, match=words),
        fastckpt.Checkpointer(store, {"s": {"t": torch.ones(3)}}, spot=None) as ckpt,
    ):
        ckpt.save_now(1).wait(60)
    if lacking is not ListsLate:
        assert list(memory.list("probe/")) == []


@pytest.mark.parametrize(
    ("lacking", "name", "finding"), [(Races, "create", Create.RACY), (ListsBackwards, "ordered", Listing.NO)]
)
def test_the_command_finds_what_an_opening_cannot_see(
    lacking: Callable[[Store], Store], name: str, finding: Any
) -> None:
    found = look_closely(lacking(MemoryStore()))
    assert getattr(found, name) is finding
    assert len(refusals(found)) == 1


def test_a_good_store_and_a_directory(tmp_path: Path) -> None:
    found = look_closely(MemoryStore())
    assert found == StoreFindings(Create.ATOMIC, Ranges.HONOURED, Listing.YES, Listing.YES, replace=Replace.CONDITIONAL)
    assert (refusals(found), losses(found)) == ([], [])
    found = look_closely(LocalStore(tmp_path))
    assert (found.create, found.replace, refusals(found)) == (Create.ATOMIC, Replace.UNSUPPORTED, [])
    assert list(tmp_path.iterdir()) == []
    assert look_closely(ForgetsConditions(MemoryStore())).replace is Replace.IGNORED


def test_an_opening_asks_five_things(tmp_path: Path) -> None:
    store = FaultyStore(MemoryStore())
    look(store)
    assert [verb for verb, _ in store.operations] == ["put_if_absent", "put_if_absent", "get_into", "list", "delete"]


def test_no_right_to_write_is_no_finding() -> None:
    store = FaultyStore(MemoryStore(), lambda number, verb, key: verb.startswith("put"), error=StoreAccessError)
    for asks in (look, look_closely):
        with pytest.raises(StoreAccessError):
            asks(store)


@pytest.mark.parametrize("number", range(5))
def test_a_probe_that_fails_leaves_as_little_as_it_can(number: int) -> None:
    memory = MemoryStore()
    store = FaultyStore(memory, lambda n, verb, key: n == number and verb != "delete")
    if number < 4:
        with pytest.raises(StoreUnavailableError):
            look(store)
    else:
        look(store)
    assert list(memory.list("")) == []


def test_what_follows_from_checksums() -> None:
    def words(used: str | None, **checksums: Checksum) -> str:
        found = StoreFindings(
            Create.ATOMIC,
            Ranges.IGNORED,
            Listing.YES,
            replace=Replace.CONDITIONAL,
            checksums=checksums,
            checksum_in_use=used,
        )
        assert refusals(found) == []
        return " ".join(losses(found)[1:])

    assert words(None) == ""
    assert words("crc64nvme", crc64nvme=Checksum.VERIFIED) == ""
    assert "bodies go with Content-MD5" in words("crc64nvme", crc64nvme=Checksum.REFUSED)
    assert words("crc64nvme", crc64nvme=Checksum.IGNORED).endswith("find damage")
    assert 'checksum="sha256"' in words("crc64nvme", crc64nvme=Checksum.IGNORED, sha256=Checksum.VERIFIED)


def test_goodput_counts_what_it_was_told_to_wait_for() -> None:
    memory = MemoryStore()
    store = FaultyStore(memory, lambda number, verb, key: verb == "put" and number == 1)
    (found,) = measure_goodput(store, [3], 0.01, object_bytes=1000)
    assert (found.connections, found.put_off) == (3, 1)
    assert found.up_bytes_s > 0 < found.down_bytes_s
    assert list(memory.list("")) == []
    never = FaultyStore(memory, lambda number, verb, key: verb == "get_into")
    with pytest.raises(StoreUnavailableError):
        list(measure_goodput(never, [2], 0.01, object_bytes=1000))
    assert list(memory.list("")) == []


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--yes", "--seconds", "0.01", "--connections", "1,2", *(["--json"] if as_json else [])]
    assert main(["probe", str(tmp_path), *options]) == 0
    out, err = capsys.readouterr()
    assert list(tmp_path.iterdir()) == []
    if not as_json:
        assert "create_if_absent  atomic" in out
        assert "a repository can be held here" in err
        return
    found = json.loads(out)
    assert (found["schema"], found["repository"], found["refusals"]) == ("fastckpt.probe/1", True, [])
    assert found["listing"] == {"strong": "yes", "ordered": "yes", "paged": "not asked"}
    assert [one["connections"] for one in found["goodput"]] == [1, 2]
    assert set(found["latency"]) == {"put_s", "get_s", "head_s"}


def test_the_command_says_that_no_repository_can_be_held(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastckpt.cli.target.open_store", lambda url, **settings: Overwrites(MemoryStore()))
    assert main(["probe", "memory://x", "--yes", "--connections", "0"]) == 1
    assert "overwrites where it was asked to create" in capsys.readouterr().err


def test_nothing_is_written_without_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "memory://unasked"]) == 2
    assert main(["probe", "memory://unasked", "--json"]) == 2
    assert list(open_store("memory://unasked").list("")) == []
    assert "--yes" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--connections", "x"], ["--connections", "-1"], ["--seconds", "0"]])
def test_wrong_usage(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "memory://x", "--yes", *options]) == 2
    assert options[0] in capsys.readouterr().err
