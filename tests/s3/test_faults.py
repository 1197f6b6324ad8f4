"""Every fault of the proxy against the store without retries: the right kind of error, and the server has what it should."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from fastckpt.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    UnsupportedVerbError,
)
from fastckpt.store.base import Store
from fastckpt.store.cloud import S3Store
from fastckpt.store.cloud_errors import Answer, read_answer, translate
from fastckpt.store.wrap import Retrying
from fastckpt.testing.fault_proxy import Fault, FaultProxy
from fastckpt.writing.object_sink import ObjectSink
from tests.s3server import S3Server

pytestmark = pytest.mark.s3

OLD, NEW = b"old" * 1000, bytes(range(256)) * 1024
VERBS: dict[str, Callable[[Store], Any]] = {
    "put": lambda store: store.put("a/x", NEW),
    "put_if_absent": lambda store: store.put_if_absent("a/y", NEW),
    "get": lambda store: store.get("a/x"),
    "get_into": lambda store: store.get_into("a/x", 10, bytearray(2000)),
    "head": lambda store: store.head("a/x"),
    "list": lambda store: list(store.list("a/")),
    "delete": lambda store: store.delete("a/x"),
}
WITH_BODY = ("put", "put_if_absent")
WITH_ANSWER = ("get", "get_into", "list")
CASES = [
    *(
        (fault, verb)
        for fault in (Fault.SLOW_DOWN, Fault.INTERNAL_ERROR, Fault.RESET, Fault.LOST_ACK)
        for verb in VERBS
    ),
    *((fault, verb) for fault in (Fault.TRUNCATE, Fault.STALL_RESPONSE) for verb in WITH_ANSWER),
    *((Fault.STALL, verb) for verb in VERBS if verb not in WITH_BODY),
    *((Fault.ERROR_IN_200, verb) for verb in VERBS),
    *((Fault.FLIP_REQUEST, verb) for verb in WITH_BODY),
]


@pytest.fixture
def filled(store: S3Store) -> S3Store:
    """a/x holds OLD; a/y is not there."""
    store.put("a/x", OLD)
    return store


@pytest.mark.parametrize(("fault", "verb"), CASES, ids=[f"{fault.name}-{verb}" for fault, verb in CASES])
def test_a_fault_is_worth_another_try_and_leaves_no_part(
    fault: Fault, verb: str, s3_server: S3Server, filled: S3Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    if fault is Fault.FLIP_REQUEST and not s3_server.checks_signatures:
        pytest.skip(f"{s3_server.kind} does not verify what it is sent")
    rule = proxy.add(fault)
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError) as caught:
        VERBS[verb](faulty)
    assert rule.reached.is_set()
    if verb in WITH_BODY:  # of all else it does not matter
        assert caught.value.refused == (fault in (Fault.SLOW_DOWN, Fault.FLIP_REQUEST))
    assert "Retry" not in str(caught.value)  # ours, not the debug text
    assert faulty.url in str(caught.value)
    if fault in (Fault.STALL, Fault.STALL_RESPONSE):
        assert time.monotonic() - started < 1.0 + 5.0, (
            "a stall of 1 s took far longer; 5 s is what a loaded machine may add"
        )
    landed = fault is Fault.LOST_ACK  # what is still held in the proxy may land late, once it is released
    if verb == "put":
        assert filled.get("a/x") == (NEW if landed else OLD)
    if verb == "put_if_absent":
        assert [info.key for info in filled.list("")] == (["a/x", "a/y"] if landed else ["a/x"])
    if verb == "delete":
        assert [info.key for info in filled.list("")] == ([] if landed else ["a/x"])
    # and all is well again, on the same store
    proxy.clear()
    if not landed and (fault, verb) != (Fault.STALL, "put_if_absent"):  # that one may have landed by now
        VERBS[verb](faulty)


def test_a_save_over_one_that_got_no_answer_is_told(
    faulty: S3Store, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    patient = Retrying(faulty, sleep=lambda seconds: None)

    def save(key: str) -> None:
        sink = ObjectSink(patient, key, owns_store=False)
        sink.write(NEW)
        sink.commit()

    for fault, told in ((Fault.SLOW_DOWN, False), (Fault.LOST_ACK, True)):
        proxy.add(fault, method="PUT")
        save(fault.name)
        assert not caplog.records
        save(fault.name)
        assert (f"{faulty.url}/{fault.name} is saved, but" in caplog.text) == told


def test_a_store_that_cannot_be_reached_was_sent_nothing(open_store: Callable[..., S3Store]) -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        open_store(endpoint_url="http://127.0.0.1:1").put("x", NEW)
    assert caught.value.refused


def test_a_lost_ack_of_a_create_is_found_to_be_ours(store: S3Store, faulty: S3Store, proxy: FaultProxy) -> None:
    patient = Retrying(faulty, sleep=lambda seconds: None)
    proxy.add(Fault.LOST_ACK, method="PUT", match="/mine$")
    patient.put_if_absent("mine", b"mine")
    assert store.get("mine") == b"mine"
    # but another's object is not
    store.put("theirs", b"theirs")
    proxy.add(Fault.SLOW_DOWN, method="PUT", match="/theirs$")
    with pytest.raises(ObjectExistsError):
        patient.put_if_absent("theirs", b"mine")
    assert store.get("theirs") == b"theirs"


def test_a_flipped_bit_in_an_answer_passes(filled: S3Store, faulty: S3Store, proxy: FaultProxy) -> None:
    """Documented: stores do not verify what they read; digests of the format do. If this fails, docs/stores.md is to be changed."""
    proxy.add(Fault.FLIP_RESPONSE)
    found = faulty.get("a/x")
    assert len(found) == len(OLD)
    assert found != OLD


@pytest.mark.parametrize(
    ("status", "code", "verb", "expected"),
    [
        (400, "BadDigest", "put", StoreUnavailableError),
        (400, "EntityTooLarge", "put", StoreError),
        (400, "InvalidArgument", "get", StoreError),
        (400, "RequestTimeout", "put", StoreUnavailableError),
        (400, "ExpiredToken", "get", StoreAccessError),
        (401, "Unauthorized", "get", StoreAccessError),
        (403, "AccessDenied", "put", StoreAccessError),
        (403, "", "head", StoreAccessError),
        (403, "InvalidAccessKeyId", "list", StoreAccessError),
        (403, "RequestTimeTooSkewed", "get", StoreAccessError),
        (404, "NoSuchBucket", "get", StoreError),
        (404, "NoSuchBucket", "put", StoreError),
        (404, "NoSuchBucket", "list", StoreError),
        (404, "NoSuchBucket", "delete", StoreError),
        (404, "NoSuchKey", "get", ObjectNotFoundError),
        (404, "NoSuchKey", "get_into", ObjectNotFoundError),
        (408, "", "get", StoreUnavailableError),
        (409, "ConditionalRequestConflict", "put_if_absent", StoreUnavailableError),
        (409, "OperationAborted", "put", StoreUnavailableError),
        (412, "PreconditionFailed", "put_if_absent", ObjectExistsError),
        (429, "", "list", StoreUnavailableError),
        (500, "InternalError", "delete", StoreUnavailableError),
        (501, "NotImplemented", "put_if_absent", UnsupportedVerbError),
        (502, "", "get_into", StoreUnavailableError),
        (503, "ServiceUnavailable", "head", StoreUnavailableError),
        (504, "", "put", StoreUnavailableError),
    ],
)
def test_an_answer_becomes_this_error(
    status: int, code: str, verb: str, expected: type[StoreError], filled: S3Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    # A refused HEAD is asked again as a GET, whose answer has the reason.
    proxy.add(Fault.ANSWER, status=status, code=code, detail="<RequestId>REQ17</RequestId>", count=2)
    with pytest.raises(StoreError) as caught:
        VERBS[verb](faulty)
    assert type(caught.value) is expected
    assert faulty.url in str(caught.value)
    if expected is not ObjectExistsError:
        assert str(status) in str(caught.value)
        if code and (verb != "head" or expected is StoreAccessError):
            assert code in str(caught.value)
            assert "REQ17" in str(caught.value)


def test_a_delete_of_nothing_is_no_error_whatever_the_server_calls_it(faulty: S3Store, proxy: FaultProxy) -> None:
    proxy.add(Fault.ANSWER, status=404, code="NoSuchKey")
    faulty.delete("a/x")


def test_a_refused_head_is_answered_by_a_get(filled: S3Store, faulty: S3Store, proxy: FaultProxy) -> None:
    for status in (400, 403, 405):
        proxy.add(Fault.ANSWER, method="HEAD", status=status, code="")
        assert faulty.head("a/x") == filled.head("a/x")


def test_the_right_region_is_named(faulty: S3Store, proxy: FaultProxy) -> None:
    proxy.add(Fault.ANSWER, status=301, code="", headers={"x-amz-bucket-region": "eu-west-1"}, count=10)
    with pytest.raises(StoreAccessError, match=r"it is in eu-west-1.*AWS_REGION"):
        faulty.get("a/x")


def test_the_right_region_is_read_from_the_answer_if_it_is_there(faulty: S3Store, proxy: FaultProxy) -> None:
    proxy.add(Fault.ANSWER, status=400, code="AuthorizationHeaderMalformed", detail="<Region>eu-north-1</Region>")
    with pytest.raises(StoreAccessError, match=r"not in region us-east-1: it is in eu-north-1"):
        faulty.put("a/x", b"1")


def test_a_certificate_that_nobody_vouches_for(s3_server: S3Server, aws: pytest.MonkeyPatch, open_store: Any) -> None:
    if s3_server.https_url is None:
        pytest.skip("the server has no TLS (radosgw with openssl has)")
    aws.delenv("AWS_CA_BUNDLE")
    with pytest.raises(StoreError, match="AWS_CA_BUNDLE") as caught:
        open_store(endpoint_url=s3_server.https_url).get("x")
    assert not isinstance(caught.value, StoreUnavailableError)


def test_nobody_listens(open_store: Callable[..., S3Store], proxy: FaultProxy) -> None:
    store = open_store(endpoint_url=proxy.url)
    proxy.close()
    with pytest.raises(StoreUnavailableError):
        store.get("x")


def test_a_put_that_gets_no_answer_ends_in_time(open_store: Callable[..., S3Store], proxy: FaultProxy) -> None:
    store = open_store(endpoint_url=proxy.url, stall_timeout_s=1.0, slowest_bytes_per_s=1 << 20)
    proxy.add(Fault.STALL, method="PUT")
    started = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="in time"):
        store.put("x", bytes(1 << 20))  # 1 s + 1 MiB at 1 MiB/s
    assert 2.0 <= time.monotonic() - started < 2.0 + 5.0


def test_slow_is_not_stalled(store: S3Store, open_store: Callable[..., S3Store], proxy: FaultProxy) -> None:
    """1.5 MB at 1 MB/s take 1.5 s, longer than the 0.5 s of a stall: both ways must come through (the test takes 3 s)."""
    slow = open_store(endpoint_url=proxy.url, stall_timeout_s=0.5, slowest_bytes_per_s=500_000)
    data = random.Random(17).randbytes(1_500_000)
    proxy.bytes_per_s = 1e6
    slow.put("x", data)
    out = bytearray(len(data))
    started = time.monotonic()
    slow.get_into("x", 0, out)
    assert time.monotonic() - started > 0.5
    assert out == data
    assert store.get("x") == data


def test_closing_the_proxy_frees_a_stalled_client(open_store: Callable[..., S3Store], proxy: FaultProxy) -> None:
    store = open_store(endpoint_url=proxy.url)
    rule = proxy.add(Fault.STALL)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            store.get("x")
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert rule.reached.wait(30)
    proxy.close()
    thread.join(30)
    assert not thread.is_alive()
    assert [type(error) for error in errors] == [StoreUnavailableError]


def test_one_of_many_creates_wins(store: S3Store) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    bodies = [random.Random(seed + number).randbytes(50_000) for number in range(8)]
    start = threading.Barrier(len(bodies))
    won: list[int] = []

    def create(number: int) -> None:
        start.wait()
        try:
            Retrying(store).put_if_absent("one", bodies[number])
        except ObjectExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("one") == bodies[won[0]]


def test_an_answer_that_is_not_understood_is_no_success() -> None:
    assert read_answer(418, {}, b"\xff<html>") == Answer(status=418)
    assert type(translate(Answer(status=418), "get", "s3://b/k", [], "")) is StoreError
    assert type(translate(Answer(status=599), "get", "s3://b/k", [], "")) is StoreUnavailableError
