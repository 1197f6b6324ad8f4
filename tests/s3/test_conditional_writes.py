"""Tombstones replace the very record that was read, also where a policy forbids every other overwrite; servers without If-Match."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("boto3", reason="s3:// needs boto3")
import fastckpt
from fastckpt.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    UnsupportedVerbError,
)
from fastckpt.format import keys
from fastckpt.format.repository_records import Tombstone
from fastckpt.repository.commit import read_commit
from fastckpt.repository.retention import Keep
from fastckpt.store.base import Store
from fastckpt.store.cloud import S3Store, open_s3
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Retrying
from fastckpt.testing.faulty_store import FaultyStore
from tests.s3.manners import (
    MannersServer,
    bare_if_match,
    denies,
    if_match_is_never_met,
    no_if_match,
    refuses,
)
from tests.s3server import S3Server

POLICY = Path(__file__).parents[2] / "docs" / "policies" / "create-only.json"


def policy(bucket: str = "lab", prefix: str = "run") -> str:
    return POLICY.read_text().replace("BUCKET", bucket).replace("PREFIX", prefix)


def check_versions(store: Store) -> None:
    """What the optional verbs promise."""
    with pytest.raises(ObjectNotFoundError):
        store.get_version("a")
    with pytest.raises(ObjectNotFoundError):
        store.replace_if_match("a", b"0", '"d41d8cd98f00b204e9800998ecf8427e"')
    store.put("a", b"1")
    data, first = store.get_version("a")
    assert data == b"1"
    store.replace_if_match("a", bytearray(b"2"), first)
    with pytest.raises(ObjectChangedError, match="not the version"):
        store.replace_if_match("a", b"3", first)
    data, second = store.get_version("a")
    assert (data, second != first) == (b"2", True)
    store.replace_if_match("a", b"4", second)
    assert store.get("a") == b"4"


def test_versions_in_memory() -> None:
    check_versions(MemoryStore())


@pytest.mark.s3
def test_versions_on_a_real_server(store: S3Store) -> None:
    """Ceph 16 wants the ETag without its quotes."""
    check_versions(store)


@pytest.mark.parametrize("manner", [None, bare_if_match])
def test_versions_on_servers_of_both_forms(manner: Any, server: MannersServer) -> None:
    server.manners += [manner] if manner else []
    store = open_s3("s3://lab/run")
    check_versions(store)
    # The form that works is remembered.
    before = len(server.requests("PUT"))
    store.replace_if_match("a", b"5", store.get_version("a")[1])
    assert len(server.requests("PUT")) == before + 1


@pytest.mark.parametrize(
    "manner",
    [
        if_match_is_never_met,
        refuses(501, "NotImplemented", method="PUT"),
        refuses(400, "InvalidArgument", "If-Match", method="PUT"),
    ],
)
def test_a_server_without_if_match_is_said_to_have_none(manner: Any, server: MannersServer) -> None:
    server.objects["run/a"] = b"1"
    server.manners.append(manner)
    store = open_s3("s3://lab/run")
    with pytest.raises(UnsupportedVerbError):
        store.replace_if_match("a", b"2", store.get_version("a")[1])
    assert server.objects["run/a"] == b"1"


def test_a_directory_has_no_versions(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"1")
    with pytest.raises(UnsupportedVerbError):
        store.get_version("a")
    with pytest.raises(UnsupportedVerbError):
        store.replace_if_match("a", b"2", "x")


def test_a_lost_reply_is_read_back_and_compared() -> None:
    memory = MemoryStore()
    memory.put("a", b"1")
    version = memory.get_version("a")[1]
    store = Retrying(FaultyStore(memory, lambda number, verb, key: number == 0, "after"), sleep=lambda seconds: None)
    store.replace_if_match("a", b"2", version)
    assert memory.get("a") == b"2"
    # Another writer was faster than the second try.
    version = memory.get_version("a")[1]

    def overtaken(number: int, verb: str, key: str, when: str) -> None:
        if number == 1 and when == "before":
            memory.put("a", b"theirs")

    faulty = FaultyStore(memory, lambda number, verb, key: number == 0, "before", hook=overtaken)
    with pytest.raises(ObjectChangedError):
        Retrying(faulty, sleep=lambda seconds: None).replace_if_match("a", b"3", version)
    assert memory.get("a") == b"theirs"


def run(store: Store) -> None:
    """Three saves of which one is kept: two records are replaced by tombstones."""
    state = {"s": {"t": torch.ones(3)}}
    with fastckpt.Checkpointer(store, state, spot=None, keep=Keep(last=1)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save_now(step).wait(60)


def tombstones(server: MannersServer, caller: Store) -> int:
    found = [keys.parse_commit(key.removeprefix("run/")) for key in server.objects]
    return sum(isinstance(read_commit(caller, one), Tombstone) for one in found if one is not None)


def commit_puts(server: MannersServer) -> list[str]:
    """Of each accepted or refused PUT of a commit record, its condition."""
    puts = [one.headers for one in server.requests("PUT") if "/commits/" in one.path]
    return [next((n for n in ("If-None-Match", "If-Match") if n.lower() in map(str.lower, h)), "") for h in puts]


def test_a_run_obeys_the_policy(server: MannersServer) -> None:
    server.manners.append(denies(policy()))
    store = open_s3("s3://lab/run")
    run(store)
    assert tombstones(server, store) == 2
    assert commit_puts(server).count("") == 0
    for name in (next(key for key in server.objects if "/commits/" in key), "run/epochs/000009"):
        with pytest.raises(StoreAccessError, match="AccessDenied"):
            store.put(name.removeprefix("run/"), b"vandal")
    with pytest.raises(StoreAccessError):  # not even one that does not exist yet
        store.put("commits/new", b"vandal")


@pytest.mark.parametrize("manner", [no_if_match, if_match_is_never_met])
def test_without_if_match_a_tombstone_overwrites_as_ever(manner: Any, server: MannersServer) -> None:
    server.manners.append(manner)
    store = open_s3("s3://lab/run")
    run(store)
    assert tombstones(server, store) == 2
    assert ("" in commit_puts(server)) == (manner is if_match_is_never_met)


def test_a_policy_without_if_match_leaves_the_record_and_says_so(
    server: MannersServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is retired, nothing is deleted, saves go on."""
    server.manners += [if_match_is_never_met, denies(policy())]
    store = open_s3("s3://lab/run")
    run(store)
    assert tombstones(server, store) == 0
    assert len([key for key in server.objects if "/commits/" in key]) == 3
    assert any("could not be removed" in record.getMessage() for record in caplog.records)


def test_a_lost_reply_to_a_tombstone(server: MannersServer) -> None:
    """The server has written it; the second try meets its own tombstone."""
    lost: list[str] = []

    def loses(request: Any) -> bool:
        if "If-Match" not in request.headers or lost:
            return False
        lost.append(request.key)
        server.objects[request.key] = request.body
        return request.refuse(500, "InternalError")  # type: ignore[no-any-return]

    server.manners += [denies(policy()), loses]
    run(Retrying(open_s3("s3://lab/run"), sleep=lambda seconds: None))
    assert len(lost) == 1
    assert tombstones(server, open_s3("s3://lab/run")) == 2


def test_the_file_denies_only_what_has_no_condition() -> None:
    (statement,) = json.loads(policy())["Statement"]
    assert statement["Effect"] == "Deny"
    assert statement["Action"] == ["s3:PutObject"]
    assert statement["Resource"] == ["arn:aws:s3:::lab/run/commits/*", "arn:aws:s3:::lab/run/epochs/*"]


@pytest.mark.s3
def test_a_real_run_replaces_with_the_condition(
    store: S3Store, open_store: Callable[..., S3Store], proxy: Any, s3_server: S3Server
) -> None:
    run(open_store(endpoint_url=proxy.url))
    puts = [one for one in proxy.requests("PUT") if "/commits/" in one.target]
    replaced = [one for one in puts if "if-match" in one.headers]
    created = [one for one in puts if "if-none-match" in one.headers]
    assert len(replaced) + len(created) == len(puts)
    # Ceph refuses the quoted form once; then the other one is used.
    assert len(replaced) == (3 if s3_server.kind == "radosgw" else 2)


@pytest.mark.s3
def test_ceph_16_does_not_know_the_conditions_and_denies_every_record(
    store: S3Store, bucket: str, s3_server: S3Server
) -> None:
    """So this policy is not for it (docs/policies/README.md); a run is refused before it has written anything that counts."""
    if s3_server.kind != "radosgw":
        pytest.skip(f"{s3_server.kind} does not enforce policies")
    s3_server.owner_client().put_bucket_policy(Bucket=bucket, Policy=policy(bucket, "p"))
    store.put("votes/a", b"1")
    with pytest.raises(StoreAccessError, match="AccessDenied"):
        store.put_if_absent("commits/a", b"1")
    with pytest.raises(StoreAccessError, match="AccessDenied"):
        run(store)
