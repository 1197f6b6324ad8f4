"""Servers for gs:// and az://: one that plays Google's, of our own, and Azurite, Microsoft's emulator, where it is installed."""

import base64
import datetime
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastckpt.store import blob_client
from fastckpt.store.blob import BlobStore, open_blobs
from tests.blobs.google import GoogleServer

# Microsoft's documents give this account and key for emulators.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing of the machine's own accounts or proxies."""
    for name in list(os.environ):
        if name.startswith(("AZURE_", "GOOGLE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(blob_client, "kept_clients", {})
    return monkeypatch


def google_config(url: str) -> dict[str, str]:
    """A service account of an emulator: nobody is asked for a token."""
    account = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    return {"service_account_key": json.dumps(account)}


@pytest.fixture
def google() -> Iterator[GoogleServer]:
    with GoogleServer() as server:
        yield server


@pytest.fixture
def gs(google: GoogleServer) -> BlobStore:
    return open_blobs("gs://lab/run", config=google_config(google.url), client_options={"allow_http": True})


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an Azurite of this session."""
    program = os.environ.get("FASTCKPT_TEST_AZURITE") or shutil.which("azurite-blob")
    if program is None:
        pytest.skip(
            "Azurite is not installed: npm install --global azurite, or FASTCKPT_TEST_AZURITE=path of azurite-blob"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    place = ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with (tmp_path_factory.mktemp("azurite") / "log").open("wb") as log:
        process = subprocess.Popen([program, *place, *options], stdout=log, stderr=log)
        try:
            _wait_for(port, process, Path(log.name))
            yield f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
        finally:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Azurite did not start: {log.read_text()}") from None
            time.sleep(0.05)


def new_container(url: str, name: str) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": now, "x-ms-version": "2021-08-06"}
    told = "".join(f"{header}:{value}\n" for header, value in headers.items())
    text = f"PUT{chr(10) * 12}{told}/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{name}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256)).decode()
    headers |= {"Authorization": f"SharedKey {AZURE_ACCOUNT}:{signature}", "Content-Length": "0"}
    request = urllib.request.Request(f"{url}/{name}?restype=container", method="PUT", headers=headers)
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 201


@pytest.fixture
def open_az(azurite: str, request: pytest.FixtureRequest) -> Callable[..., BlobStore]:
    """Opens a prefix of a container that is new for the test."""
    container = f"lab{abs(hash(request.node.nodeid)) % 10**12}"
    new_container(azurite, container)
    config = {"endpoint": azurite, "account_name": AZURE_ACCOUNT, "account_key": AZURE_KEY}

    def opener(prefix: str = "run", **options: Any) -> BlobStore:
        mine: dict[str, Any] = {"config": config, "client_options": {"allow_http": True}}
        return open_blobs(f"az://{container}/{prefix}", **(mine | options))

    return opener


@pytest.fixture
def az(open_az: Callable[..., BlobStore]) -> BlobStore:
    return open_az()
