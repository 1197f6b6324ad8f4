"""Stores and gateways as people have them: each works, or says what to do. No S3 server is needed."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("boto3", reason="s3:// needs boto3")
import fastckpt
from fastckpt.errors import (
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
)
from fastckpt.store import cloud
from fastckpt.store.body import Body
from fastckpt.store.cloud import S3Store, open_s3
from fastckpt.store.wrap import Retrying
from tests.s3.manners import (
    OBJECT,
    MannersServer,
    in_another_region,
    is_object,
    login_page,
    no_checksum_headers_400,
    no_checksum_headers_501,
    object_lock,
    public_only,
    redirects,
    refuses,
    requester_pays,
    verifies_checksums,
)

pytestmark = pytest.mark.usefixtures("environment")


def checksums(server: MannersServer) -> list[str]:
    """Of each PUT, which header had one."""
    return [
        next((n.lower() for n in put.headers if n.lower() == "content-md5" or n.lower().startswith("x-amz-check")), "")
        for put in server.requests("PUT")
    ]


@pytest.mark.parametrize("manner", [no_checksum_headers_501, no_checksum_headers_400])
def test_a_store_that_refuses_checksum_headers_gets_content_md5(manner: Any, encrypted: MannersServer) -> None:
    encrypted.manners.append(manner)
    with open_s3("s3://lab/run") as store:
        store.put("a", b"1")
        store.put_if_absent("b", b"2")
        assert store.get("a") == b"1"
    assert checksums(encrypted) == ["x-amz-checksum-crc64nvme", "content-md5", "content-md5"]


def test_a_checksum_that_is_known_is_not_computed_again(
    encrypted: MannersServer, environment: pytest.MonkeyPatch
) -> None:
    body = Body.of(np.frombuffer(b"123456789", np.uint8), 0xAE8B14860A799888)
    environment.setattr(cloud, "crc64nvme", None)
    with open_s3("s3://lab/run") as store:
        Retrying(store).put("a", body)
        assert store.get("a") == b"123456789"
    (put,) = encrypted.requests("PUT")
    assert put.headers["x-amz-checksum-crc64nvme"] == "rosUhgp5mIg="


@pytest.mark.parametrize("way", ["variable", "profile", "option"])
def test_checksums_only_when_required(
    way: str, encrypted: MannersServer, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encrypted.manners.append(no_checksum_headers_501)
    if way == "variable":
        environment.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    if way == "profile":
        (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = WHEN_REQUIRED\n")
        environment.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with open_s3("s3://lab/run", **({"checksum": "md5"} if way == "option" else {})) as store:
        store.put("a", b"1")
    assert checksums(encrypted) == ["content-md5"]


def test_a_501_that_names_no_header_is_explained_with_both(server: MannersServer) -> None:
    server.manners.append(refuses(501, "NotImplemented"))
    with pytest.raises(StoreError, match=r"If-None-Match.*AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        open_s3("s3://lab/run").put_if_absent("a", b"1")


def test_object_lock_over_http(server: MannersServer) -> None:
    server.manners.append(object_lock)
    store = open_s3("s3://lab/run")
    store.put("a", b"1")
    store.put("b", b"2")
    assert checksums(server) == ["", "content-md5", "content-md5"]
    assert server.objects == {"run/a": b"1", "run/b": b"2"}


@pytest.mark.parametrize("checksum", ["crc64nvme", "md5"])
def test_a_body_that_arrived_damaged_is_sent_again_as_it_was(checksum: str, encrypted: MannersServer) -> None:
    """S3's words for it name the header, as its words for a missing header do."""
    flips: list[int] = []

    def flips_once(request: Any) -> bool:
        if request.command == "PUT" and not flips:
            flips.append(1)
            request.body = b"2"
        return False

    encrypted.manners += [flips_once, verifies_checksums]
    with Retrying(open_s3("s3://lab/run", checksum=checksum), sleep=lambda seconds: None) as store:
        store.put("a", b"1")
    assert encrypted.objects == {"run/a": b"1"}
    assert [name.removeprefix("x-amz-checksum-").removeprefix("content-") for name in checksums(encrypted)] == [
        checksum
    ] * 2


def test_an_unknown_checksum_setting_is_refused(server: MannersServer, environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="checksum is 'sha1'"):
        open_s3("s3://lab/run", checksum="sha1")
    environment.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "never")
    with pytest.raises(StoreError, match="never"):
        open_s3("s3://lab/run")


def test_requester_pays(server: MannersServer, environment: pytest.MonkeyPatch) -> None:
    server.manners.append(requester_pays)
    with pytest.raises(StoreAccessError, match="AWS_REQUEST_PAYER=requester"):
        fastckpt.save(OBJECT, "s3://lab/x")
    open_s3("s3://lab/run", request_payer=True).put("a", b"1")
    environment.setenv("AWS_REQUEST_PAYER", "requester")
    fastckpt.save(OBJECT, "s3://lab/x")
    assert is_object(fastckpt.load("s3://lab/x"))


def test_a_public_bucket_needs_no_keys(server: MannersServer, environment: pytest.MonkeyPatch) -> None:
    fastckpt.save(OBJECT, "s3://lab/x")
    server.manners.append(public_only)
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreAccessError, match="AWS_NO_SIGN_REQUEST=true"):
        fastckpt.load("s3://lab/x")
    environment.setenv("AWS_NO_SIGN_REQUEST", "true")
    assert is_object(fastckpt.load("s3://lab/x"))
    with pytest.raises(StoreAccessError, match="InvalidAccessKeyId"):
        open_s3("s3://lab", anonymous=False, session=_session()).get("x")


def _session() -> Any:
    import boto3

    return boto3.Session(aws_access_key_id="other", aws_secret_access_key="another")


def test_the_region_that_the_error_names_helps(server: MannersServer, environment: pytest.MonkeyPatch) -> None:
    server.manners.append(in_another_region)
    for call in (lambda: fastckpt.save(OBJECT, "s3://lab/x"), lambda: fastckpt.load("s3://lab/x")):
        with pytest.raises(StoreAccessError, match=r"not in region us-east-1: it is in eu-central-1. Set AWS_REGION"):
            call()
    environment.setenv("AWS_REGION", "eu-central-1")
    environment.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    fastckpt.save(OBJECT, "s3://lab/x")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_that_says_where_to(status: int, server: MannersServer) -> None:
    with MannersServer() as other:
        other.objects |= {"run/a": b"old", "run/b": b"old"}
        server.manners.append(redirects(status, other.url))
        store = open_s3("s3://lab/run")
        calls: list[Callable[[], Any]] = [
            lambda: store.put("a", b"new"),
            lambda: store.put_if_absent("c", b"new"),
            lambda: store.get("a"),
            lambda: store.head("a"),
            lambda: list(store.list("")),
            lambda: store.delete("b"),
        ]
        for call in calls:
            with pytest.raises(StoreError, match=rf"redirects to 127.0.0.1:{other.port} \(HTTP {status}") as caught:
                call()
            assert not isinstance(caught.value, (StoreUnavailableError, ObjectNotFoundError))
        assert other.log == []


HTML: list[tuple[str, Callable[[S3Store], Any]]] = [
    ("PUT", lambda store: store.put("a", b"1")),
    ("GET", lambda store: store.get("a")),
    ("GET", lambda store: store.get_into("a", 0, bytearray(1))),
    ("HEAD", lambda store: store.head("a")),
    ("GET", lambda store: list(store.list(""))),
    ("DELETE", lambda store: store.delete("a")),
]


@pytest.mark.parametrize(("method", "call"), HTML)
def test_a_login_page_is_no_answer(method: str, call: Callable[[S3Store], Any], server: MannersServer) -> None:
    server.objects["run/a"] = b"old"
    server.manners.append(login_page((method,)))
    with pytest.raises(StoreUnavailableError, match="not one of S3"):
        call(open_s3("s3://lab/run"))
    assert server.objects == {"run/a": b"old"}


def test_a_login_page_for_listings_does_not_start_a_run_anew(server: MannersServer) -> None:
    state = {"s": {"t": torch.ones(3)}}
    with fastckpt.Checkpointer("s3://lab/run", state, spot=None) as ckpt:
        ckpt.restore()
        ckpt.save_now(1).wait()
    server.manners.append(login_page(listings_only=True))
    store = Retrying(open_s3("s3://lab/run"), give_up_s=0.0)
    with pytest.raises(StoreUnavailableError, match="login page"):
        fastckpt.Checkpointer(store, state, spot=None).restore()


@pytest.mark.parametrize(
    "listing",
    [
        "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        "<ListBucketResult><Contents><Key>run/a</Key></Contents></ListBucketResult>",
        "<ListBucketResult><Contents>",
        "<Error><Code>InternalError</Code></Error>",
        '<?xml version="1.0" encoding="none of these"?><ListBucketResult/>',
        '<?xml version="1.0" encoding="gbk"?><ListBucketResult/>',
        "<ListBucketResult><Contents><Key>run/a</Key><LastModified>2024-01-01T00:00:00Z</LastModified><Size>-1</Size></Contents>"
        "</ListBucketResult>",
    ],
)
def test_half_a_listing_is_none(listing: str, server: MannersServer) -> None:
    server.manners.append(lambda request: "list-type" in request.query and request.answer(200, listing))
    with pytest.raises(StoreUnavailableError, match="not one of S3"):
        list(open_s3("s3://lab/run").list(""))


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "SignatureDoesNotMatch", "SignatureDoesNotMatch"),
        (403, "InvalidAccessKeyId", "InvalidAccessKeyId"),
        (400, "ExpiredToken", "has expired"),
        (403, "RequestTimeTooSkewed", "clock"),
        (403, "AccessDenied", "policies"),
        (403, "InvalidObjectState", "archive"),
        (404, "NoSuchBucket", "bucket does not exist"),
    ],
)
def test_a_refused_head_has_a_reason(status: int, code: str, words: str, server: MannersServer) -> None:
    server.manners.append(refuses(status, code))
    with pytest.raises(StoreError, match=words):
        open_s3("s3://lab/run").head("a")
    assert [one.method for one in server.log] == ["HEAD", "GET"]


def test_only_a_head_is_refused(server: MannersServer) -> None:
    server.objects["run/a"] = b"12345"
    server.objects["run/empty"] = b""
    store = open_s3("s3://lab/run")
    expected = store.head("a")
    server.manners.append(refuses(403, "", method="HEAD"))
    assert store.head("a") == expected
    with pytest.raises(StoreAccessError, match="HTTP 403"):  # there is no first byte to ask for
        store.head("empty")


def test_new_keys_are_found_when_a_head_is_refused(
    server: MannersServer, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = OLD\naws_secret_access_key = secret\n")
    environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    server.objects["run/a"] = b"1"
    server.manners.append(
        lambda request: "Credential=OLD/" in request.headers["Authorization"] and request.refuse(400, "ExpiredToken")
    )
    store = Retrying(open_s3("s3://lab/run"), sleep=lambda seconds: None)
    file.write_text("[default]\naws_access_key_id = NEW\naws_secret_access_key = secret\n")
    assert store.head("a").n_bytes == 1


RIGHTS: list[tuple[Callable[[S3Store], Any], str]] = [
    (lambda store: store.put("a", b"1"), "s3:PutObject"),
    (lambda store: store.put_if_absent("a", b"1"), "s3:PutObject"),
    (lambda store: store.replace_if_match("a", b"1", "x"), "s3:PutObject"),
    (lambda store: store.get("a"), "s3:GetObject; and s3:ListBucket"),
    (lambda store: store.get_into("a", 0, bytearray(1)), "s3:GetObject; and s3:ListBucket"),
    (lambda store: store.head("a"), "s3:GetObject; and s3:ListBucket"),
    (lambda store: list(store.list("")), "s3:ListBucket"),
    (lambda store: store.delete("a"), "s3:DeleteObject"),
]


@pytest.mark.parametrize(("call", "right"), RIGHTS)
def test_the_right_that_is_missing_is_named(call: Callable[[S3Store], Any], right: str, server: MannersServer) -> None:
    server.manners.append(refuses(403, "AccessDenied"))
    with pytest.raises(StoreAccessError, match=f"This request needs {right}"):
        call(open_s3("s3://lab/run"))


@pytest.mark.parametrize(("ahead_s", "words"), [(1200, "20 minutes ahead of"), (-3600, "60 minutes behind")])
def test_a_wrong_clock_is_told_how_wrong_it_is(ahead_s: int, words: str, server: MannersServer) -> None:
    def refuses_with_its_time(request: Any) -> bool:
        request.date_time_string = lambda: email.utils.formatdate(time.time() - ahead_s, usegmt=True)
        return bool(request.refuse(403, "RequestTimeTooSkewed"))

    server.manners.append(refuses_with_its_time)
    with pytest.raises(StoreAccessError, match=f"Set this machine's clock.*it is {words} the server's"):
        open_s3("s3://lab/run").get("a")


def test_slow_down_says_what_helps(server: MannersServer) -> None:
    server.manners.append(refuses(503, "SlowDown"))
    with pytest.raises(StoreUnavailableError, match=r"SlowDown.*fewer connections or ranks.*given up after"):
        Retrying(open_s3("s3://lab/run"), give_up_s=0.0).put("a", b"1")


@pytest.mark.parametrize("part", ["/data/", "/votes/", "/commits/"])
def test_each_write_of_a_save_may_be_refused_alone(part: str, server: MannersServer) -> None:
    """One kind of object may not be put: the save fails with the right that is missing, and the one before it stands."""
    state = {"s": {"t": torch.randn(10_000)}}
    with fastckpt.Checkpointer("s3://lab/run", state, spot=None) as ckpt:
        ckpt.save_now(1).wait(60)

    def save_without_the_right() -> None:
        with fastckpt.Checkpointer("s3://lab/run", state, spot=None) as ckpt:
            ckpt.restore()
            state["s"]["t"] += 1
            server.manners.append(
                lambda request: (
                    request.command == "PUT" and part in request.path and request.refuse(403, "AccessDenied")
                )
            )
            ckpt.save_now(2).wait(60)

    with pytest.raises(StoreAccessError, match=f"{part}.*s3:PutObject"):
        save_without_the_right()
    with fastckpt.Checkpointer("s3://lab/run", state, spot=None, read_only=True) as ckpt:
        assert ckpt.restore() == 1
