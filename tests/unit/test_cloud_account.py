"""boto3 is asked once for each configuration, and again when it changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("boto3", reason="s3:// needs boto3")

from fastckpt.errors import StoreAccessError
from fastckpt.store import cloud_account
from fastckpt.store.cloud_connection import Connection as Found
from fastckpt.store.cloud_connection import connect

OPTIONS = {
    "sse": None, "sse_kms_key_id": None, "expected_bucket_owner": None, "connect_timeout_s": 5.0, "stall_timeout_s": 20.0,
    "slowest_bytes_per_s": 1, "connections": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = one\naws_secret_access_key = s1\n")
    (tmp_path / "config").write_text("[default]\nregion = eu-west-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(cloud_account, "known_accounts", {})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each time that boto3 is asked."""
    calls: list[object] = []
    ask = cloud_account.ask_boto3

    def counted(session: object, endpoint_url: str | None, timeout_s: float) -> cloud_account.Account:
        calls.append(endpoint_url)
        return ask(session, endpoint_url, timeout_s)

    monkeypatch.setattr(cloud_account, "ask_boto3", counted)
    return calls


def found(url: str = "s3://bucket/run", **more: object) -> Found:
    return connect(url, **OPTIONS, **more)  # type: ignore[arg-type]


def key(connection: Found) -> str:
    return str(connection.credentials.frozen().access_key)


def test_two_places_of_one_account_ask_once(asked: list[object]) -> None:
    assert key(found()) == key(found("s3://other/run")) == "one"
    assert found().region == "eu-west-1"
    assert len(asked) == 1


def test_another_endpoint_is_another_account(asked: list[object]) -> None:
    assert found(endpoint_url="http://127.0.0.1:1").endpoint != found(endpoint_url="http://127.0.0.1:2").endpoint
    assert len(asked) == 2


def test_a_changed_environment_is_seen(asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    assert key(found()) == "one"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "two")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s2")
    assert key(found()) == "two"
    assert len(asked) == 2


def test_a_changed_file_is_seen(asked: list[object], tmp_path: Path) -> None:
    assert key(found()) == "one"
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = three\naws_secret_access_key = s3\n")
    assert key(found()) == "three"
    assert key(found()) == "three"
    assert len(asked) == 2


def test_a_file_that_appears_is_seen(asked: list[object], tmp_path: Path) -> None:
    (tmp_path / "config").unlink()
    assert found().region == cloud_account.DEFAULT_REGION
    (tmp_path / "config").write_text("[default]\nregion = eu-west-3\n")
    assert found().region == "eu-west-3"


def test_a_session_that_is_given_is_asked_every_time(asked: list[object]) -> None:
    import boto3

    session = boto3.Session(aws_access_key_id="mine", aws_secret_access_key="s")
    assert key(found(session=session)) == "mine"
    assert key(found(session=session)) == "mine"
    assert key(found()) == "one"
    assert len(asked) == 3


def test_missing_credentials_are_not_kept(asked: list[object], tmp_path: Path) -> None:
    (tmp_path / "credentials").unlink()
    for _ in range(2):
        with pytest.raises(StoreAccessError, match="no AWS credentials"):
            found()
    assert len(asked) == 2
    assert not cloud_account.known_accounts


def test_only_so_many_are_kept(asked: list[object]) -> None:
    for port in range(20):
        found(endpoint_url=f"http://127.0.0.1:{port + 1}")
    assert len(cloud_account.known_accounts) == 16


def test_no_secret_lies_in_what_is_kept() -> None:
    found()
    assert "s1" not in repr(cloud_account.known_accounts)
