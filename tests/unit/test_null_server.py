"""The null server: what it keeps is real, what it drops is not kept, and its counts are right; fastckpt's store, boto3 and obstore work."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fastckpt.errors import ObjectExistsError, ObjectNotFoundError
from fastckpt.store.base import Store
from fastckpt.testing.null_answers import aws_chunks
from fastckpt.testing.null_objects import Conditions, Objects
from fastckpt.testing.null_server import NullServer, Settings, null_server
from fastckpt.testing.store_contract import StoreContract
from tests.s3server import make_certificate

pytest.importorskip("boto3", reason="s3:// needs boto3")
import boto3
from botocore.config import Config

from fastckpt.store.cloud import open_s3

BIG = 1 << 20


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.upper().startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture(scope="module")
def shared() -> Iterator[NullServer]:
    with null_server() as server:
        yield server


@pytest.fixture
def server(shared: NullServer, keys: pytest.MonkeyPatch) -> NullServer:
    shared.reset(objects=True)
    shared.change(**asdict(Settings()))
    return shared


@pytest.fixture
def store(server: NullServer) -> Iterator[Store]:
    with open_s3("s3://any/p", endpoint_url=server.url) as found:
        yield found


class TestContract(StoreContract):
    """What it keeps, it keeps as a store must: races of creates, listings, ranges."""

    @pytest.fixture
    def store(self, server: NullServer) -> Iterator[Store]:
        server.change(keep=True)
        with open_s3("s3://any/contract", endpoint_url=server.url) as found:
            yield found


def test_small_bodies_are_kept_and_large_ones_are_zeros(store: Store, server: NullServer) -> None:
    store.put("small", b"s" * 1000)
    store.put("large", b"l" * BIG)
    assert store.get("small") == b"s" * 1000
    out = bytearray(b"x" * 5000)
    store.get_into("large", BIG - 5000, out)
    assert out == bytes(5000)
    assert store.head("large").n_bytes == BIG
    assert [info.n_bytes for info in store.list("")] == [BIG, 1000]


def test_only_bodies_that_match_are_dropped(store: Store, server: NullServer) -> None:
    server.change(drop=r"^/any/p/data/")
    store.put("data/pack", b"d" * BIG)
    store.put("votes/large", b"v" * BIG)
    assert store.get("data/pack") == bytes(BIG)
    assert store.get("votes/large") == b"v" * BIG


def test_counts(store: Store, server: NullServer) -> None:
    server.reset()
    store.put("a", bytes(BIG))
    store.put_if_absent("b", b"12345")
    with pytest.raises(ObjectExistsError):
        store.put_if_absent("b", b"12345")
    with pytest.raises(ObjectNotFoundError):
        store.get("c")
    assert store.get("b") == b"12345"
    store.delete("a")
    assert [info.key for info in store.list("")] == ["b"]
    counts = server.counts()
    assert counts["requests"] == {"PUT": 3, "GET": 2, "DELETE": 1, "LIST": 1}
    assert counts["bytes_received"] == BIG + 10
    assert counts["bytes_sent"] > 5
    assert counts["connections"] <= 1  # the process may have one already
    assert counts["objects"] == 1
    assert counts["cpu_s"] > 0
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/_null/counts")
    assert json.loads(connection.getresponse().read())["requests"] == counts["requests"]
    connection.close()
    server.reset(objects=True)
    assert server.counts()["requests"] == {}
    assert server.counts()["objects"] == 0


def test_what_it_is_told_must_be_known(server: NullServer) -> None:
    with pytest.raises(ValueError, match="speed"):
        server.change(speed=1)
    with pytest.raises(TypeError), null_server(speed=1):
        pass


def test_boto3_puts_and_gets(server: NullServer) -> None:
    """Its defaults: Expect: 100-continue, checksums; over multipart, too."""
    client: Any = boto3.client("s3", endpoint_url=server.url, config=Config(s3={"addressing_style": "path"}))
    server.change(keep=True)
    data = os.urandom(11 << 20)
    client.put_object(Bucket="b", Key="one", Body=data)
    assert client.get_object(Bucket="b", Key="one", Range="bytes=-10")["Body"].read() == data[-10:]
    begun = client.create_multipart_upload(Bucket="b", Key="parts")["UploadId"]
    halves = [data[: 6 << 20], data[6 << 20 :]]
    parts = [
        {
            "PartNumber": i + 1,
            "ETag": client.upload_part(Bucket="b", Key="parts", UploadId=begun, PartNumber=i + 1, Body=half)["ETag"],
        }
        for i, half in enumerate(halves)
    ]
    client.complete_multipart_upload(Bucket="b", Key="parts", UploadId=begun, MultipartUpload={"Parts": parts})
    assert client.get_object(Bucket="b", Key="parts")["Body"].read() == data
    listed = client.list_objects_v2(Bucket="b", Delimiter="/", Prefix="")
    assert [found["Key"] for found in listed["Contents"]] == ["one", "parts"]
    client.delete_objects(Bucket="b", Delete={"Objects": [{"Key": "one"}]})
    assert server.counts()["objects"] == 1
    client.close()


def test_obstore_puts_gets_and_lists(server: NullServer) -> None:
    obstore = pytest.importorskip("obstore")
    from obstore.store import S3Store as ObstoreS3

    server.change(keep=True)
    found = ObstoreS3(
        bucket="b",
        endpoint=server.url,
        access_key_id="a",
        secret_access_key="b",
        region="r",
        client_options={"allow_http": True},
    )
    data = os.urandom(BIG)
    obstore.put(found, "x/y", data, use_multipart=False)
    obstore.put(found, "x/z", data, use_multipart=True, chunk_size=300_000)
    with pytest.raises(Exception, match="exist"):
        obstore.put(found, "x/y", data, mode="create")
    assert bytes(obstore.get(found, "x/y").bytes()) == data
    assert bytes(obstore.get_range(found, "x/z", start=299_990, end=300_010)) == data[299_990:300_010]
    assert [one["path"] for one in obstore.list(found).collect()] == ["x/y", "x/z"]
    obstore.delete(found, ["x/y", "x/z"])
    assert server.counts()["objects"] == 0


def test_over_tls_and_with_a_pattern(keys: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = make_certificate(tmp_path)
    if made is None:
        pytest.skip("openssl is not installed")
    ca_file, cert, key = made
    keys.setenv("AWS_CA_BUNDLE", str(ca_file))
    pattern = tmp_path / "pattern"
    pattern.write_bytes(b"0123456789")
    with (
        null_server(tls=(cert, key), pattern=pattern, keep_below_bytes=0) as server,
        open_s3("s3://any/p", endpoint_url=server.url) as store,
    ):
        store.put("x", bytes(25))
        assert store.get("x") == b"0123456789012345678901234"
        client: Any = boto3.client("s3", endpoint_url=server.url, config=Config(s3={"addressing_style": "path"}))
        server.change(keep=True)
        client.put_object(Bucket="b", Key="trailer", Body=b"checksum in a trailer")  # over https: aws-chunked
        assert client.get_object(Bucket="b", Key="trailer")["Body"].read() == b"checksum in a trailer"
        client.close()


@pytest.mark.parametrize("limit", ["bytes_per_s", "bytes_per_s_each"])
def test_limits_take_at_least_their_time(limit: str, server: NullServer) -> None:
    server.change(delay_s=0.1, **{limit: 4e6})
    with open_s3("s3://any/p", endpoint_url=server.url) as store:
        started = time.monotonic()
        store.put("x", bytes(1 << 20))
        assert time.monotonic() - started > 0.25
        started = time.monotonic()
        assert len(store.get("x")) == 1 << 20
        assert time.monotonic() - started > 0.25


def test_it_ends_with_the_process_that_started_it() -> None:
    """Killed, so that nothing of that process's own could have ended it: the server sees the end of its orders."""
    program = (
        "from fastckpt.testing.null_server import null_server\n"
        "with null_server() as server: print(server.url, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline().rpartition(":")[2])
        child.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                break
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_pages_and_folders_of_a_listing() -> None:
    objects = Objects(b"\0")
    for name in ("a", "b/1", "b/2", "c", "d/1", "e"):
        objects.put("b", name, (1,), Conditions(False, ""))
    first = objects.page("b", "", "", 3, "/")
    assert ([name for name, _ in first.objects], first.folders, first.last) == (["a", "c"], ["b/"], "c")
    second = objects.page("b", "", first.last, 3, "/")
    assert ([name for name, _ in second.objects], second.folders, second.last) == (["e"], ["d/"], "")
    page = objects.page("b", "", "", 2, "/")
    assert page.last == "b/"
    assert objects.page("b", "", page.last, 2, "/").objects[0][0] == "c"


def test_the_framing_of_aws_chunked() -> None:
    assert (
        aws_chunks(bytearray(b"3;chunk-signature=x\r\nabc\r\n2\r\nde\r\n0\r\nx-amz-checksum-crc32:x\r\n\r\n"))
        == b"abcde"
    )
