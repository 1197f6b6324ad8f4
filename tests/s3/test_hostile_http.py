"""Answers of a server that means harm: an error each, and an end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from fastckpt.store.cloud_http import HttpClient
from fastckpt.store.cloud_socket import HttpError, Server

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
        (b"SSH-2.0-OpenSSH\r\n", b"", "no HTTP"),
        (b"HTTP/1.1 2\xb20 OK\r\n\r\n", b"", "no HTTP"),
    ],
)
def test_an_answer_that_is_none_is_an_error(serve: Start, first: bytes, again: bytes, words: str) -> None:
    client = serve(first, again)
    with pytest.raises(HttpError, match=words):
        whole(client)
    client.close()


def test_an_honest_answer_in_chunks(serve: Start) -> None:
    client = serve(CHUNKED + b"5;x=y\r\nhello\r\n1\r\n!\r\n0\r\na: b\r\n\r\n", b"")
    assert whole(client) == b"hello!"
    client.close()
