"""All stores of a process share connections to a server; what decides a connection is looked at by each opening."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("boto3", reason="s3:// needs boto3")
import botocore.session

import fastckpt
from fastckpt.errors import StoreError
from fastckpt.store import cloud_account, cloud_pool
from fastckpt.store.cloud import open_s3
from fastckpt.store.cloud_socket import Server
from tests.s3.manners import OBJECT, MannersServer, is_object, self_signed

pytestmark = pytest.mark.usefixtures("environment", "nothing_kept")

N_CHECKPOINTERS = 12


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_account, "known_accounts", {})
    monkeypatch.setattr(cloud_pool, "shared_clients", {})


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every session that botocore makes."""
    made: list[object] = []
    make = botocore.session.Session.__init__

    def counted(self: object, *args: object, **more: object) -> None:
        made.append(self)
        make(self, *args, **more)

    monkeypatch.setattr(botocore.session.Session, "__init__", counted)
    return made


def test_later_calls_make_no_session_and_no_connection(server: MannersServer, sessions: list[object]) -> None:
    fastckpt.save(OBJECT, "s3://lab/x")
    for _ in range(3):
        assert is_object(fastckpt.load("s3://lab/x"))
        with fastckpt.open("s3://lab/x") as found:
            assert found["a"].equal(OBJECT["a"])
    assert (len(sessions), server.n_connections) == (1, 1)


def test_a_checkpointer_uses_the_connections_that_are_there(server: MannersServer, sessions: list[object]) -> None:
    state = {"s": OBJECT}
    for step in range(1, N_CHECKPOINTERS + 1):
        with fastckpt.Checkpointer("s3://lab/run", state, spot=None) as ckpt:
            ckpt.restore()
            ckpt.save_now(step).wait(60)
    assert len(sessions) == len(cloud_pool.shared_clients) == 1
    # A few are open: as many as threads have asked at once, at some time. One for each Checkpointer would be more.
    assert server.n_connections < N_CHECKPOINTERS


def test_closing_a_store_leaves_the_others_alone(server: MannersServer) -> None:
    one, other = open_s3("s3://lab/one"), open_s3("s3://lab/other")
    one.put("a", b"1")
    one.close()
    with pytest.raises(StoreError, match="closed"):
        one.get("a")
    other.put("a", b"2")
    assert server.n_connections == 1


def test_accounts_share_connections_and_sign_for_themselves(
    server: MannersServer, environment: pytest.MonkeyPatch, sessions: list[object]
) -> None:
    open_s3("s3://lab/run").put("a", b"1")
    environment.setenv("AWS_ACCESS_KEY_ID", "AKIA2")
    open_s3("s3://lab/run").put("b", b"2")
    who = [put.headers["authorization"].split("Credential=")[1].split("/")[0] for put in server.requests("PUT")]
    assert who == ["AKIA1", "AKIA2"]
    assert (len(sessions), server.n_connections) == (2, 1)


def test_another_proxy_is_another_client(server: MannersServer, environment: pytest.MonkeyPatch) -> None:
    open_s3("s3://lab/run", endpoint_url="http://store.invalid")
    with MannersServer() as proxy:
        environment.setenv("HTTP_PROXY", proxy.url)
        proxy.manners.append(lambda request: request.answer(200, b"", {"ETag": '"x"'}))
        open_s3("s3://lab/run", endpoint_url="http://store.invalid").put("a", b"1")
        assert [put.path for put in proxy.requests("PUT")] == ["http://store.invalid/lab/run/a"]
    assert len(cloud_pool.shared_clients) == 2


def test_another_bundle_is_another_client(
    encrypted: MannersServer, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A connection that was trusted with one bundle is not used by a store with another one."""
    open_s3("s3://lab/run").put("a", b"1")
    other = tmp_path / "other"
    other.mkdir()
    environment.setenv("AWS_CA_BUNDLE", self_signed(other)[0])
    with pytest.raises(StoreError, match="not trusted"):
        open_s3("s3://lab/run").get("a")


def test_only_so_many_are_kept(server: MannersServer) -> None:
    store = open_s3("s3://lab/run")
    store.put("a", b"1")
    for port in range(20):
        cloud_pool.shared_client(Server(f"http://127.0.0.1:{port + 1}"))
    assert len(cloud_pool.shared_clients) == 16
    assert store.get("a") == b"1"  # its connection was closed, and it opens a new one
    assert server.n_connections == 2


def test_old_connections_are_closed_by_later_requests(server: MannersServer, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_s3("s3://lab/run")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: store.put(f"k{i}", b"1" * 100_000), range(64)))
    (client,) = cloud_pool.shared_clients.values()
    monkeypatch.setattr("fastckpt.store.cloud_http._IDLE_S", 0.0)
    store.get("k1")
    assert len(client._idle) == 1


def _in_child(url: str) -> None:
    open_s3("s3://lab/run", endpoint_url=url).put("child", b"2")


def test_a_forked_process_opens_its_own(server: MannersServer) -> None:
    store = open_s3("s3://lab/run")
    store.put("a", b"1")
    with cloud_pool._lock:  # as a thread of the parent may hold it at the moment of a fork
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(server.url,))
        child.start()
    child.join(30)
    assert child.exitcode == 0
    assert store.get("a") == b"1"
    assert server.objects["run/child"] == b"2"
    assert server.n_connections == 2


def test_the_interpreters_end_is_quiet(encrypted: MannersServer) -> None:
    """Nobody closes the store: no warning, and the save at the very end arrives. Starts a Python with torch: some 5 s."""
    code = (
        "import atexit, fastckpt, torch\n"
        "atexit.register(lambda: fastckpt.save({'a': torch.arange(3)}, 's3://lab/late'))\n"
        "import fastckpt.store.cloud_pool\n"
        "fastckpt.save({'a': torch.arange(3)}, 's3://lab/x')\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code],
        capture_output=True, text=True, timeout=100, env=dict(os.environ), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert {"x", "late"} <= set(encrypted.objects)
