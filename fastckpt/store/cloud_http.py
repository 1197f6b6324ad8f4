"""HTTP/1.1 to one server, with persistent connections and time-outs that measure progress. No redirects, no retries.

Uses plain sockets, because no library offers all of this: progress of a PUT's body, no redirect that turns a PUT into a GET, the headers of
a refusal, and new connections in a forked process. Bytes move in pieces of a MiB, outside the GIL: 0.2 s of CPU per GiB, over TLS 0.9,
which is less than the Rust client took that was here before.
"""

from __future__ import annotations

import collections
import os
import re
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Mapping
from types import TracebackType

from fastckpt.events import logger
from fastckpt.store.cloud_socket import Connection, HttpError, PlainSocket, Server, Watch, tls_context, words_of

_MOST_UNREAD_BYTES = 64 << 10  # rest of an answer: more is not read just to keep a connection
_MOST_TRAILERS = 100
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
_LENGTH = re.compile(r"[0-9]{1,18}")
_IDLE_S = (
    15.0  # less than servers allow for an idle connection, so that a request rarely meets one that is just being closed
)
_TELL_AGAIN_S = 30.0


class HttpClient:
    """Requests to one server, from any thread. A forked process opens connections of its own.

    proxy: host, port and headers of the proxy to the server, as `proxy_of` finds it. None: no proxy.
    """

    def __init__(self, server: Server, proxy: tuple[str, int, dict[str, str]] | None = None) -> None:
        parts = urllib.parse.urlsplit(server.endpoint)
        self.server = server
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._proxy = proxy
        # A deque needs no lock; a fork could leave a lock locked.
        self._idle: collections.deque[tuple[int, float, Connection]] = collections.deque()
        self._told_s = -_TELL_AGAIN_S

    @property
    def place(self) -> str:
        """The server, for messages."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}" + (f" (by the proxy {self._proxy[0]}:{self._proxy[1]})" if self._proxy else "")

    def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: memoryview | None = None,
        *,
        most_s: float | None = None,
    ) -> HttpResponse:
        """Send a request and wait for the head of the answer. HttpError. `target`: path and query, quoted. Content-Length is added if there
        is a body. most_s: shorter time-outs than the server's, for a request that nobody should wait for.
        """
        server = self.server if most_s is None else self.server.within(most_s)
        connection = self._connection(server)
        try:
            if self._proxy and not self._tls:
                target = urllib.parse.urlunsplit(("http", headers["host"], *urllib.parse.urlsplit(target)[2:]))
                headers = {**headers, **self._proxy[2]}
            lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
            if body is not None or method == "PUT":
                lines.append(f"content-length: {0 if body is None else body.nbytes}")
            head = "\r\n".join([*lines, "", ""]).encode("ascii")
            watch = self._watch(server, method, connection, 0 if body is None else body.nbytes)
            return self._exchange(connection, watch, method, head, body)
        except OSError as error:  # ssl.SSLError is one
            connection.close()
            raise HttpError(f"the connection to {self.place} broke: {words_of(error)}") from error
        except BaseException:
            connection.close()
            raise

    def _exchange(
        self, connection: Connection, watch: Watch, method: str, head: bytes, body: memoryview | None
    ) -> HttpResponse:
        try:
            connection.send(memoryview(head), watch)
            if body is not None:
                connection.send(body, watch)
        except OSError:
            # A server may refuse and close before it has read everything: its answer is worth more than the broken pipe.
            connection.send_failed = True
            try:
                return HttpResponse(self, connection, watch, method)
            except (OSError, HttpError):
                pass
            raise
        return HttpResponse(self, connection, watch, method)

    def _watch(self, server: Server, method: str, connection: Connection, body_bytes: int) -> Watch:
        return Watch(server, self.place, method, connection, body_bytes, self._tell)

    def _tell(self, text: str) -> None:
        """Warn that something takes long, at most once in 30 s."""
        now = time.monotonic()
        if now - self._told_s >= _TELL_AGAIN_S:
            self._told_s = now
            logger.warning("%s", text)

    def _connection(self, server: Server) -> Connection:
        while True:
            try:
                pid, since_s, connection = self._idle.pop()
            except IndexError:
                return self._connect(server)
            if pid == os.getpid() and time.monotonic() - since_s < _IDLE_S and connection.is_quiet():
                return connection
            connection.close()

    def keep(self, connection: Connection) -> None:
        """Take back a connection whose answer was read completely."""
        self._drop(lambda since_s: time.monotonic() - since_s >= _IDLE_S)
        if len(self._idle) >= self.server.connections:
            connection.close()
        else:
            self._idle.append((os.getpid(), time.monotonic(), connection))

    def drop_idle(self) -> None:
        """Close idle connections; requests in flight go on, and later ones open new connections."""
        self._drop(lambda since_s: True)

    def _drop(self, is_old: Callable[[float], bool]) -> None:
        """Close the oldest idle connections. Without a lock: another thread may take one between a look and its removal."""
        try:
            while is_old(self._idle[0][1]):
                oldest = self._idle.popleft()
                if not is_old(oldest[1]):
                    self._idle.appendleft(oldest)
                    return
                oldest[2].close()
        except IndexError:
            return

    def _connect(self, server: Server) -> Connection:
        host, port = self._proxy[:2] if self._proxy else (self._host, self._port)
        plain: socket.socket | None = None
        try:
            found = socket.create_connection((host, port), server.connect_timeout_s)
            plain = PlainSocket(fileno=found.detach())
            plain.settimeout(server.connect_timeout_s)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not self._tls:
                return Connection(plain, server.stall_timeout_s)
            if self._proxy:
                self._tunnel(server, Connection(plain, server.stall_timeout_s))
                plain.settimeout(server.connect_timeout_s)
            encrypted = tls_context(server.ca_bundle).wrap_socket(plain, server_hostname=self._host)
            return Connection(encrypted, server.stall_timeout_s)
        except BaseException as error:
            if plain is not None:
                plain.close()
            if isinstance(error, (OSError, UnicodeError)):  # UnicodeError: a name that DNS cannot have
                raise self._no_connection(server, error) from error
            raise

    def _tunnel(self, server: Server, connection: Connection) -> None:
        assert self._proxy is not None
        name = f"{self._host}:{self._port}"
        lines = [
            f"CONNECT {name} HTTP/1.1",
            f"host: {name}",
            *(f"{name}: {value}" for name, value in self._proxy[2].items()),
        ]
        watch = self._watch(server, "CONNECT", connection, 0)
        connection.send(memoryview("\r\n".join([*lines, "", ""]).encode("ascii")), watch)
        status, _ = connection.read_head(watch)
        if not 200 <= status < 300:
            raise HttpError(f"the proxy {self._proxy[0]}:{self._proxy[1]} refuses with HTTP {status}", never_sent=True)

    def _no_connection(self, server: Server, error: OSError | UnicodeError) -> HttpError:
        place, timeout_s = self.place, server.connect_timeout_s
        if isinstance(error, ssl.SSLCertVerificationError):
            return HttpError(
                f"the certificate of {place} is not trusted ({error.verify_message}). Name the authority's certificate in AWS_CA_BUNDLE or "
                "in the profile's ca_bundle",
                never_sent=True,
                untrusted=True,
            )
        if isinstance(error, ssl.SSLError):
            what = f"no TLS with {place} ({error.reason or error}). Should the endpoint be http://?"
        elif isinstance(error, socket.gaierror):
            what = f"the name of {place} cannot be resolved ({error.strerror})"
        elif isinstance(error, UnicodeError):
            what = f"the name of {place} is none that can be resolved ({error})"
        elif isinstance(error, TimeoutError):
            what = f"no connection to {place} in {timeout_s:g} s"
        else:
            what = f"no connection to {place}: {words_of(error)}"
        return HttpError(f"{what}. Check the endpoint", never_sent=True)


class HttpResponse:
    """An answer whose head has arrived. Use it with `with`: a connection whose answer was not read completely is closed."""

    def __init__(self, client: HttpClient, connection: Connection, watch: Watch, method: str) -> None:
        self._client, self._connection, self._watch = client, connection, watch
        self.status, self.headers = connection.read_head(watch)
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        length = self.headers.get("content-length")
        if length is not None and not _LENGTH.fullmatch(length.strip()):
            raise HttpError(f"the answer of {client.place} is no HTTP: {length[:40]!r} is no length")
        self.n_bytes = None if length is None else int(length)
        """Length of the body according to the head. None: not given."""
        self._left: int | None = None if self._chunked else self.n_bytes
        if method == "HEAD" or self.status in (204, 304):
            self._left, self._chunked = 0, False
        self._in_chunk = False

    def read_into(self, view: memoryview) -> int:
        """Read the next available bytes; returns their number, 0 at the end. HttpError if the connection ends too early."""
        try:
            return self._read_into(view)
        except OSError as error:
            raise HttpError(f"the connection to {self._client.place} broke: {words_of(error)}") from error
        except ValueError as error:
            raise HttpError(f"the answer of {self._client.place} is no HTTP: {error}") from error

    def _read_into(self, view: memoryview) -> int:
        if self._chunked and not self._left and not self._next_chunk():
            return 0
        if self._left == 0 or not view.nbytes:
            return 0
        n = self._connection.recv_into(view if self._left is None else view[: self._left], self._watch)
        if self._left is not None:
            if not n:
                raise HttpError(f"{self._client.place} closed the connection {self._left} bytes before the end")
            self._left -= n
        return n

    def _next_chunk(self) -> bool:
        if self._in_chunk:
            self._connection.read_line(self._watch)
        words = self._connection.read_line(self._watch).split(b";")[0].strip()
        if not _CHUNK_SIZE.fullmatch(words):
            raise ValueError(f"{words[:20]!r} is no size of a chunk")
        size = int(words, 16)
        self._left, self._in_chunk = size, True
        if not size:
            for _ in range(_MOST_TRAILERS):
                if not self._connection.read_line(self._watch):
                    break
            else:
                raise ValueError("its trailers do not end")
            self._chunked = False
        return bool(size)

    def read(self, most_bytes: int) -> bytes:
        """Read the rest, at most `most_bytes`."""
        out = bytearray()
        piece = memoryview(bytearray(min(most_bytes, 64 << 10)))
        while len(out) < most_bytes and (n := self.read_into(piece[: most_bytes - len(out)])):
            out += piece[:n]
        return bytes(out)

    def __enter__(self) -> HttpResponse:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            whole = self._left == 0 and not self._chunked
            if not whole and isinstance(error, Exception) and (self._left is None or self._left <= _MOST_UNREAD_BYTES):
                self.read(_MOST_UNREAD_BYTES)
                whole = self._left == 0 and not self._chunked
        except (HttpError, ValueError):
            whole = False
        if whole and not self._connection.send_failed and self.headers.get("connection", "").lower() != "close":
            self._client.keep(self._connection)
        else:
            self._connection.close()
