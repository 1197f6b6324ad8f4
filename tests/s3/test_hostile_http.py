"""Answers of a server that means harm: an error each, and an end."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastckpt.store.cloud_http import HttpClient, HttpError, Server
from tests.s3.manners import self_signed

HEAD = b"HTTP/1.1 200 OK\r\netag: x\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
Start = Callable[[bytes, bytes], HttpClient]


@pytest.fixture
def serve() -> Iterator[Start]:
    """A client of a server that says `first`, and then `again` for as long as it is listened to."""
    listening = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def start(first: bytes, again: bytes) -> HttpClient:
        def run() -> None:
            talking, _ = listening.accept()
            with talking:
                talking.settimeout(30)
                try:
                    talking.recv(4096)
                    talking.sendall(first)
                    while again:
                        talking.sendall(again)
                except OSError:
                    pass

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return HttpClient(Server(f"http://127.0.0.1:{listening.getsockname()[1]}", stall_timeout_s=10))

    yield start
    for thread in threads:
        thread.join(60)
    listening.close()


def whole(client: HttpClient) -> bytes:
    with client.request("GET", "/x", {"host": "x"}) as answer:
        return answer.read(1 << 20)


@pytest.mark.parametrize(
    ("first", "again", "words"),
    [
        (CHUNKED + b"-5\r\nhello", b"", "no size of a chunk"),
        (CHUNKED + b"0x5\r\nhello", b"", "no size of a chunk"),
        (CHUNKED + b"f" * 40 + b"\r\nhello", b"", "no size of a chunk"),
        (CHUNKED + b"0\r\n", b"a: b\r\n" * 100, "trailers do not end"),
        (CHUNKED + b"5\r\nhel", b"", "before the end"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, "only interim ones"),
        (HEAD, b"a: b\r\n" * 1000, "head does not end"),
        (HEAD + b"content-length: 10\r\n\r\nhello", b"", "before the end"),
        (HEAD + b"content-length: " + b"9" * 5000 + b"\r\n\r\nhello", b"", "no length"),
        (HEAD + b"content-length: -1\r\n\r\nhello", b"", "no length"),
        (b"HTTP/1.1 " + b"2" * 5000 + b" OK\r\n\r\n", b"", "no HTTP"),
        (b"SSH-2.0-OpenSSH\r\n", b"", "no HTTP"),
        (b"HTTP/1.1 2\xb20 OK\r\n\r\n", b"", "no HTTP"),
    ],
)
def test_an_answer_that_is_none_is_an_error(serve: Start, first: bytes, again: bytes, words: str) -> None:
    client = serve(first, again)
    with pytest.raises(HttpError, match=words):
        whole(client)
    client.drop_idle()


def test_an_honest_answer_in_chunks(serve: Start) -> None:
    client = serve(CHUNKED + b"5;x=y\r\nhello\r\n1\r\n!\r\n0\r\na: b\r\n\r\n", b"")
    assert whole(client) == b"hello!"
    client.drop_idle()


REFUSAL = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 4\r\n\r\nwhy?"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("says", [REFUSAL, INTERIM + REFUSAL])
def test_a_refusal_before_the_body_was_read_is_heard(says: bytes, tls: bool, tmp_path: Path) -> None:
    with (
        Deaf(tmp_path if tls else None, says) as server,
        server.client().request("PUT", "/x", {"host": "x"}, memoryview(bytes(64 << 20))) as answer,
    ):
        assert (answer.status, answer.read(100)) == (403, b"why?")


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("says", [b"", INTERIM])
def test_a_server_that_only_reads_late_gets_the_whole_body(says: bytes, tls: bool, tmp_path: Path) -> None:
    with Deaf(tmp_path if tls else None, says) as server:
        client = server.client()
        client._tell = lambda text: server.listen.set()  # type: ignore[method-assign]
        with client.request("PUT", "/x", {"host": "x"}, memoryview(bytes(64 << 20))) as answer:
            assert (answer.status, answer.read(100)) == (200, b"")
    assert server.n_bytes >= 64 << 20


class Deaf:
    """A server that says something as soon as it has the head of a request, and reads on only when `listen` is set: then it says yes."""

    def __init__(self, certificate: Path | None, says: bytes) -> None:
        self.listen = threading.Event()
        self.n_bytes = 0
        self._says = says
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._context: ssl.SSLContext | None = None
        self._bundle: bytes | None = None
        if certificate is not None:
            cert, key = self_signed(certificate)
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(cert, key)
            self._bundle = Path(cert).read_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def client(self) -> HttpClient:
        url = f"{'https' if self._context else 'http'}://127.0.0.1:{self._listening.getsockname()[1]}"
        return HttpClient(Server(url, self._bundle, stall_timeout_s=60))

    def _run(self) -> None:
        talking, _ = self._listening.accept()
        if self._context is not None:
            talking = self._context.wrap_socket(talking, server_side=True)
        with talking:
            self.n_bytes = len(talking.recv(4096))
            talking.sendall(self._says)
            while not self._ended.is_set():
                if self.listen.wait(0.01):
                    while self.n_bytes < 64 << 20:
                        self.n_bytes += len(talking.recv(1 << 20))
                    talking.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    return

    def __enter__(self) -> Deaf:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)
        self._listening.close()
