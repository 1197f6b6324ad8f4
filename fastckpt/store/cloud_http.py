"""HTTP/1.1 to one server: connections that are kept, time-outs that measure progress. Nothing is followed, nothing is tried again.

Plain sockets, for what the libraries do not give together: seeing how far the body of a PUT is, no redirect that makes a GET of a PUT, the
headers of a refusal, and connections that a forked process may open anew. Bytes move in pieces of a MiB, outside the GIL: 0.2 s of CPU per
GiB, over TLS 0.9, which is less than the Rust client took that was here before.

**Progress.** A piece counts as sent when the other side has acknowledged it, where the system tells (Linux), and not when it lies in a
buffer of this machine. So a line may be as slow as it likes, while a server that hangs is found: a request ends when nothing has moved
for `stall_timeout_s`, though a body gets at least `stall_timeout_s` plus its size / `slowest_bytes_per_s`, the time that a server may
take to store what it has.
"""

from __future__ import annotations

import base64
import collections
import email.parser
import fcntl
import functools
import ipaddress
import os
import re
import select
import socket
import ssl
import struct
import termios
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from fastckpt.errors import StoreError
from fastckpt.events import logger

_PIECE_BYTES = 1 << 20
_MOST_HEAD_BYTES = 64 << 10
_MOST_UNREAD_BYTES = 64 << 10  # of an answer: more is not read for the sake of a connection
_MOST_INTERIM, _MOST_TRAILERS = 20, 100
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
_IDLE_S = 15.0  # shorter than what servers grant an idle connection, so that a request rarely meets one that is just being closed
_SLICE_S = 1.0  # how often a wait looks for progress
_HIDDEN_BYTES = 8 << 20  # what a proxy may have acknowledged and not yet passed on: Linux lets 6 MiB wait to be read
_TELL_S = 3.0  # of silence
_TELL_AGAIN_S = 30.0


class HttpError(Exception):
    """No whole answer came."""

    def __init__(self, text: str, *, never_sent: bool = False, untrusted: bool = False) -> None:
        super().__init__(text)
        self.never_sent = never_sent
        """No byte of the request has left."""
        self.untrusted = untrusted
        """The server's certificate was refused: another try will not help."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where to, and with which patience."""

    endpoint: str
    """http:// or https://, host, port. A path is not looked at."""
    ca_bundle: bytes | None = None
    """Certificates to trust besides the system's."""
    connect_timeout_s: float = 4.0
    stall_timeout_s: float = 20.0
    slowest_bytes_per_s: int = 256 << 10
    connections: int = 16
    """Kept open between requests."""


class HttpClient:
    """Requests to one server, from any thread. A forked process opens connections of its own."""

    def __init__(self, server: Server) -> None:
        parts = urllib.parse.urlsplit(server.endpoint)
        self.server = server
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._tls else 80)
        self._proxy = proxy_of(server.endpoint)
        # A deque needs no lock, which a fork could find taken.
        self._idle: collections.deque[tuple[int, float, _Connection]] = collections.deque()
        self._closed = False
        self._told_s = -_TELL_AGAIN_S

    @property
    def place(self) -> str:
        """For messages."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{host}:{self._port}" + (f" (by the proxy {self._proxy[0]}:{self._proxy[1]})" if self._proxy else "")

    def request(
        self, method: str, target: str, headers: Mapping[str, str], body: memoryview | None = None
    ) -> HttpResponse:
        """Send it, and wait for the head of the answer. HttpError. `target`: path and query, quoted. Content-Length is added for a body."""
        connection = self._connection()
        try:
            if self._proxy and not self._tls:
                target = urllib.parse.urlunsplit(("http", headers["host"], *urllib.parse.urlsplit(target)[2:]))
                headers = {**headers, **self._proxy[2]}
            lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
            if body is not None or method == "PUT":
                lines.append(f"content-length: {0 if body is None else body.nbytes}")
            head = "\r\n".join([*lines, "", ""]).encode("ascii")
            watch = _Watch(self, f"{method} to {self.place}", connection, 0 if body is None else body.nbytes)
            return self._exchange(connection, watch, method, head, body)
        except OSError as error:  # ssl.SSLError is one
            connection.close()
            raise HttpError(f"the connection to {self.place} broke: {_words(error)}") from error
        except BaseException:
            connection.close()
            raise

    def _exchange(
        self, connection: _Connection, watch: _Watch, method: str, head: bytes, body: memoryview | None
    ) -> HttpResponse:
        try:
            connection.send(memoryview(head), watch)
            if body is not None:
                connection.send(body, watch)
        except OSError:
            # A server may refuse before it has read everything, and close: its answer is worth more than the broken pipe.
            connection.send_failed = True
            try:
                return HttpResponse(self, connection, watch, method)
            except (OSError, HttpError):
                pass
            raise
        return HttpResponse(self, connection, watch, method)

    def tell(self, text: str) -> None:
        """A warning that something takes long, not more than one in 30 s."""
        now = time.monotonic()
        if now - self._told_s >= _TELL_AGAIN_S:
            self._told_s = now
            logger.warning("%s", text)

    def _connection(self) -> _Connection:
        if self._closed:
            raise StoreError(f"the connections to {self.place} are closed")
        while True:
            try:
                pid, since_s, connection = self._idle.pop()
            except IndexError:
                return self._connect()
            if pid == os.getpid() and time.monotonic() - since_s < _IDLE_S and connection.is_quiet():
                return connection
            connection.close()

    def keep(self, connection: _Connection) -> None:
        """Take back a connection whose answer was read to its end."""
        if self._closed or len(self._idle) >= self.server.connections:
            connection.close()
        else:
            self._idle.append((os.getpid(), time.monotonic(), connection))

    def close(self) -> None:
        """Requests under way go on."""
        self._closed = True
        while self._idle:
            self._idle.pop()[2].close()

    def _connect(self) -> _Connection:
        host, port = self._proxy[:2] if self._proxy else (self._host, self._port)
        plain: socket.socket | None = None
        try:
            found = socket.create_connection((host, port), self.server.connect_timeout_s)
            plain = _Socket(fileno=found.detach())
            plain.settimeout(self.server.connect_timeout_s)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not self._tls:
                return _Connection(plain, self.server.stall_timeout_s)
            if self._proxy:
                self._tunnel(_Connection(plain, self.server.stall_timeout_s))
                plain.settimeout(self.server.connect_timeout_s)
            encrypted = _tls_context(self.server.ca_bundle).wrap_socket(plain, server_hostname=self._host)
            return _Connection(encrypted, self.server.stall_timeout_s)
        except BaseException as error:
            if plain is not None:
                plain.close()
            if isinstance(error, (OSError, UnicodeError)):  # the latter: a name that DNS cannot have
                raise self._no_connection(error) from error
            raise

    def _tunnel(self, connection: _Connection) -> None:
        assert self._proxy is not None
        name = f"{self._host}:{self._port}"
        lines = [
            f"CONNECT {name} HTTP/1.1",
            f"host: {name}",
            *(f"{name}: {value}" for name, value in self._proxy[2].items()),
        ]
        watch = _Watch(self, f"CONNECT to {self.place}", connection, 0)
        connection.send(memoryview("\r\n".join([*lines, "", ""]).encode("ascii")), watch)
        status, _ = connection.read_head(watch)
        if not 200 <= status < 300:
            raise HttpError(f"the proxy {self._proxy[0]}:{self._proxy[1]} refuses with HTTP {status}", never_sent=True)

    def _no_connection(self, error: OSError | UnicodeError) -> HttpError:
        place, timeout_s = self.place, self.server.connect_timeout_s
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
            what = f"no connection to {place}: {_words(error)}"
        return HttpError(f"{what}. Check the endpoint", never_sent=True)


class HttpResponse:
    """An answer: its head has come. To be used with `with`: a connection whose answer was not read to its end is closed."""

    def __init__(self, client: HttpClient, connection: _Connection, watch: _Watch, method: str) -> None:
        self._client, self._connection, self._watch = client, connection, watch
        self.status, self.headers = connection.read_head(watch)
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        length = self.headers.get("content-length")
        self.n_bytes = int(length) if length is not None and length.isdecimal() else None
        """Of the object, as the head has it. None: not said."""
        self._left: int | None = None if self._chunked else self.n_bytes
        if method == "HEAD" or self.status in (204, 304):
            self._left, self._chunked = 0, False
        self._in_chunk = False

    def read_into(self, view: memoryview) -> int:
        """As many of the next bytes as come; 0: the end. HttpError if the connection ends before."""
        try:
            return self._read_into(view)
        except OSError as error:
            raise HttpError(f"the connection to {self._client.place} broke: {_words(error)}") from error
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
        """The rest, or its first `most_bytes`."""
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


class _Watch:
    """Of one request: when did something move last, and is it too long ago?"""

    def __init__(self, client: HttpClient, what: str, connection: _Connection, body_bytes: int) -> None:
        self._client, self._what, self._connection = client, what, connection
        self._body_bytes = body_bytes
        self._started_s = self._moved_s = time.monotonic()
        self._taken_bytes = 0  # by the system
        self._acknowledged_bytes = 0

    def sent(self, n_bytes: int) -> None:
        self._taken_bytes += n_bytes
        self._look()

    def received(self) -> None:
        self._moved_s = time.monotonic()

    def _look(self) -> None:
        waiting = self._connection.unacknowledged_bytes()
        there = self._taken_bytes - (waiting or 0)
        if there > self._acknowledged_bytes:
            self._acknowledged_bytes = there
            self._moved_s = time.monotonic()

    def waited(self) -> None:
        """Nothing came for a slice of time. HttpError if it was the last one."""
        server, now = self._client.server, time.monotonic()
        self._look()
        silent_s = now - self._moved_s
        if silent_s > _TELL_S:
            self._client.tell(f"{self._what}: nothing has moved for {silent_s:.0f} s; still waiting")
        # At the speed seen so far, as long as a proxy needs for what it holds. That speed is too high by what it has swallowed: behind one
        # that held 2.6 of 4 MiB, sending seemed to take 95 s, and the answer came 170 s later.
        moving_s = self._moved_s - self._started_s
        hidden_s = (
            3 * moving_s * min(1.0, _HIDDEN_BYTES / max(1, self._acknowledged_bytes)) if self._body_bytes else 0.0
        )
        least_s = server.stall_timeout_s + self._body_bytes / server.slowest_bytes_per_s
        if now < max(self._started_s + least_s, self._moved_s + server.stall_timeout_s + hidden_s):
            return
        if self._body_bytes:
            gone = min(self._acknowledged_bytes, self._body_bytes)
            raise HttpError(
                f"no answer in time from {self._client.place}: of {self._body_bytes} bytes {gone} "
                f"went out, in {moving_s:.0f} s, and then nothing for {silent_s:.0f} s. If it is only slow, lower slowest_bytes_per_s "
                f"({server.slowest_bytes_per_s}) or raise stall_timeout_s ({server.stall_timeout_s:g}), settings of open_store"
            )
        raise HttpError(f"no answer in time from {self._client.place}: nothing for {silent_s:.1f} s (stall_timeout_s)")


class _Socket(socket.socket):
    """Python warns of a socket that nobody has closed; here that is the connection kept by a store that nobody has closed."""

    def __del__(self) -> None:
        self.close()


class _TlsSocket(ssl.SSLSocket):
    def __del__(self) -> None:
        self.close()


class _Connection:
    """A socket, and what has been read from it too early. Used by one thread at a time."""

    def __init__(self, found: socket.socket, stall_timeout_s: float) -> None:
        self._socket = found
        found.settimeout(min(_SLICE_S, stall_timeout_s / 4))
        self._early = b""
        self.send_failed = False

    def close(self) -> None:
        self._socket.close()

    def is_quiet(self) -> bool:
        """Nothing has come since: neither the end nor bytes that nobody asked for."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not self._early and not poll.poll(0)

    def unacknowledged_bytes(self) -> int | None:
        """Bytes that have left this process and have not arrived. None: the system does not tell."""
        try:
            return int(struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, struct.pack("i", 0)))[0])
        except OSError:
            return None

    def send(self, view: memoryview, watch: _Watch) -> None:
        at = 0
        while at < view.nbytes:
            try:
                n = self._socket.send(view[at : at + _PIECE_BYTES])
            except TimeoutError:
                watch.waited()  # the next try has the same piece, as TLS wants it
            else:
                at += n
                watch.sent(n)

    def recv_into(self, view: memoryview, watch: _Watch) -> int:
        """0: the end."""
        if self._early:
            n = min(view.nbytes, len(self._early))
            view[:n] = self._early[:n]
            self._early = self._early[n:]
            return n
        while True:
            try:
                n = self._socket.recv_into(view[:_PIECE_BYTES])
            except TimeoutError:
                watch.waited()
            except ssl.SSLEOFError:
                return 0
            else:
                watch.received()
                return n

    def _more(self, watch: _Watch) -> None:
        piece = memoryview(bytearray(8192))
        early, self._early = self._early, b""
        n = self.recv_into(piece, watch)
        self._early = early + bytes(piece[:n])
        if not n:
            raise HttpError("the connection was closed before the answer")
        if len(self._early) > _MOST_HEAD_BYTES:
            raise HttpError("the answer is no HTTP: its head does not end")

    def read_line(self, watch: _Watch) -> bytes:
        while b"\r\n" not in self._early:
            self._more(watch)
        line, _, self._early = self._early.partition(b"\r\n")
        return line

    def read_head(self, watch: _Watch) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer; names in lower case."""
        for _ in range(_MOST_INTERIM):
            while b"\r\n\r\n" not in self._early:
                if len(self._early) > 4 and not self._early.startswith(b"HTTP/"):
                    raise HttpError("the answer is no HTTP: does the server want https?")
                self._more(watch)
            head, _, self._early = self._early.partition(b"\r\n\r\n")
            line, _, rest = head.partition(b"\r\n")
            parts = line.split(None, 2)
            if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
                raise HttpError("the answer is no HTTP")
            status = int(parts[1])
            if status >= 200:
                found = email.parser.Parser().parsestr(rest.decode("latin-1"), headersonly=True)
                headers = {name.lower(): str(value) for name, value in found.items()}
                if parts[0] == b"HTTP/1.0" and "connection" not in headers:
                    headers["connection"] = "close"
                return status, headers
        raise HttpError("the answer does not come: only interim ones do")


def _words(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


@functools.lru_cache(maxsize=16)
def _tls_context(ca_bundle: bytes | None) -> ssl.SSLContext:
    """Trusts what the system and botocore trust, and the bundle. Takes 20 ms: made once."""
    import botocore.httpsession

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.sslsocket_class = _TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_default_certs()
    context.load_verify_locations(cafile=botocore.httpsession.where())
    if ca_bundle:
        context.load_verify_locations(cadata=ca_bundle.decode("ascii", "ignore"))
    return context


if hasattr(os, "register_at_fork"):
    # A context has locks, which another thread of the parent may have held.
    os.register_at_fork(after_in_child=_tls_context.cache_clear)


def check_bundle(ca_bundle: bytes) -> None:
    """ssl.SSLError, ValueError: what is wrong with it."""
    _tls_context(ca_bundle)


def proxy_of(endpoint: str) -> tuple[str, int, dict[str, str]] | None:
    """Host, port and headers of the proxy that the environment names for an endpoint; None: straight on. StoreError.

    What boto3 obeys, and besides it networks in NO_PROXY ("10.0.0.0/8"), which many other programs know.
    """
    parts = urllib.parse.urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    url = proxies.get(parts.scheme) or proxies.get("all")
    host = parts.hostname or ""
    if not url or urllib.request.proxy_bypass(parts.netloc) or _in_network(host, proxies.get("no", "")):
        return None
    found = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = found.port or 80
    except ValueError:
        port = 0
    if found.scheme != "http" or not found.hostname or not port:
        raise StoreError(
            f"the environment's proxy for {parts.scheme}:// is none that can be used ({found.scheme}://{found.hostname}): expected "
            "http://host:port. Name the store's host in NO_PROXY if it is reached without one"
        )
    headers = {}
    if found.username is not None:
        words = f"{urllib.parse.unquote(found.username)}:{urllib.parse.unquote(found.password or '')}"
        headers["proxy-authorization"] = "Basic " + base64.b64encode(words.encode()).decode()
    return found.hostname, port, headers


def _in_network(host: str, no_proxy: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for word in no_proxy.split(","):
        try:
            if "/" in word and address in ipaddress.ip_network(word.strip(), strict=False):
                return True
        except (ValueError, TypeError):
            continue
    return False


def host_header(endpoint: str) -> str:
    """Of requests to the endpoint."""
    parts = urllib.parse.urlsplit(endpoint)
    host: Any = parts.netloc.rpartition("@")[2]
    return str(host.removesuffix(":443" if parts.scheme == "https" else ":80"))
