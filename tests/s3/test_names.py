"""Names of objects that are slips, and those that are none. No S3 server is needed."""

from __future__ import annotations

import io
import logging

import pytest
import torch

pytest.importorskip("boto3", reason="s3:// needs boto3")
import fastckpt
from fastckpt.errors import (
    SaveError,
    StoreError,
)
from tests.s3.manners import (
    OBJECT,
    MannersServer,
    is_object,
    no_encoding_type,
)

pytestmark = pytest.mark.usefixtures("environment")


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
    assert is_object(fastckpt.load(url))
    buffer = io.BytesIO()
    torch.save(OBJECT, buffer)
    server.objects[f"runs/ä=1/{name}"] = buffer.getvalue()
    assert is_object(fastckpt.load(url))


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
