"""Who we are and where: boto3's chain, endpoints, keys that change while running, and no secret in any text."""

from __future__ import annotations

import datetime
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastckpt
from fastckpt.errors import ObjectNotFoundError, StoreAccessError, StoreError, StoreUnavailableError
from fastckpt.store.cloud import S3Store, open_s3
from fastckpt.store.cloud_bucket import check_bucket
from fastckpt.store.cloud_connection import parse_s3_url
from fastckpt.store.wrap import Retrying
from fastckpt.testing.fault_proxy import Fault, FaultProxy
from tests.s3server import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture
def no_keys(aws: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    ):
        aws.delenv(name)
    return aws


def works(store: S3Store) -> bool:
    store.put("a", b"1")
    return store.get("a") == b"1"


def test_keys_of_the_environment(aws: pytest.MonkeyPatch, bucket: str) -> None:
    with open_s3(f"s3://{bucket}/p") as store:
        assert works(store)


def test_keys_region_and_endpoint_of_a_profile(
    s3_server: S3Server, no_keys: pytest.MonkeyPatch, bucket: str, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    keys = f"aws_access_key_id = {s3_server.access_key}\naws_secret_access_key = {s3_server.secret_key}\n"
    config.write_text(
        f"[profile plain]\n{keys}region = eu-west-3\nendpoint_url = {s3_server.url}\n"
        f"[profile service]\n{keys}region = eu-west-3\nservices = here\n[services here]\ns3 =\n  endpoint_url = {s3_server.url}\n"
    )
    no_keys.setenv("AWS_CONFIG_FILE", str(config))
    for profile in ("plain", "service"):
        no_keys.setenv("AWS_PROFILE", profile)
        with open_s3(f"s3://{bucket}/p") as store:
            assert store.connection.endpoint == s3_server.url
            assert store.connection.region == "eu-west-3"
            assert works(store)


def test_the_nearest_endpoint_counts(aws: pytest.MonkeyPatch) -> None:
    def endpoint(**options: Any) -> str:
        return open_s3("s3://buck/p", **options).connection.endpoint

    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    aws.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:2")
    assert endpoint() == "http://127.0.0.1:2"
    assert endpoint(endpoint_url="http://127.0.0.1:3") == "http://127.0.0.1:3"
    aws.delenv("AWS_ENDPOINT_URL_S3")
    assert endpoint() == "http://127.0.0.1:1"


def test_the_argument_beats_the_environment_when_bytes_move(
    s3_server: S3Server, aws: pytest.MonkeyPatch, bucket: str
) -> None:
    aws.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with open_s3(f"s3://{bucket}/p", endpoint_url=s3_server.url) as store:
        assert works(store)


def test_variables_of_others_do_not_leak_in(aws: pytest.MonkeyPatch, bucket: str, proxy: FaultProxy) -> None:
    aws.setenv("AWS_SKIP_SIGNATURE", "true")
    aws.setenv("AWS_UNSIGNED_PAYLOAD", "true")
    aws.setenv("AWS_BUCKET", "another")
    aws.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    with open_s3(f"s3://{bucket}/p", endpoint_url=proxy.url) as store:
        assert works(store)
    assert len(proxy.requests("PUT")[0].headers["x-amz-content-sha256"]) == 64


@pytest.mark.parametrize(
    ("region", "bucket_name", "endpoint", "virtual_host"),
    [
        ("eu-west-1", "buck", "https://buck.s3.eu-west-1.amazonaws.com", True),
        ("us-east-1", "buck", "https://buck.s3.us-east-1.amazonaws.com", True),
        ("cn-north-1", "buck", "https://buck.s3.cn-north-1.amazonaws.com.cn", True),
        ("eu-west-1", "with.dots", "https://s3.eu-west-1.amazonaws.com", False),
    ],
)
def test_addresses_of_aws(
    region: str, bucket_name: str, endpoint: str, virtual_host: bool, aws: pytest.MonkeyPatch
) -> None:
    aws.delenv("AWS_ENDPOINT_URL_S3")
    aws.setenv("AWS_REGION", region)
    aws.setenv("AWS_DEFAULT_REGION", region)
    connection = open_s3(f"s3://{bucket_name}/p").connection
    assert (connection.endpoint, connection.virtual_host, connection.region) == (endpoint, virtual_host, region)


def test_other_endpoints_get_the_bucket_in_the_path(aws: pytest.MonkeyPatch) -> None:
    for url in (
        "http://127.0.0.1:9000",
        "https://minio.example.org",
        "https://bucket.vpce-1.s3.eu-west-1.vpce.amazonaws.com",
    ):
        connection = open_s3("s3://buck/p", endpoint_url=url).connection
        assert (connection.endpoint, connection.virtual_host) == (url, False)


def test_without_credentials_nothing_is_sent(no_keys: pytest.MonkeyPatch, bucket: str, proxy: FaultProxy) -> None:
    with pytest.raises(StoreAccessError, match=r"no AWS credentials found.*aws configure"):
        open_s3(f"s3://{bucket}/p", endpoint_url=proxy.url)
    no_keys.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match="nobody"):
        open_s3(f"s3://{bucket}/p", endpoint_url=proxy.url)
    assert proxy.requests() == []


def test_wrong_keys_are_told(s3_server: S3Server, bucket: str, open_store: Callable[..., S3Store]) -> None:
    if not s3_server.checks_signatures:
        pytest.skip(f"{s3_server.kind} checks no signatures")
    store = open_store(session=s3_server.session(secret_key="wrong"))
    with pytest.raises(StoreAccessError, match="SignatureDoesNotMatch"):
        store.get("a")
    store = open_store(session=s3_server.session(access_key="nobody"))
    with pytest.raises(StoreAccessError, match="InvalidAccessKeyId"):
        store.put("a", b"")


class Process:
    """A profile whose keys a program gives, as a role's are: they end in `valid_s` seconds and are asked for again in time."""

    def __init__(self, folder: Path, environment: pytest.MonkeyPatch) -> None:
        self._answer = folder / "answer.json"
        config = folder / "config"
        config.write_text(f"[default]\ncredential_process = cat {self._answer}\n")
        environment.setenv("AWS_CONFIG_FILE", str(config))

    def say(self, access_key: str, secret_key: str, token: str | None = None, valid_s: float = 60.0) -> None:
        end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=valid_s)
        answer = {"Version": 1, "AccessKeyId": access_key, "SecretAccessKey": secret_key, "Expiration": end.isoformat()}
        self._answer.write_text(json.dumps(answer | ({"SessionToken": token} if token else {})))

    def vanish(self) -> None:
        self._answer.unlink()


@pytest.fixture
def process(no_keys: pytest.MonkeyPatch, tmp_path: Path) -> Process:
    return Process(tmp_path, no_keys)


def test_keys_with_an_end_are_renewed_while_running(
    s3_server: S3Server, process: Process, bucket: str, proxy: FaultProxy
) -> None:
    """The first key is about to end, so botocore asks for another before the next request."""
    process.say(s3_server.access_key, s3_server.secret_key, "token-1")
    with open_s3(f"s3://{bucket}/p", endpoint_url=proxy.url) as store:
        assert works(store)
        process.say(s3_server.access_key, s3_server.secret_key, "token-2")
        store.get("a")
        assert proxy.requests()[0].headers["x-amz-security-token"] == "token-1"
        assert proxy.requests()[-1].headers["x-amz-security-token"] == "token-2"


def test_keys_that_cannot_be_renewed(s3_server: S3Server, process: Process, bucket: str) -> None:
    process.say(s3_server.access_key, s3_server.secret_key)
    with open_s3(f"s3://{bucket}/p", endpoint_url=s3_server.url) as store:
        assert works(store)
        process.vanish()
        with pytest.raises(StoreAccessError, match="could not be had") as caught:
            store.get("a")
        assert f"s3://{bucket}/p/a" in str(caught.value)


def test_keys_replaced_in_a_file_are_found_after_a_refusal(
    s3_server: S3Server, no_keys: pytest.MonkeyPatch, bucket: str, tmp_path: Path
) -> None:
    if not s3_server.checks_signatures:
        pytest.skip(f"{s3_server.kind} checks no signatures")
    file = tmp_path / "credentials"
    no_keys.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def write(access_key: str, secret_key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n")

    write("AKIAOLD", "old")
    with open_s3(f"s3://{bucket}/p", endpoint_url=s3_server.url) as store:
        with pytest.raises(StoreAccessError):
            store.put("a", b"1")
        write(s3_server.access_key, s3_server.secret_key)
        with pytest.raises(StoreUnavailableError, match="replaced"):
            store.put("a", b"1")
        assert works(store)
    write("AKIAOLD", "old")
    with open_s3(f"s3://{bucket}/p", endpoint_url=s3_server.url) as store:
        write(s3_server.access_key, s3_server.secret_key)
        Retrying(store, sleep=lambda seconds: None).put("b", b"1")


SECRET, TOKEN = "SeCrEt/0123456789+abcdefghijklmnopqrst", "ToKeN//IQoJb3JpZ2luX2VjEHkaCXVzLWVhc3QtMSJHMEUCIQ=="


def all_text_of(error: BaseException | None) -> str:
    """The text of an exception, its trace, and of everything it hangs together with."""
    seen: list[BaseException] = []
    text = ""

    def visit(one: BaseException | None) -> None:
        nonlocal text
        if one is not None and one not in seen:
            seen.append(one)
            text += repr(one) + str(one) + "".join(traceback.format_exception(one))
            visit(one.__cause__)
            visit(one.__context__)

    visit(error)
    return text


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def test_no_secret_in_any_text(
    no_keys: pytest.MonkeyPatch, bucket: str, proxy: FaultProxy, everything_logged: pytest.LogCaptureFixture
) -> None:
    """S3's own answers repeat the token: to a wrong signature in the canonical request, to an expired token as Token-0."""
    no_keys.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    no_keys.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    no_keys.setenv("AWS_SESSION_TOKEN", TOKEN)
    store = open_s3(f"s3://{bucket}/p", endpoint_url=proxy.url)
    repeated = f"<CanonicalRequest>PUT\nx-amz-security-token:{TOKEN}\n</CanonicalRequest><Token-0>{TOKEN}</Token-0><S>{SECRET}</S>"
    texts = [repr(store), repr(store.connection), repr(store.connection.credentials), str(vars(store))]
    calls: list[Callable[[], Any]] = [
        lambda: store.put("a", b"1"),
        lambda: store.put_if_absent("a", b"1"),
        lambda: store.get("a"),
        lambda: store.get_into("a", 0, bytearray(9)),
        lambda: list(store.list("")),
        lambda: store.delete("a"),
    ]
    for code, status in (("SignatureDoesNotMatch", 403), ("ExpiredToken", 400), ("InternalError", 500), ("Odd", 418)):
        for call in calls:
            proxy.add(Fault.ANSWER, status=status, code=code, detail=repeated)
            with pytest.raises(StoreError) as caught:
                call()
            assert code in str(caught.value)
            texts.append(all_text_of(caught.value))
    proxy.add(Fault.ANSWER, status=301, code="", count=50)
    with pytest.raises(StoreAccessError) as caught:
        store.get("a")
    texts.append(all_text_of(caught.value))
    texts.append(repr(check_bucket(store)))
    assert proxy.requests()[-1].headers["x-amz-security-token"] == TOKEN
    texts += [record.getMessage() + str(record.exc_info) for record in everything_logged.records]
    for text in texts:
        assert SECRET not in text
        assert TOKEN not in text
    store.close()


def test_a_bundle_that_holds_no_certificate(aws: pytest.MonkeyPatch, tmp_path: Path) -> None:
    aws.setenv("AWS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    with pytest.raises(StoreError, match=r"missing\.pem"):
        open_s3("s3://buck/p", endpoint_url="https://127.0.0.1:1")
    (tmp_path / "empty.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    aws.setenv("AWS_CA_BUNDLE", str(tmp_path / "empty.pem"))
    with pytest.raises(StoreError):
        open_s3("s3://buck/p", endpoint_url="https://127.0.0.1:1").get("a")


def test_plain_http_to_another_machine_is_warned_of_once(
    aws: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_s3("s3://buck/p", endpoint_url="http://storage.example.org:9000")
    assert len([record for record in caplog.records if "without encryption" in record.getMessage()]) == 1
    caplog.clear()
    for url in ("http://127.0.0.1:9000", "http://localhost:9000", "http://[::1]:9000", "https://storage.example.org"):
        open_s3("s3://buck/p", endpoint_url=url)
    assert caplog.records == []


@pytest.mark.parametrize(
    "url",
    [
        "s3:/b",
        "s3://",
        "s3:///p",
        "s3://buck/a\n",
        "s3://buck/\udcff",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/ap",
        "s3://b",
        "s3://buck/a//b",
        "s3://buck/../c",
        "s3://buck/a/./b",
    ],
)
def test_no_location(url: str) -> None:
    with pytest.raises(StoreError, match="s3://"):
        parse_s3_url(url)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sse": "AES"}, "sse is 'AES'"),
        ({"sse_kms_key_id": "k"}, "sse_kms_key_id is for"),
        ({"sse": "aws:kms", "sse_kms_key_id": "k\r\nx-amz-acl: public-read"}, "without white space"),
        ({"expected_bucket_owner": "me"}, "12 digits"),
        ({"stall_timeout_s": 0}, "stall_timeout_s is 0"),
        ({"connections": -1}, "connections is -1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str, aws: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match=words):
        open_s3("s3://buck/p", **options)


@pytest.mark.parametrize(
    "prefix", ["", "a", "a/b-c_d.e", "run = 7 & more", "x+y@z:1,2;3!'()$", "trailing/", "größe/重み", 'a%20b?c#d*"<>|']
)
def test_a_prefix_is_what_others_see(prefix: str, s3_server: S3Server, bucket: str, open_store: Any) -> None:
    store = open_store(f"s3://{bucket}/{prefix}")
    assert works(store)
    names = [found["Key"] for found in s3_server.owner_client().list_objects_v2(Bucket=bucket)["Contents"]]
    assert names == [f"{prefix.rstrip('/')}/a".lstrip("/")]
    assert [info.key for info in store.list("")] == ["a"]


@pytest.mark.parametrize(
    "name",
    [
        "epoch=0-step=1.ckpt",
        "model (1).pt",
        "a+b,c@3:x.pt",
        "größe.pt",
        "重み.pt",
        "100%.pt",
        "a%20b?c#d&e.pt",
        "~x'*!.pt",
    ],
)
def test_an_object_is_called_what_others_see(
    name: str, s3_server: S3Server, aws: pytest.MonkeyPatch, bucket: str
) -> None:
    url = f"s3://{bucket}/dir/{name}"
    fastckpt.save({"a": torch.ones(3)}, url)
    names = [found["Key"] for found in s3_server.owner_client().list_objects_v2(Bucket=bucket)["Contents"]]
    assert names == [f"dir/{name}"]
    assert torch.equal(fastckpt.load(url)["a"], torch.ones(3))


def test_neighbours_of_the_prefix_are_not_ours(bucket: str, open_store: Callable[..., S3Store]) -> None:
    ours, neighbour = open_store(f"s3://{bucket}/run"), open_store(f"s3://{bucket}/run-2")
    neighbour.put("a", b"1")
    assert list(ours.list("")) == []
    with pytest.raises(ObjectNotFoundError):
        ours.get("a")
