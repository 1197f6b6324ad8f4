"""An S3 server that takes everything and keeps little: for measuring what a client costs. Standard library only; 127.0.0.1 only.

    with null_server(drop=r"/data/") as server:      # a process of its own: the client's CPU time is the client's alone
        Checkpointer("s3://bucket/run", …)           # with AWS_ENDPOINT_URL=server.url and any keys
        print(server.counts())

    python -m fastckpt.testing.null_server --port 9000 --keep

Bodies of PUTs above `keep_below_bytes` whose path matches `drop` are thrown away as they arrive (on Linux, over http, in the kernel), and
read as zeros, or as `pattern`. All others are kept in memory, so records, votes and listings are real. It speaks PUT, GET, HEAD, DELETE,
multipart uploads, listings, If-None-Match and If-Match; it checks neither signatures nor checksums, and holds all buckets that are named.
Each connection has a thread. `POST /_null/counts` returns JSON: requests by verb, connections, bytes of bodies, CPU seconds of the server.
"""

from __future__ import annotations

import argparse
import contextlib
import email.utils
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastckpt.testing.http_stream import HttpStream
from fastckpt.testing.null_answers import Answer, Request, answer, aws_chunks
from fastckpt.testing.null_objects import Objects, Piece

_CONTROL = "/_null/"
_PACED_BYTES = 64 << 10  # at a time, where a rate is set
_BURST_S = 0.02  # unused bandwidth that is kept
_ZEROS = bytes(4 << 20)


@dataclass
class Settings:
    """What can be changed while the server runs (`NullServer.change`)."""

    keep: bool = False
    """Drop nothing."""
    keep_below_bytes: int = 64 << 10
    """Bodies of up to so many bytes are kept."""
    drop: str = ""
    """An expression that the path (with its bucket) of a dropped body matches; "": any."""
    bytes_per_s: float = 0.0
    """Of all connections together, each direction; 0: no limit."""
    bytes_per_s_each: float = 0.0
    """Of each connection, each direction."""
    delay_s: float = 0.0
    """Before each answer."""

    @property
    def is_paced(self) -> bool:
        return self.bytes_per_s > 0 or self.bytes_per_s_each > 0


class _Pace:
    """When the next bytes may go. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paid_until = 0.0

    def wait_s(self, n_bytes: int, bytes_per_s: float) -> float:
        if bytes_per_s <= 0:
            return 0.0
        now = time.monotonic()
        with self._lock:
            self._paid_until = max(self._paid_until, now - _BURST_S) + n_bytes / bytes_per_s
            return max(0.0, self._paid_until - now)


class _Server:
    """The server itself, in its own process."""

    def __init__(self, port: int, settings: Settings, tls: ssl.SSLContext | None, pattern: bytes) -> None:
        self.settings = settings
        self.objects = Objects(pattern)
        self.up, self.down = _Pace(), _Pace()
        self._tls = tls
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._cpu_s = time.process_time()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"

    def serve(self) -> None:
        """Accept connections for ever."""
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._connection, args=(client,), daemon=True).start()

    def _connection(self, client: socket.socket) -> None:
        # A client that goes away, or speaks no HTTP, ends its connection and nothing else.
        with contextlib.suppress(OSError, EOFError, ValueError, IndexError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.settings.is_paced:  # otherwise the kernel's buffer, which grows, would hide the limit
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 << 10)
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            self.count(connections=1)
            connection = _Connection(self, client)
            while connection.one_request():
                pass
        client.close()

    def count(self, **more: int) -> None:
        with self._lock:
            self._counts.update(more)

    def control(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Carry out counts, reset (given `objects`: true, also forget the objects) or change (of settings)."""
        if name == "reset":
            with self._lock:
                self._counts.clear()
            self._cpu_s = time.process_time()
            if given.get("objects"):
                self.objects.clear()
        elif name == "change":
            self.settings = Settings(**{**asdict(self.settings), **given})
        elif name != "counts":
            raise ValueError(f"{name!r} is no order: expected counts, reset or change")
        with self._lock:
            counts = dict(self._counts)
        return {
            "requests": {verb: n for verb, n in counts.items() if verb.isupper()},
            "connections": counts.get("connections", 0),
            "bytes_received": counts.get("bytes_received", 0),
            "bytes_sent": counts.get("bytes_sent", 0),
            "objects": len(self.objects),
            "cpu_s": time.process_time() - self._cpu_s,
        }


class _Connection:
    """One client. Used by one thread."""

    def __init__(self, server: _Server, client: socket.socket) -> None:
        self._server = server
        self._socket = client
        self._stream = HttpStream(client)
        self._up, self._down = _Pace(), _Pace()

    def one_request(self) -> bool:
        """Answer one request. Returns whether another one may follow."""
        head, headers = self._stream.head()
        request = Request.parse(head, headers)
        if headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._receive(request)
        if request.path.startswith(_CONTROL):
            given = json.loads(bytes(body) or b"{}") if not isinstance(body, int) else {}
            data = json.dumps(self._server.control(request.path.removeprefix(_CONTROL), given)).encode()
            self._send(request, Answer(body=iter([memoryview(data)]), n_bytes=len(data)))
        else:
            n_bytes = body if isinstance(body, int) else len(body)
            self._server.count(bytes_received=n_bytes, **{request.verb: 1})
            found = answer(self._server.objects, request, body)
            if self._server.settings.delay_s > 0:
                time.sleep(self._server.settings.delay_s)
            self._server.count(bytes_sent=self._send(request, found))
        return headers.get("connection", "").lower() != "close"

    def _receive(self, request: Request) -> Piece:
        settings, headers = self._server.settings, request.headers
        chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        n_bytes = int(headers.get("content-length") or 0)
        stated = int(headers.get("x-amz-decoded-content-length") or n_bytes)
        dropped = (
            request.method == "PUT"
            and not settings.keep
            and stated > settings.keep_below_bytes
            and bool(re.search(settings.drop, request.path))
        )
        if dropped:
            for n in self._chunks() if chunked else [n_bytes]:
                self._skip(n)
            return stated
        body = bytearray(0 if chunked else n_bytes)
        self._fill(memoryview(body))
        for n in self._chunks() if chunked else ():
            piece = bytearray(n)
            self._fill(memoryview(piece))
            body += piece
        return aws_chunks(body) if request.is_aws_chunked else body

    def _chunks(self) -> Iterator[int]:
        """The length of each chunk of a chunked body, whose bytes the caller then takes."""
        while True:
            n = int(self._stream.until(b"\r\n").split(b";")[0], 16)
            if not n:
                while self._stream.until(b"\r\n") != b"\r\n":
                    pass
                return
            yield n
            self._stream.until(b"\r\n")

    def _pace(self, n_bytes: int, shared: _Pace, own: _Pace) -> None:
        settings = self._server.settings
        wait_s = max(shared.wait_s(n_bytes, settings.bytes_per_s), own.wait_s(n_bytes, settings.bytes_per_s_each))
        if wait_s > 0:
            time.sleep(wait_s)

    def _skip(self, n_bytes: int) -> None:
        while n_bytes:
            n = self._stream.skip(min(n_bytes, _PACED_BYTES) if self._server.settings.is_paced else n_bytes)
            n_bytes -= n
            self._pace(n, self._server.up, self._up)

    def _fill(self, view: memoryview) -> None:
        step = _PACED_BYTES if self._server.settings.is_paced else max(1, view.nbytes)
        for at in range(0, view.nbytes, step):
            part = view[at : at + step]
            self._stream.fill(part)
            self._pace(part.nbytes, self._server.up, self._up)

    def _send(self, request: Request, found: Answer) -> int:
        lines = [f"HTTP/1.1 {found.status} Null", f"Content-Length: {found.n_bytes}"]
        lines += [f"{name}: {value}" for name, value in found.headers.items()]
        lines += ["x-amz-request-id: NULL", f"Date: {email.utils.formatdate(usegmt=True)}", "\r\n"]
        self._socket.sendall("\r\n".join(lines).encode("latin-1"))
        if request.method == "HEAD":
            return 0
        for view in found.body or ():
            step = _PACED_BYTES if self._server.settings.is_paced else max(1, view.nbytes)
            for at in range(0, view.nbytes, step):
                part = view[at : at + step]
                self._pace(part.nbytes, self._server.down, self._down)
                self._socket.sendall(part)
        return found.n_bytes


class NullServer:
    """A running server, made by `null_server`. Its orders go through a pipe, so they also reach it in another network namespace."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lock = threading.Lock()
        self.url: str = self._answer()["url"]

    @property
    def port(self) -> int:
        """The port on 127.0.0.1."""
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        """Of its process (of the program of `prefix`, if there is one)."""
        return self._process.pid

    def counts(self) -> dict[str, Any]:
        """Since the start or `reset`: `requests` by verb, `connections`, `bytes_received` and `bytes_sent` (of bodies), `objects`, `cpu_s`
        (of the server).
        """
        return self._order("counts")

    def reset(self, *, objects: bool = False) -> None:
        """Count from zero; with `objects` forget all objects, too."""
        self._order("reset", objects=objects)

    def change(self, **settings: Any) -> None:
        """Change fields of `Settings`; rates hold for connections that are made later. ValueError."""
        self._order("change", **settings)

    def _order(self, name: str, **given: Any) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps([name, given]) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the null server ended with {self._process.wait()}: see its messages on stderr")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ValueError(found["error"])
        return found


@contextlib.contextmanager
def null_server(
    *,
    port: int = 0,
    tls: tuple[str | Path, str | Path] | None = None,
    pattern: str | Path | None = None,
    prefix: Sequence[str] = (),
    **settings: Any,
) -> Iterator[NullServer]:
    """Run a server in a process of its own, which ends with the `with` block, or with this process.

    Args:
        port: on 127.0.0.1; 0: any free one.
        tls: certificate and key, as PEM files.
        pattern: a file whose bytes are what dropped objects are read as; by default zeros.
        prefix: a command in front of the server's, such as `ip netns exec NAME`.
        settings: fields of `Settings`.

    Raises:
        RuntimeError: it did not start.
    """
    command = [*prefix, sys.executable, "-m", "fastckpt.testing.null_server", "--port", str(port), "--orders"]
    command += ["--settings", json.dumps(asdict(Settings(**settings)))]
    if tls is not None:
        command += ["--tls", *map(str, tls)]
    if pattern is not None:
        command += ["--pattern", str(pattern)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield NullServer(process)
        finally:
            process.kill()


def _take_orders(server: _Server) -> None:
    """Carry out the orders on stdin until it ends."""
    for line in sys.stdin:
        name, given = json.loads(line)
        try:
            found = server.control(name, given)
        except (TypeError, ValueError) as error:
            found = {"error": str(error)}
        print(json.dumps(found), flush=True)


def main() -> None:
    """Run a server until it is interrupted."""
    parser = argparse.ArgumentParser(description="An S3 server on 127.0.0.1 that drops large bodies")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"), help="PEM files")
    parser.add_argument("--pattern", metavar="FILE", help="what dropped objects are read as (default: zeros)")
    parser.add_argument("--keep", action="store_true", help="drop nothing")
    parser.add_argument(
        "--settings", default="{}", metavar="JSON", help="fields of fastckpt.testing.null_server.Settings"
    )
    parser.add_argument("--orders", action="store_true", help="take orders on stdin, and end with it")
    arguments = parser.parse_args()
    settings = Settings(**json.loads(arguments.settings))
    settings.keep = settings.keep or arguments.keep
    context = None
    if arguments.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*arguments.tls)
    pattern = Path(arguments.pattern).read_bytes() if arguments.pattern else _ZEROS
    server = _Server(arguments.port, settings, context, pattern)
    print(json.dumps({"url": server.url}), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        if not arguments.orders:
            server.serve()
        threading.Thread(target=server.serve, daemon=True).start()
        _take_orders(server)


if __name__ == "__main__":
    main()
