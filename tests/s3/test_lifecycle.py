"""A bucket whose rules delete by age is told when a run is opened to write; who cannot know says nothing. No S3 server is needed."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("boto3", reason="s3:// needs boto3")

import fastckpt
from fastckpt.store.cloud import open_s3
from fastckpt.store.cloud_lifecycle import NotRulesError, harms, read_rules
from fastckpt.store.memory import MemoryStore
from fastckpt.training.checkpointer import Checkpointer
from tests.s3.manners import MannersServer, about_rules, lifecycle, login_page, refuses

RULE = "<Rule><ID>clean up</ID><Status>{}</Status>{}{}</Rule>"
DAYS = "<Expiration><Days>30</Days></Expiration>"
DATE = "<Expiration><Date>2027-01-01T00:00:00Z</Date></Expiration>"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MannersServer]:
    for name in [name for name in os.environ if name.upper().startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with MannersServer() as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
        yield found


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def asked(server: MannersServer) -> int:
    return sum("lifecycle" in request.path for request in server.requests("GET"))


def open_run(url: Any, **how: Any) -> Checkpointer:
    return Checkpointer(url, {"w": torch.ones(3)}, every=None, spot=None, **how)


def test_a_rule_that_deletes_by_age_is_told_once_at_a_writing_opening(
    server: MannersServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.manners.append(lifecycle(RULE.format("Enabled", "<Filter><Prefix>runs/</Prefix></Filter>", DAYS)))
    with open_run("s3://lab/runs/7") as ckpt:
        ckpt.restore()
        ckpt.save_now(1).wait(60)
        ckpt.save_now(2).wait(60)
    (words,) = told(caplog)
    assert words.startswith("s3://lab/runs/7: lifecycle rule 'clean up' deletes objects after 30 days")
    assert "take the prefix out of it" in words
    assert "docs/stores.md" in words
    assert asked(server) == 1


def test_who_only_reads_does_not_ask(server: MannersServer, caplog: pytest.LogCaptureFixture) -> None:
    with open_run("s3://lab/runs/7") as ckpt:
        ckpt.save_now(1).wait(60)
    server.manners.append(lifecycle(RULE.format("Enabled", "<Filter><Prefix></Prefix></Filter>", DAYS)))
    before = asked(server)
    with open_run("s3://lab/runs/7", read_only=True) as evaluation:
        assert evaluation.restore() == 1
    fastckpt.load("s3://lab/runs/7")
    fastckpt.save({"a": 1}, "s3://lab/one.fckpt")
    assert asked(server) == before
    assert not told(caplog)


def test_directories_have_no_rules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert MemoryStore().harmful_rules() == ()
    with open_run(tmp_path) as ckpt:
        ckpt.save_now(1)
    assert not told(caplog)


SILENT = {
    "none set": refuses(404, "NoSuchLifecycleConfiguration"),
    "not allowed": refuses(403, "AccessDenied"),
    "not known there": refuses(501, "NotImplemented"),
    "no such method": refuses(405, "MethodNotAllowed"),
    "a broken gateway": refuses(500, "InternalError"),
    "a login page": login_page(),
    "a listing": lambda request: request.answer(200, "<ListBucketResult></ListBucketResult>"),
    "nothing": lambda request: request.answer(200, ""),
}


@pytest.mark.parametrize("manner", SILENT.values(), ids=SILENT)
def test_who_cannot_know_says_nothing(manner: Any, server: MannersServer, caplog: pytest.LogCaptureFixture) -> None:
    server.manners.append(about_rules(manner))
    with open_run("s3://lab/runs/7") as ckpt:
        ckpt.save_now(1).wait(60)
    assert not told(caplog)
    assert asked(server) == 1, "one try"


def test_a_server_that_does_not_answer_this_question_delays_no_save(
    server: MannersServer, caplog: pytest.LogCaptureFixture
) -> None:
    """2 s, which is as long as anybody waits for advice: a save would wait for 20."""
    release = threading.Event()
    server.manners.append(about_rules(lambda request: release.wait(60) and False))
    try:
        with open_s3("s3://lab/runs/7") as store, open_run(store) as ckpt:
            ckpt.save_now(1).wait(60)
            assert not release.is_set()
    finally:
        release.set()
    assert not told(caplog)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (RULE.format("Enabled", "<Prefix></Prefix>", DAYS), "after 30 days"),
        (RULE.format("Enabled", "", DATE), "on 2027-01-01"),
        (RULE.format("Enabled", "<Filter><And><Prefix>p/data/</Prefix></And></Filter>", DAYS), "after 30 days"),
        (RULE.format("Enabled", "<Filter/>", "<Transition><StorageClass>GLACIER</StorageClass></Transition>"), "moves"),
        (RULE.format("Disabled", "<Filter/>", DAYS), ""),
        (RULE.format("Enabled", "<Filter><Prefix>p2/</Prefix></Filter>", DAYS), ""),
        (RULE.format("Enabled", "<Filter><Tag><Key>a</Key><Value>b</Value></Tag></Filter>", DAYS), ""),
        (RULE.format("Enabled", "<Filter><And><Prefix/><Tag><Key>a</Key></Tag></And></Filter>", DAYS), ""),
        (RULE.format("Enabled", "<Filter/>", DAYS.replace("Days", "ExpiredObjectDeleteMarker")), ""),
        (RULE.format("Enabled", "<Filter/>", DAYS.replace("Expiration", "NoncurrentVersionExpiration")), ""),
    ],
)  # fmt: skip
def test_which_rules_harm(rule: str, words: str) -> None:
    for namespace in ("", " xmlns='http://s3.amazonaws.com/doc/2006-03-01/'"):
        found = list(
            harms(read_rules(f"<LifecycleConfiguration{namespace}>{rule}</LifecycleConfiguration>".encode()), "p")
        )
        assert len(found) == bool(words)
        assert all(words in one and "'clean up'" in one for one in found)


@pytest.mark.parametrize("data", [b"", b"{}", b"<html>", b"<ListBucketResult/>", b"<Lifecycle\xff"])
def test_what_is_no_answer_is_no_rule(data: bytes) -> None:
    with pytest.raises(NotRulesError):
        read_rules(data)
