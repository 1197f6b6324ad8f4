"""Stores, gateways and networks as people have them: each works, or says what to do. No S3 server is needed."""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("boto3", reason="s3:// needs boto3")

import fastckpt
from fastckpt.errors import (
    ObjectNotFoundError,
    SaveError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from fastckpt.store.cloud import S3Store, open_s3
from fastckpt.store.cloud_connection import connect
from fastckpt.store.cloud_proxy import proxy_of
from fastckpt.store.wrap import Retrying
from fastckpt.testing.fault_proxy import FaultProxy
from fastckpt.writing.object_sink import ObjectSink
from tests.s3.manners import (
    MannersServer,
    SilentServer,
    in_another_region,
    login_page,
    no_checksum_headers_400,
    no_checksum_headers_501,
    no_encoding_type,
    object_lock,
    public_only,
    redirects,
    refuses,
    requester_pays,
    self_signed,
    takes_all_answers_nothing,
)

OBJECT = {"a": torch.arange(3)}
NAMES = [
    "epoch=0-step=1.ckpt",
    "model (1).pt",
    "best@3.pt",
    "model:test.ckpt",
    "a+b,c.pt",
    "größe.pt",
    "重み.pt",
    "100%.pt",
    "a%20b?c#d.pt",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.upper().startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIA1",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def server(environment: pytest.MonkeyPatch) -> Iterator[MannersServer]:
    with MannersServer() as found:
        environment.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


@pytest.fixture
def encrypted(environment: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MannersServer]:
    """With a certificate that is its own authority, which AWS_CA_BUNDLE names."""
    cert, key = self_signed(tmp_path)
    with MannersServer(tls=(cert, key)) as found:
        environment.setenv("AWS_ENDPOINT_URL", found.url)
        environment.setenv("AWS_CA_BUNDLE", cert)
        yield found


def same(found: Any) -> bool:
    return bool(torch.equal(found["a"], OBJECT["a"]))


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
    assert same(fastckpt.load("s3://lab/x"))


def test_a_public_bucket_needs_no_keys(server: MannersServer, environment: pytest.MonkeyPatch) -> None:
    fastckpt.save(OBJECT, "s3://lab/x")
    server.manners.append(public_only)
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreAccessError, match="AWS_NO_SIGN_REQUEST=true"):
        fastckpt.load("s3://lab/x")
    environment.setenv("AWS_NO_SIGN_REQUEST", "true")
    assert same(fastckpt.load("s3://lab/x"))
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
    server.objects["run/a"] = b"1"
    server.manners.append(refuses(403, "", method="HEAD"))
    with pytest.raises(StoreAccessError, match="HTTP 403"):
        open_s3("s3://lab/run").head("a")


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


@pytest.mark.parametrize(
    "variables",
    [
        {"AWS_ACCESS_KEY_ID": "AKIA\n"},
        {"AWS_SECRET_ACCESS_KEY": "secret\n"},
        {"AWS_SESSION_TOKEN": "to ken"},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:1\n"},
        {"AWS_ENDPOINT_URL": " http://127.0.0.1:1"},
        {"AWS_ENDPOINT_URL": "http://minio:${MINIO_PORT}"},
        {"AWS_ENDPOINT_URL": "minio:9000"},
        {"AWS_REGION": "us-east-1\n"},
        {"AWS_REGION": "us east"},
        {"AWS_DEFAULT_REGION": "us-east-1\n"},
        {"HTTP_PROXY": "socks5://127.0.0.1:1"},
    ],
)
def test_white_space_and_other_slips_are_told(
    variables: dict[str, str], server: MannersServer, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(StoreError) as caught:
        fastckpt.load("s3://lab/x")
    assert "secret" not in str(caught.value).replace("the secret key", "")
    assert server.log == []


@pytest.mark.parametrize("name", NAMES)
def test_an_object_may_be_called_so(name: str, server: MannersServer) -> None:
    url = f"s3://lab/runs/ä=1/{name}"
    fastckpt.save(OBJECT, url)
    assert list(server.objects) == [f"runs/ä=1/{name}"]
    assert same(fastckpt.load(url))
    buffer = io.BytesIO()
    torch.save(OBJECT, buffer)
    server.objects[f"runs/ä=1/{name}"] = buffer.getvalue()
    assert same(fastckpt.load(url))


@pytest.mark.parametrize("name", ["a//b", "../b", "a/./b", "a\tb", "a\nb", "\udc80"])
def test_no_object_is_called_so(name: str, server: MannersServer) -> None:
    with pytest.raises((StoreError, SaveError), match=r"no name of an object|no S3 location|names no object"):
        fastckpt.save(OBJECT, f"s3://lab/dir/{name}")
    assert server.log == []


@pytest.mark.parametrize("encoding", [True, False])
def test_strangers_below_a_prefix_are_ignored_aloud(
    encoding: bool, server: MannersServer, caplog: pytest.LogCaptureFixture
) -> None:
    if not encoding:
        server.manners.append(no_encoding_type)
    state = {"s": {"t": torch.ones(3)}}
    with fastckpt.Checkpointer("s3://lab/run", state, spot=None) as ckpt:
        ckpt.restore()
        ckpt.save_now(1).wait()
    for name in ("a//b", "../x", "with\ttab", "größe (1).json", "%2e%2e"):
        server.objects[f"run/commits/{name}"] = b"?"
    caplog.clear()
    with fastckpt.Checkpointer("s3://lab/run", state, spot=None) as ckpt:
        assert ckpt.restore() == 1
    told = [record for record in caplog.records if "no name that fastckpt gives" in record.getMessage()]
    assert len(told) == 1
    assert told[0].levelno == logging.WARNING


def test_a_self_signed_certificate_works_if_it_is_in_the_bundle(
    encrypted: MannersServer, environment: pytest.MonkeyPatch
) -> None:
    fastckpt.save(OBJECT, "s3://lab/x")
    environment.delenv("AWS_CA_BUNDLE")
    with pytest.raises(StoreError, match=r"self-signed certificate.*AWS_CA_BUNDLE") as caught:
        open_s3("s3://lab").get("x")
    assert not isinstance(caught.value, StoreUnavailableError)


@pytest.mark.parametrize(
    ("no_proxy", "direct"),
    [
        ("", False),
        ("other.example.org", False),
        ("127.0.0.2", False),
        ("127.0.0.1", True),
        ("127.0.0.1:{port}", True),
        ("127.0.0.1:1", False),
        ("localhost, 127.0.0.0/8", True),
        ("10.0.0.0/8", False),
        ("*", True),
    ],
)
def test_no_proxy(no_proxy: str, direct: bool, server: MannersServer, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NO_PROXY", no_proxy.format(port=server.port))
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    with FaultProxy(host, int(port)) as proxy:  # it passes on what it gets, and takes whole URLs as targets
        environment.setenv("HTTP_PROXY", f"http://user:p%40ss@{proxy.url.removeprefix('http://')}")
        store = open_s3("s3://lab/run")
        assert (proxy_of(server.url) is None) is direct
        store.delete("a")
        assert bool(proxy.requests()) is not direct
        if not direct:
            (seen,) = proxy.requests()
            assert seen.target == f"{server.url}/lab/run/a"
            assert seen.headers["proxy-authorization"] == "Basic dXNlcjpwQHNz"


def test_addresses(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def endpoint(url: str, style: str = "auto") -> str:
        (tmp_path / "config").write_text(f"[default]\nregion = eu-west-1\ns3 =\n  addressing_style = {style}\n")
        environment.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        return open_s3(url).connection.endpoint

    assert endpoint("s3://plain/run") == "https://plain.s3.eu-west-1.amazonaws.com"
    assert endpoint("s3://plain/run", "path") == "https://s3.eu-west-1.amazonaws.com"
    for bucket in ("with.dots", "my_bucket", "MyBucket"):
        for style in ("auto", "virtual"):
            assert endpoint(f"s3://{bucket}/run", style) == "https://s3.eu-west-1.amazonaws.com"


def test_a_fork_of_a_process_that_used_s3_may_use_it(server: MannersServer) -> None:
    """A new store, and the parent's own, in two children at once."""
    fastckpt.save(OBJECT, "s3://lab/x")
    store = open_s3("s3://lab")
    data = store.get("x")
    context = multiprocessing.get_context("fork")
    held = store.connection.credentials._lock  # as by a thread that asks for keys just now
    held.acquire()

    def child(answers: Any) -> None:
        answers.put(same(fastckpt.load("s3://lab/x")) and store.get("x") == data)

    answers = context.SimpleQueue()
    children = [context.Process(target=child, args=(answers,)) for _ in range(2)]
    for one in children:
        one.start()
    held.release()
    for one in children:
        one.join(60)
        assert one.exitcode == 0
    assert [answers.get(), answers.get()] == [True, True]
    assert store.get("x") == data  # the parent's connections are its own


def test_a_slow_line_is_no_stall(server: MannersServer) -> None:
    """6 s for two bodies, which the test takes; 1.5 s without progress is a stall, and the size gives nothing on top."""
    with FaultProxy("127.0.0.1", server.port, bytes_per_s=1e6) as proxy:
        store = open_s3("s3://lab/run", endpoint_url=proxy.url, stall_timeout_s=1.5, slowest_bytes_per_s=1 << 30)
        bodies = [random.Random(number).randbytes(3_000_000) for number in range(2)]
        threads = [threading.Thread(target=store.put, args=(str(n), body)) for n, body in enumerate(bodies)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [server.objects.get(f"run/{n}") == body for n, body in enumerate(bodies)] == [True, True]
    assert len(server.requests("PUT")) == 2


def test_a_store_that_takes_all_and_answers_nothing_is_found(
    server: MannersServer, caplog: pytest.LogCaptureFixture
) -> None:
    """After 4.25 s, which the test takes: 4 s without progress, and 1 MiB at 4 MiB/s. Before that a line in the log."""
    release = threading.Event()
    server.manners.append(takes_all_answers_nothing(release))
    store = open_s3("s3://lab/run", stall_timeout_s=4.0, slowest_bytes_per_s=4 << 20)
    started = time.monotonic()
    with pytest.raises(
        StoreUnavailableError, match=r"of 1048576 bytes 1048576 went out.*slowest_bytes_per_s"
    ) as caught:
        store.put("a", bytes(1 << 20))
    assert 4.25 <= time.monotonic() - started < 4.25 + 5.0
    assert not caught.value.refused
    assert any("nothing has moved for 3 s" in record.getMessage() for record in caplog.records)
    release.set()


def test_a_proxy_whose_name_cannot_be(server: MannersServer, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTP_PROXY", "http://a..b:1")
    with pytest.raises(StoreUnavailableError, match="none that can be resolved"):
        open_s3("s3://lab/run").get("a")


def test_a_server_that_reads_nothing_is_found() -> None:
    with SilentServer() as silent:
        store = open_s3("s3://lab/run", endpoint_url=silent.url, stall_timeout_s=0.5, slowest_bytes_per_s=1 << 30)
        with pytest.raises(StoreUnavailableError, match="no answer in time"):
            store.put("a", bytes(64 << 20))
        with pytest.raises(StoreUnavailableError, match="no answer in time"):
            store.get("a")


def test_trying_is_told_before_five_seconds_have_passed(caplog: pytest.LogCaptureFixture) -> None:
    """By a clock of its own: every try fails at once, pauses are as long as they can be."""
    now = [0.0]
    told: list[float] = []

    def pause(seconds: float) -> None:
        if caplog.records and not told:
            told.append(now[0])
        now[0] += seconds

    store = Retrying(
        open_s3("s3://lab/run", endpoint_url="http://127.0.0.1:1"),
        sleep=pause,
        clock=lambda: now[0],
        jitter=lambda: 1.0,
    )
    with pytest.raises(StoreUnavailableError, match=r"refused.*given up after"):
        store.head("a")
    assert told[0] < 5.0
    assert 3 <= len(caplog.records) <= 5  # then every half minute
    assert "tried again until 120 s have passed" in caplog.records[0].getMessage()


def test_what_is_wrong_with_the_endpoint_is_told(server: MannersServer, encrypted: MannersServer) -> None:
    plain, tls = f"http://127.0.0.1:{server.port}", f"https://127.0.0.1:{encrypted.port}"
    for url, words in (
        (plain.replace("http:", "https:"), "no TLS with .*http://"),
        (tls.replace("https:", "http:"), "wants https|broke|closed"),
        ("http://127.0.0.1:1", "refused"),
        ("http://no-such-host.invalid", "cannot be resolved"),
    ):
        with pytest.raises(StoreUnavailableError, match=words):
            open_s3("s3://lab/run", endpoint_url=url).get("a")


@pytest.mark.parametrize("status", [403, 500, 501])
def test_a_failed_put_of_a_mapped_file_is_its_own_error(status: int, server: MannersServer) -> None:
    """Past 64 MiB the object lies in a file, which must be gone with the save."""
    server.manners.append(refuses(status, "AccessDenied"))
    before = _deleted_files()
    store = Retrying(open_s3("s3://lab"), give_up_s=0.0)
    errors = []
    for n_bytes in (1, (64 << 20) + 1):
        sink = ObjectSink(store, "x", owns_store=False)
        sink.write(bytes(n_bytes))
        with pytest.raises(StoreError) as caught:
            sink.commit()
        sink.abandon()
        errors.append(caught.value)  # as a handle of save_async keeps it
    assert type(errors[0]) is type(errors[1])
    assert _deleted_files() == before


def _deleted_files() -> list[str]:
    """That this process holds open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(path for path in found if path.endswith("(deleted)"))


def test_a_full_spool_names_its_directory(server: MannersServer, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = ObjectSink(open_s3("s3://lab"), "x")

    def full(data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sink._spool, "write", full)
    with pytest.raises(StoreFullError, match=r"\$TMPDIR") as caught:
        sink.write(b"1")
    assert tempfile.gettempdir() in str(caught.value)
    sink.abandon()


def test_more_than_one_put_can_carry_is_known_early(
    server: MannersServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(S3Store, "most_put_bytes", 100_000)
    state = {"a": torch.randint(0, 256, (1_000_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(StoreError, match=r"one PUT cannot carry; nothing was sent. Use a Checkpointer"):
        fastckpt.save(state, "s3://lab/x")
    assert "A Checkpointer has no such limit" in caplog.text
    assert server.requests("PUT") == []


def test_connect_has_defaults_for_what_is_new(server: MannersServer) -> None:
    options = {
        "sse": None, "sse_kms_key_id": None, "expected_bucket_owner": None, "connect_timeout_s": 4.0, "stall_timeout_s": 20.0,
        "slowest_bytes_per_s": 1, "connections": 1,
    }  # fmt: skip
    found = connect("s3://lab/run", **options)  # type: ignore[arg-type]
    assert (found.anonymous, found.request_payer, found.checksum) == (False, False, None)
