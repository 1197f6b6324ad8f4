"""Servers that lack something, played and real: what the probe finds, and what works all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("boto3", reason="s3:// needs boto3")
import fastckpt
from fastckpt.cli.main import main
from fastckpt.errors import RepositoryError, StoreError
from fastckpt.store.cloud import S3Store, open_s3
from fastckpt.store.cloud_probe import look_at_server
from fastckpt.store.findings import Checksum, Create, Listing, Ranges, Replace, StoreFindings, losses, refusals
from fastckpt.store.probe import look_closely
from tests.s3.manners import (
    OBJECT,
    MannersServer,
    is_object,
    no_checksum_headers_400,
    no_checksum_headers_501,
    no_if_match,
    no_if_none_match,
    no_ranges,
    refuses,
    verifies_checksums,
)
from tests.s3server import S3Server


def found(store: S3Store) -> StoreFindings:
    return look_at_server(store, look_closely(store))


def test_a_server_that_verifies(encrypted: MannersServer) -> None:
    encrypted.manners.append(verifies_checksums)
    seen = found(open_s3("s3://lab/run"))
    assert (seen.create, seen.replace, seen.ranges) == (Create.ATOMIC, Replace.CONDITIONAL, Ranges.HONOURED)
    assert (seen.strong, seen.ordered, seen.paged) == (Listing.YES,) * 3
    assert (seen.checksums["crc64nvme"], seen.checksums["md5"]) == (Checksum.VERIFIED,) * 2
    assert (seen.checksum_in_use, refusals(seen), losses(seen)) == ("crc64nvme", [], [])
    assert encrypted.objects == {}


def test_a_server_that_lies_about_checksums(encrypted: MannersServer) -> None:
    seen = found(open_s3("s3://lab/run"))
    assert set(seen.checksums.values()) == {Checksum.IGNORED}
    assert ["only TLS protects it" in words for words in losses(seen)] == [True]


@pytest.mark.parametrize("manner", [no_checksum_headers_400, no_checksum_headers_501])
def test_a_server_that_refuses_checksums(manner: Any, encrypted: MannersServer) -> None:
    encrypted.manners += [manner, verifies_checksums]
    seen = found(open_s3("s3://lab/run"))
    assert (seen.checksums["crc64nvme"], seen.checksums["md5"]) == (Checksum.REFUSED, Checksum.VERIFIED)
    assert ["bodies go with Content-MD5" in words for words in losses(seen)] == [True]


def test_bodies_signed_over_https(encrypted: MannersServer) -> None:
    open_s3("s3://lab/run", checksum="sha256").put("a", b"1")
    headers = {name.lower(): value for name, value in encrypted.requests("PUT")[0].headers.items()}
    assert len(headers["x-amz-content-sha256"]) == 64
    assert not [name for name in headers if "checksum" in name or name == "content-md5"]


@pytest.mark.parametrize("manner", [no_if_none_match, refuses(501, "NotImplemented", "If-None-Match", method="PUT")])
def test_a_server_without_conditional_creates_takes_objects_only(manner: Any, server: MannersServer) -> None:
    wants = "If-None-Match"
    server.manners.append(lambda request: wants in request.headers and manner(request))
    seen = found(open_s3("s3://lab/run"))
    assert seen.create is (Create.IGNORED if manner is no_if_none_match else Create.UNSUPPORTED)
    with (
        pytest.raises(RepositoryError, match=r"cannot hold a repository.*fastckpt.save and load need none"),
        fastckpt.Checkpointer("s3://lab/run", {"s": {"t": torch.ones(3)}}, spot=None) as ckpt,
    ):
        ckpt.save_now(1).wait(60)
    assert server.objects == {}
    fastckpt.save(OBJECT, "s3://lab/x")
    assert is_object(fastckpt.load("s3://lab/x"))


def test_a_server_that_ignores_if_match(server: MannersServer) -> None:
    server.manners.append(no_if_match)
    assert found(open_s3("s3://lab/run")).replace is Replace.IGNORED


def test_a_server_that_ignores_ranges_is_read_whole(
    server: MannersServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.manners.append(no_ranges)
    store = open_s3("s3://lab/run")
    assert found(store).ranges is Ranges.IGNORED
    assert ["ignores ranges" in record.getMessage() for record in caplog.records] == [True]
    store.put("k", bytes(range(256)) * 8)
    for offset, n_bytes in [(0, 10), (100, 300), (2040, 8), (0, 2048)]:
        out = bytearray(n_bytes)
        store.get_into("k", offset, out)
        assert bytes(out) == (bytes(range(256)) * 8)[offset : offset + n_bytes]
    for offset, n_bytes in [(2040, 9), (5000, 1)]:
        with pytest.raises(EOFError):
            store.get_into("k", offset, bytearray(n_bytes))
    with fastckpt.Checkpointer("s3://lab/run", {"s": OBJECT}, spot=None) as ckpt:
        ckpt.save_now(1).wait(60)
    assert is_object(fastckpt.load("s3://lab/run")["s"])
    monkeypatch.setattr("fastckpt.store.cloud_requests.MOST_WHOLE_BYTES", 1000)
    with pytest.raises(StoreError, match="ignores ranges and sends all 2048 bytes"):
        store.get_into("k", 1, bytearray(1))


def test_a_server_whose_pages_lose_objects(server: MannersServer) -> None:
    def loses(request: Any) -> bool:
        if "continuation-token" in request.query:
            request.query["continuation-token"] += "~"
        return False

    server.manners.append(loses)
    server.manners.append(
        lambda request: (
            request.query.get("max-keys") == "2"
            and "continuation-token" in request.query
            and request.answer(200, "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        )
    )
    assert found(open_s3("s3://lab/run")).paged is Listing.NO


@pytest.mark.s3
def test_a_real_server(store: S3Store, open_store: Callable[..., S3Store], s3_server: S3Server) -> None:
    """Ceph 16.2: verifies Content-MD5 and signatures, ignores the other checksums."""
    seen = found(store)
    assert (seen.create, seen.replace, seen.ranges) == (Create.ATOMIC, Replace.CONDITIONAL, Ranges.HONOURED)
    assert (seen.strong, seen.ordered, seen.paged) == (Listing.YES,) * 3
    assert list(store.list("")) == []
    if s3_server.kind == "radosgw":
        assert seen.checksums == {
            "crc64nvme": Checksum.IGNORED,
            "md5": Checksum.VERIFIED,
            "sha256": Checksum.VERIFIED,
        }
        assert (seen.checksum_in_use, losses(seen)) == ("sha256", [])


@pytest.mark.s3
def test_a_versioned_bucket_of_ceph_16(open_store: Callable[..., S3Store], s3_server: S3Server) -> None:
    if s3_server.kind != "radosgw":
        pytest.skip(f"{s3_server.kind} is another server")
    seen = look_closely(open_store(f"s3://{s3_server.new_bucket(versioned=True)}/p"))
    assert seen.create in (Create.IGNORED, Create.RACY)
    assert len(refusals(seen)) == 1


@pytest.mark.s3
def test_the_command_on_a_real_server(
    bucket: str, aws: pytest.MonkeyPatch, store: S3Store, s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--yes", "--seconds", "0.1", "--connections", "1,4", "--endpoint-url", s3_server.url]
    assert main(["probe", f"s3://{bucket}/p", *options]) == 0
    out, err = capsys.readouterr()
    assert "checksums.md5" in out
    assert "a repository can be held here" in err
    assert list(store.list("")) == []
