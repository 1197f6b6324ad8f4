"""What the S3 tests share: an environment of their own, a bucket, stores over http and https, a fault proxy in front."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastckpt.store.cloud import S3Store, open_s3
from fastckpt.testing.fault_proxy import FaultProxy
from tests.s3server import S3Server

pytest.importorskip("boto3", reason="s3:// needs boto3")
from tests.s3.manners import (
    MannersServer,
    self_signed,
)


@pytest.fixture
def aws(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a user of the test server: nothing of the machine's own AWS settings or proxies is left."""
    for name in [name for name in os.environ if name.upper().startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket()


@pytest.fixture
def open_store(s3_server: S3Server, aws: pytest.MonkeyPatch, bucket: str) -> Iterator[Callable[..., S3Store]]:
    """`open_s3` on the prefix "p" of the bucket (or on `url`) as the owner; what it opened is closed."""
    opened = []

    def opener(url: str = f"s3://{bucket}/p", **options: Any) -> S3Store:
        mine = {"session": s3_server.owner_session(), "endpoint_url": s3_server.url}
        opened.append(open_s3(url, **(mine | options)))
        return opened[-1]

    yield opener
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., S3Store]) -> S3Store:
    return open_store()


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    host, _, port = s3_server.url.removeprefix("http://").rpartition(":")
    with FaultProxy(host, int(port)) as found:
        yield found


@pytest.fixture
def faulty(open_store: Callable[..., S3Store], proxy: FaultProxy) -> S3Store:
    """The store behind the proxy. 1 s without progress is a stall."""
    return open_store(endpoint_url=proxy.url, stall_timeout_s=1.0)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Keys of nobody, and nothing of the machine's own AWS settings or proxies: for servers that play a manner."""
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
