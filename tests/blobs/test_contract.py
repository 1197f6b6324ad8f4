"""The contract of a store for gs:// (against a server that plays Google's) and az:// (against Azurite)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("obstore", reason="gs:// and az:// need obstore (pip install obstore)")
import fastckpt
from fastckpt.cli.main import main
from fastckpt.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    RepositoryError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    UnsupportedVerbError,
)
from fastckpt.repository.repository import Repository
from fastckpt.store import blob_client
from fastckpt.store.base import Store
from fastckpt.store.blob import BlobStore, open_blobs
from fastckpt.store.blob_errors import translate
from fastckpt.store.findings import Create, Listing, Ranges, Replace, refusals
from fastckpt.store.open import open_store
from fastckpt.store.probe import look_closely
from fastckpt.store.wrap import Retrying
from fastckpt.testing.store_contract import StoreContract
from tests.blobs.conftest import AZURE_ACCOUNT, AZURE_KEY, google_config
from tests.blobs.google import GoogleServer
from tests.s3.manners import refuses


class TestGoogle(StoreContract):
    many = 1100
    rounds = 20

    @pytest.fixture
    def store(self, gs: BlobStore) -> Store:
        return gs


class TestAzure(StoreContract):
    """Azurite needs some 10 ms for a request: over 5 s in all."""

    many = 30
    rounds = 30

    @pytest.fixture
    def store(self, az: BlobStore) -> Store:
        return az


@pytest.mark.parametrize("which", ["gs", "az"])
def test_probe_versions_and_a_run(which: str, request: pytest.FixtureRequest) -> None:
    store: BlobStore = request.getfixturevalue(which)
    found = look_closely(store)
    assert (found.create, found.replace, found.ranges) == (Create.ATOMIC, Replace.CONDITIONAL, Ranges.HONOURED)
    assert (found.strong, found.ordered, refusals(found)) == (Listing.YES, Listing.YES, [])
    store.put("a", b"1")
    data, first = store.get_version("a")
    store.replace_if_match("a", b"2", first)
    with pytest.raises(ObjectChangedError):
        store.replace_if_match("a", b"3", first)
    assert (data, store.get("a")) == (b"1", b"2")
    store.delete("a")
    state = {"s": {"t": torch.arange(100_000.0)}}
    with fastckpt.Checkpointer(Retrying(store), state, spot=None, keep=fastckpt.Keep(last=1)) as job:
        for step in (1, 2, 3):
            state["s"]["t"] += 1
            job.save_now(step).wait(60)
    with fastckpt.Checkpointer(Retrying(store), {"s": {"t": torch.zeros(100_000)}}, spot=None, read_only=True) as job:
        assert job.restore() == 3


@pytest.mark.parametrize("name", ["x", "epoch=0-step=1 (2).ckpt", "a%20b?c#d.pt", "größe/重み 🙂.pt", "a+b,c;d!e'f.pt"])
def test_objects_by_url_and_the_environment(
    name: str, azurite: str, open_az: Callable[..., BlobStore], environment: pytest.MonkeyPatch
) -> None:
    container = open_az()._place.bucket
    for variable, value in {
        "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_ENDPOINT": azurite,
        "AZURE_ALLOW_HTTP": "true",
    }.items():
        environment.setenv(variable, value)
    fastckpt.save({"a": torch.arange(5)}, f"az://{container}/run/{name}")
    assert fastckpt.load(f"azure://{container}/run/{name}")["a"].equal(torch.arange(5))
    assert open_az(any_names=True).head(name).n_bytes > 0
    assert main(["show", f"az://{container}/run/{name}"]) == 0
    assert main(["probe", f"az://{container}/run", "--yes", "--connections", "2", "--seconds", "0.1"]) == 0
    assert main(["ls", f"az://{container}/none"]) == 3
    environment.delenv("AZURE_ALLOW_HTTP")
    with pytest.raises(StoreError, match="AZURE_ALLOW_HTTP=true") as caught:
        fastckpt.load(f"azure://{container}/run/{name}")
    assert type(caught.value) is StoreError


def test_google_by_the_environment(google: GoogleServer, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", google_config(google.url)["service_account_key"])
    environment.setenv("GOOGLE_ALLOW_HTTP", "true")
    with open_store("gcs://lab/run") as store:
        assert store.url == "gs://lab/run"
        store.put("a", b"1")
    assert google.objects == {"run/a": b"1"}


def test_an_experimental_scheme_takes_one_writer(gs: BlobStore, google: GoogleServer) -> None:
    Repository(gs).initialise()
    with pytest.raises(
        RepositoryError, match=r"experimental.*one process may write here, and 2 want to.*many_writers=True"
    ):
        Repository(Retrying(gs)).initialise(writers=2)
    proven = open_blobs(
        "gs://lab/run", config=google_config(google.url), client_options={"allow_http": True}, many_writers=True
    )
    Repository(Retrying(proven)).initialise(writers=2)


def test_azure_takes_many(az: BlobStore) -> None:
    Repository(Retrying(az)).initialise(writers=8)


@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (403, "AuthorizationFailure", StoreAccessError, "HTTP 403 AuthorizationFailure"),
        (401, "", StoreAccessError, "HTTP 401"),
        (404, "NoSuchBucket", StoreError, "bucket or container does not exist"),
        (404, "NoSuchKey", ObjectNotFoundError, "no such object"),
        (503, "SlowDown", StoreUnavailableError, "another try"),
        (500, "InternalError", StoreUnavailableError, "another try"),
        (429, "", StoreUnavailableError, "HTTP 429"),
        (507, "", StoreFullError, "no room"),
        (501, "NotImplemented", UnsupportedVerbError, "not supported"),
        (400, "InvalidArgument", StoreError, "refused"),
    ],
)
def test_errors(
    status: int, code: str, kind: type[StoreError], words: str, gs: BlobStore, google: GoogleServer
) -> None:
    google.manners.insert(0, refuses(status, code, "sig=SECRET <Token>SECRET</Token>"))
    calls: list[Callable[[], Any]] = [
        lambda: gs.put("a", b"1"),
        lambda: gs.put_if_absent("a", b"1"),
        lambda: gs.get("a"),
        lambda: gs.get_into("a", 0, bytearray(1)),
        lambda: list(gs.list("")),
    ]
    for call in calls:
        with pytest.raises(StoreError, match=words) as caught:
            call()
        assert type(caught.value) is kind
        assert "SECRET" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_no_secret_in_any_words() -> None:
    class BaseError(Exception):
        pass

    text = "Generic error: GET https://x.blob.core.windows.net/c/a?sv=1&sig=TOPSECRET key=TOPSECRET\n\nDebug source: TOPSECRET"
    error = translate(BaseError(text), "get", "az://c/a")
    assert type(error) is StoreUnavailableError
    assert "TOPSECRET" not in str(error)
    assert "Generic error" in str(error)


def test_keys_are_not_shown_and_wrong_ones_are_refused(open_az: Callable[..., BlobStore], azurite: str) -> None:
    wrong = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo="
    config = {"endpoint": azurite, "account_name": "devstoreaccount1", "account_key": wrong}
    store = open_az(config=config)
    assert wrong not in repr(store)
    assert wrong not in repr(store._place)
    with pytest.raises(StoreAccessError, match="HTTP 403") as caught:
        store.put("a", b"1")
    assert wrong not in str(caught.value)


def test_a_missing_container(azurite: str, open_az: Callable[..., BlobStore]) -> None:
    config = dict(open_az()._place.config)
    store = open_blobs("az://nosuchplace/run", config=config, client_options={"allow_http": True})
    for call in (lambda: store.get("a"), lambda: store.put("a", b"1"), lambda: list(store.list(""))):
        with pytest.raises(StoreError, match=r"does not exist\. Create it"):
            call()


def test_no_server(environment: pytest.MonkeyPatch) -> None:
    store = open_blobs("gs://lab/run", config=google_config("http://127.0.0.1:9"), client_options={"allow_http": True})
    with pytest.raises(StoreUnavailableError):
        store.get("a")


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("gs:///x", {}, "no location of a store"),
        ("az://box@account/x", {}, "no location of a store"),
        ("gs://lab/../x", {}, "no name of an object"),
        ("gs://lab/x", {"timeout_s": 0}, "timeout_s is 0"),
        ("abfs://box/x", {}, "write az://container/prefix"),
    ],
)
def test_wrong_places_and_options(url: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(StoreError, match=words):
        open_store(url, **options)


@pytest.mark.parametrize(
    ("url", "config", "words"),
    [
        ("gs://lab/run", {"no_such_setting": "1"}, "no_such_setting"),
        ("gs://lab/run", {"service_account_key": "TOPSECRET"}, "cannot be opened"),
        ("az://lab/run", {}, "Account must be specified.*AZURE_STORAGE_ACCOUNT_NAME"),
        ("az://lab/run", {"account_name": "a", "account_key": "TOPSECRET"}, "cannot be opened"),
    ],
)
def test_settings_that_obstore_does_not_take(url: str, config: dict[str, str], words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        open_blobs(url, config=config)
    assert type(caught.value) is StoreError
    assert "TOPSECRET" not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"


def test_clients_are_kept_and_large_objects_get_more_time(gs: BlobStore, google: GoogleServer) -> None:
    other = open_blobs("gs://lab/other", config=google_config(google.url), client_options={"allow_http": True})
    for store in (gs, other):
        store.put("a", b"1" * 1000)
        store.close()
        with pytest.raises(StoreError, match="closed"):
            store.get("a")
    assert len(blob_client.kept_clients) == 1
    place = gs._place
    assert blob_client.client_of(place, 64 << 20) is blob_client.client_of(place, 1)
    assert blob_client.client_of(place, (64 << 20) + 1) is blob_client.client_of(place, 128 << 20)
    assert len(blob_client.kept_clients) == 2


def test_an_interrupt_ends_a_call_that_waits(google: GoogleServer, gs: BlobStore) -> None:
    """Ctrl-C while the server does not answer."""
    asked, release = threading.Event(), threading.Event()

    def waits(request: Any) -> bool:
        asked.set()
        release.wait(60)
        return False

    google.manners.insert(0, waits)

    def interrupt() -> None:
        asked.wait(30)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            gs.put("a", b"1")
    finally:
        release.set()
        thread.join()


def test_a_forked_process_is_told(gs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gs.put("a", b"1")
    monkeypatch.setattr("fastckpt.store.blob_client._first_pid", 1)
    with pytest.raises(StoreError, match="does not survive a fork"):
        gs.get("a")


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(StoreError, match=r"fastckpt-engine\[clouds\]"):
        open_blobs("gs://lab/run").get("a")
