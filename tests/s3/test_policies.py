"""The policies of docs/policies do what they say; encryption and owner are asked for in every request that can; check_bucket."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastckpt.errors import ObjectNotFoundError, StoreAccessError, StoreError
from fastckpt.store.base import Store
from fastckpt.store.cloud import S3Store
from fastckpt.store.cloud_bucket import check_bucket
from fastckpt.testing.fault_proxy import Fault, FaultProxy
from fastckpt.training.checkpointer import Checkpointer
from tests.s3server import S3Server

pytestmark = pytest.mark.s3

POLICIES = Path(__file__).parents[2] / "docs" / "policies"
OWNER = "123456789012"
KEY = "arn:aws:kms:us-east-1:123456789012:key/1234"

CALLS: dict[str, Callable[[Store], Any]] = {
    "get": lambda store: store.get("a"),
    "get_into": lambda store: store.get_into("a", 0, bytearray(1)),
    "head": lambda store: store.head("a"),
    "list": lambda store: list(store.list("")),
    "put": lambda store: store.put("b", b"2"),
    "put_if_absent": lambda store: store.put_if_absent("c", b"3"),
    "pin": lambda store: store.put("pins/reader.json", b"4"),
    "delete": lambda store: store.delete("a"),
}
READS = {"get", "get_into", "head", "list"}
MAY = {
    "reader": READS | {"pin"},
    "writer": READS | {"put", "put_if_absent", "pin"},
    "pruner": set(CALLS),
}


@pytest.fixture(scope="module")
def users(s3_server: S3Server) -> dict[str, tuple[str, str]]:
    if s3_server.kind != "radosgw":
        pytest.skip(f"{s3_server.kind} does not enforce policies")
    return {role: s3_server.new_user(role) for role in MAY}


@pytest.mark.parametrize("role", MAY)
def test_a_role_may_this_and_no_more(
    role: str,
    users: dict[str, tuple[str, str]],
    s3_server: S3Server,
    bucket: str,
    store: S3Store,
    open_store: Callable[..., S3Store],
) -> None:
    text = (POLICIES / f"{role}.json").read_text()
    for placeholder, value in (("BUCKET", bucket), ("PREFIX", "p"), ("PRINCIPAL", f"arn:aws:iam:::user/{role}")):
        assert placeholder in text
        text = text.replace(placeholder, value)
    s3_server.owner_client().put_bucket_policy(Bucket=bucket, Policy=text)
    store.put("a", b"1")
    outside = open_store(f"s3://{bucket}/q")
    outside.put("a", b"not yours")
    session = s3_server.session(*users[role])
    theirs = open_store(session=session)
    for name, call in CALLS.items():
        if name in MAY[role]:
            call(theirs)
        else:
            with pytest.raises(StoreAccessError, match="AccessDenied"):
                call(theirs)
    with pytest.raises(ObjectNotFoundError):  # not "access denied": S3 tells only those who may list
        theirs.get("missing")
    with pytest.raises(ObjectNotFoundError):
        theirs.head("missing")
    trespassing = open_store(f"s3://{bucket}/q", session=session)
    for call in CALLS.values():
        with pytest.raises(StoreAccessError):
            call(trespassing)
    assert outside.get("a") == b"not yours"


def test_placeholders_are_the_only_thing_to_fill_in() -> None:
    for role in MAY:
        statements = json.loads((POLICIES / f"{role}.json").read_text())["Statement"]
        assert all(one["Principal"] == {"AWS": ["PRINCIPAL"]} for one in statements)
        actions = {action for one in statements for action in one["Action"]}
        assert ("s3:DeleteObject" in actions) == (role == "pruner")


@pytest.mark.parametrize(
    ("options", "headers"),
    [
        ({}, {}),
        ({"sse": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
        ({"sse": "aws:kms"}, {"x-amz-server-side-encryption": "aws:kms"}),
        (
            {"sse": "aws:kms", "sse_kms_key_id": KEY},
            {"x-amz-server-side-encryption": "aws:kms", "x-amz-server-side-encryption-aws-kms-key-id": KEY},
        ),
    ],
)
def test_encryption_is_asked_for_and_signed(
    options: dict[str, Any], headers: dict[str, str], open_store: Callable[..., S3Store], proxy: FaultProxy
) -> None:
    store = open_store(endpoint_url=proxy.url, **options)
    for call in (store.put, store.put_if_absent):
        proxy.add(Fault.SLOW_DOWN)
        with pytest.raises(StoreError):
            call("a", b"1")
    for exchange in proxy.requests():
        found = {name: value for name, value in exchange.headers.items() if "encryption" in name}
        assert found == headers
        assert set(found) <= signed_headers(exchange.headers)


def signed_headers(headers: dict[str, str]) -> set[str]:
    return set(headers["authorization"].split("SignedHeaders=")[1].split(",")[0].split(";"))


def test_the_expected_owner_is_in_every_request(open_store: Callable[..., S3Store], proxy: FaultProxy) -> None:
    store = open_store(endpoint_url=proxy.url, expected_bucket_owner=OWNER)
    store.put("a", b"1")
    store.put_if_absent("b", b"1")
    store.get("a")
    store.get_into("a", 0, bytearray(1))
    store.head("a")
    store.delete("b")
    assert [info.key for info in store.list("")] == ["a"]
    assert len(proxy.requests()) == 7
    for exchange in proxy.requests():
        assert exchange.headers["x-amz-expected-bucket-owner"] == OWNER
        assert "x-amz-expected-bucket-owner" in signed_headers(exchange.headers)


def test_another_owner_is_told(open_store: Callable[..., S3Store], proxy: FaultProxy) -> None:
    store = open_store(endpoint_url=proxy.url, expected_bucket_owner=OWNER)
    proxy.add(Fault.ANSWER, status=403, code="AccessDenied", count=2)
    with pytest.raises(StoreAccessError, match=f"account {OWNER}"):
        store.put("a", b"1")
    with pytest.raises(StoreAccessError, match=f"account {OWNER}"):
        list(store.list(""))


def test_over_https_a_checksum_and_over_http_a_signature(
    s3_server: S3Server, open_store: Callable[..., S3Store], proxy: FaultProxy
) -> None:
    store = open_store(endpoint_url=proxy.url)
    store.put("a", b"1")
    headers = proxy.requests("PUT")[0].headers
    assert len(headers["x-amz-content-sha256"]) == 64
    assert "x-amz-checksum-crc64nvme" not in headers
    if s3_server.tls_files is None:
        pytest.skip("the server has no TLS (radosgw with openssl has); the http half passed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*s3_server.tls_files)
    host, _, port = s3_server.url.removeprefix("http://").rpartition(":")
    with FaultProxy(host, int(port), tls=context) as encrypted:
        store = open_store(endpoint_url=encrypted.url)
        store.put("a", b"hello")
        assert store.get("a") == b"hello"
        headers = encrypted.requests("PUT")[-1].headers
        store.close()
    assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    assert headers["x-amz-checksum-crc64nvme"] == "M3eFcAZSQlc="  # of "hello"
    assert "x-amz-checksum-crc64nvme" in signed_headers(headers)


def test_check_bucket_warns_of_what_deletes_our_data(s3_server: S3Server, bucket: str, store: S3Store) -> None:
    assert check_bucket(store).warnings == ()
    client = s3_server.owner_client()
    client.put_bucket_lifecycle_configuration(
        Bucket=bucket,
        LifecycleConfiguration={
            "Rules": [
                {"ID": "all", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 30}},
                {"ID": "ours", "Status": "Enabled", "Filter": {"Prefix": "p/data/"}, "Expiration": {"Days": 3}},
                {"ID": "off", "Status": "Disabled", "Filter": {"Prefix": "p/"}, "Expiration": {"Days": 1}},
                {"ID": "neighbour", "Status": "Enabled", "Filter": {"Prefix": "p2/"}, "Expiration": {"Days": 1}},
            ]
        },
    )
    warnings = check_bucket(store).warnings
    assert len(warnings) == 2
    assert "'all' deletes objects after 30 days" in " ".join(warnings)
    assert "'ours' deletes objects after 3 days" in " ".join(warnings)


def test_a_writing_opening_tells_of_rules_that_delete_by_age(
    users: dict[str, tuple[str, str]],
    s3_server: S3Server,
    bucket: str,
    store: S3Store,
    open_store: Callable[..., S3Store],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The owner, who may ask, is told; a writer with the rights of writer.json, who may not, is not disturbed."""
    rule = {"ID": "all", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 30}}
    client = s3_server.owner_client()
    client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [rule]})
    with Checkpointer(store, {"w": torch.zeros(3)}, spot=None) as job:
        job.save_now(1).wait(60)
    assert ["'all' deletes objects after 30 days" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    text = (POLICIES / "writer.json").read_text()
    for placeholder, value in (("BUCKET", bucket), ("PREFIX", "p"), ("PRINCIPAL", "arn:aws:iam:::user/writer")):
        text = text.replace(placeholder, value)
    client.put_bucket_policy(Bucket=bucket, Policy=text)
    theirs = open_store(session=s3_server.session(*users["writer"]))
    with Checkpointer(theirs, {"w": torch.zeros(3)}, spot=None, keep=None) as job:
        assert job.restore() == 1
        job.save_now(2).wait(60)
    assert not caplog.records


def test_check_bucket_and_versions(s3_server: S3Server, open_store: Callable[..., S3Store]) -> None:
    bucket = s3_server.new_bucket(versioned=True)
    report = check_bucket(open_store(f"s3://{bucket}/p"))
    assert report.versioning == "Enabled"
    assert ["create-if-absent" in warning for warning in report.warnings] == [True, False]
    assert "no lifecycle rule ends them" in report.warnings[1]
    safe = json.loads((POLICIES / "lifecycle.json").read_text().replace("PREFIX", "p"))
    s3_server.owner_client().put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=safe)
    assert len(check_bucket(open_store(f"s3://{bucket}/p")).warnings) == 1


def test_check_bucket_and_everybody(s3_server: S3Server, bucket: str, store: S3Store) -> None:
    s3_server.owner_client().put_bucket_acl(Bucket=bucket, ACL="public-read")
    assert any("access list lets everybody in" in warning for warning in check_bucket(store).warnings)


def test_check_bucket_survives_anything(open_store: Callable[..., S3Store], proxy: FaultProxy) -> None:
    proxy.add(Fault.ANSWER, status=403, code="AccessDenied", count=100)
    report = check_bucket(open_store(endpoint_url=proxy.url))
    assert report.versioning is None
    assert report.warnings == ()
    assert len(report.unknown) == 4
    assert all("AccessDenied" in line for line in report.unknown)


def test_the_rights_of_a_reader_are_enough_to_evaluate(
    users: dict[str, tuple[str, str]],
    s3_server: S3Server,
    bucket: str,
    store: S3Store,
    open_store: Callable[..., S3Store],
) -> None:
    text = (POLICIES / "reader.json").read_text()
    for placeholder, value in (("BUCKET", bucket), ("PREFIX", "p"), ("PRINCIPAL", "arn:aws:iam:::user/reader")):
        text = text.replace(placeholder, value)
    s3_server.owner_client().put_bucket_policy(Bucket=bucket, Policy=text)
    theirs = open_store(session=s3_server.session(*users["reader"]))
    with Checkpointer(store, {"w": torch.full((3,), 5.0)}, spot=None) as job:
        job.save_now(1).wait(60)
        found = torch.zeros(3)
        with Checkpointer(theirs, {"w": found}, read_only=True) as evaluation:
            assert evaluation.restore() == 1
            assert found.eq(5).all()
        job.save_now(2).wait(60)
