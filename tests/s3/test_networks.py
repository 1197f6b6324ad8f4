"""Networks, proxies, certificates and forks as people have them. No S3 server is needed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from fastckpt.store import cloud
from tests.s3.manners import Request

pytest.importorskip("boto3", reason="s3:// needs boto3")
import fastckpt
from fastckpt.errors import (
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
    OBJECT,
    MannersServer,
    SilentServer,
    is_object,
    refuses,
    takes_all_answers_nothing,
)

pytestmark = pytest.mark.usefixtures("environment")


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
        answers.put(is_object(fastckpt.load("s3://lab/x")) and store.get("x") == data)

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


@pytest.mark.parametrize("tokens", ["one", "two", "new ones"])
def test_pages_that_do_not_end_are_an_error(
    tokens: str, server: MannersServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud, "_MOST_EMPTY_PAGES", 20)
    pages = iter(range(1000))
    different = {"one": 1, "two": 2, "new ones": 1000}[tokens]

    def manner(request: Request) -> bool:
        more = (
            f"<IsTruncated>true</IsTruncated><NextContinuationToken>t{next(pages) % different}</NextContinuationToken>"
        )
        return request.answer(200, f"<ListBucketResult>{more}</ListBucketResult>")

    server.manners.append(manner)
    with pytest.raises(StoreUnavailableError, match="pages do not end"):
        list(open_s3("s3://lab/run").list(""))


@pytest.mark.parametrize("location", ["http://[::1", "http://user:word@[::1"])
def test_a_redirect_to_nowhere(location: str, server: MannersServer) -> None:
    server.manners.append(lambda request: request.answer(307, "", {"Location": location}))
    with pytest.raises(StoreError, match="redirects to another place"):
        open_s3("s3://lab/run").get("a")


@pytest.mark.parametrize("proxy", ["http://[::1", "http://user:word@[::1", "user:word@[::1"])
def test_a_proxy_that_is_no_url(proxy: str, server: MannersServer, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HTTP_PROXY", proxy)
    with pytest.raises(StoreError, match="none that can be used") as caught:
        open_s3("s3://lab/run")
    assert "word" not in "".join(traceback.format_exception(caught.value))


def test_a_time_that_is_none(server: MannersServer) -> None:
    headers = {"ETag": '"x"', "Last-Modified": f"Mon, 01 Jan {10**19} 00:00:00 GMT"}
    server.manners.append(lambda request: request.answer(200, "", headers))
    with pytest.raises(StoreUnavailableError, match="not one of S3"):
        open_s3("s3://lab/run").head("a")


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
