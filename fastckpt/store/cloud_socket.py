"""One connection to an HTTP/1.1 server: a socket with or without TLS, bytes that were read ahead, and a time-out that measures progress.

**Progress.** If the system can tell (Linux), bytes count as sent when the other side has acknowledged them, not when they are in a buffer
of this machine. So a slow line is tolerated, but a server that hangs is found: a request ends when there was no progress for
`stall_timeout_s`. A request with a body gets at least `stall_timeout_s` plus its size / `slowest_bytes_per_s`, because a server may need
that time to store it.
"""

from __future__ import annotations

import email.parser
import fcntl
import functools
import os
import re
import select
import socket
import ssl
import struct
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

_PIECE_BYTES = 1 << 20
_MOST_HEAD_BYTES = 64 << 10
_MOST_INTERIM = 20
_STATUS = re.compile(rb"[1-9][0-9]{2}")
_INTERIM = re.compile(rb"HTTP/1\.[0-9] +1[0-9][0-9]\b")
_SLICE_S = 1.0  # interval at which a wait checks for progress
_HIDDEN_BYTES = (
    8 << 20
)  # bytes that a proxy may have acknowledged and not yet passed on: Linux lets 6 MiB wait to be read
_TELL_S = 3.0  # seconds of silence before a warning


class HttpError(Exception):
    """There was no complete answer."""

    def __init__(self, text: str, *, never_sent: bool = False, untrusted: bool = False) -> None:
        super().__init__(text)
        self.never_sent = never_sent
        """No byte of the request was sent."""
        self.untrusted = untrusted
        """The server's certificate was refused: another try will not help."""


@dataclass(frozen=True, slots=True)
class Server:
    """The address of a server, and the time-outs for it."""

    endpoint: str
    """http:// or https://, host, port. A path is ignored."""
    ca_bundle: bytes | None = field(default=None, repr=False)
    """Additional certificates to trust, besides the system's."""
    connect_timeout_s: float = 4.0
    stall_timeout_s: float = 20.0
    slowest_bytes_per_s: int = 256 << 10
    connections: int = 64
    """Number of connections kept open between requests."""

    def within(self, most_s: float) -> Server:
        """The same server with time-outs of at most `most_s`."""
        return replace(
            self,
            connect_timeout_s=min(most_s, self.connect_timeout_s),
            stall_timeout_s=min(most_s, self.stall_timeout_s),
        )


class Watch:
    """Watches one request: the time of the last progress, and whether that was too long ago."""

    def __init__(
        self,
        server: Server,
        place: str,
        method: str,
        connection: Connection,
        body_bytes: int,
        tell: Callable[[str], None],
    ) -> None:
        """place: the server, for messages. tell: called to warn that something takes long."""
        self._server, self._place, self._tell = server, place, tell
        self._method, self._connection, self._body_bytes = method, connection, body_bytes
        self._started_s = self._moved_s = time.monotonic()
        self._taken_bytes = 0  # bytes that the system has taken
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
        """Nothing has arrived for one interval. HttpError if that was the last one allowed."""
        server, now = self._server, time.monotonic()
        self._look()
        silent_s = now - self._moved_s
        if silent_s > _TELL_S:
            self._tell(f"{self._method} to {self._place}: nothing has moved for {silent_s:.0f} s; still waiting")
        # The time that a proxy needs for the bytes it holds, at the speed seen so far. That speed is too high because of these bytes:
        # behind a proxy that held 2.6 of 4 MiB, sending seemed to take 95 s, and the answer came 170 s later.
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
                f"no answer in time from {self._place}: of {self._body_bytes} bytes {gone} "
                f"went out, in {moving_s:.0f} s, and then nothing for {silent_s:.0f} s. If it is only slow, lower slowest_bytes_per_s "
                f"({server.slowest_bytes_per_s}) or raise stall_timeout_s ({server.stall_timeout_s:g}), settings of open_store"
            )
        raise HttpError(f"no answer in time from {self._place}: nothing for {silent_s:.1f} s (stall_timeout_s)")


class PlainSocket(socket.socket):
    """Does not warn if nobody closed it: here that only means that nobody closed the store which keeps the connection."""

    def __del__(self) -> None:
        self.close()


class _TlsSocket(ssl.SSLSocket):
    def __del__(self) -> None:
        self.close()


class Connection:
    """A socket, and the bytes read ahead from it. Used by one thread at a time."""

    def __init__(self, found: socket.socket, stall_timeout_s: float) -> None:
        self._socket = found
        found.settimeout(min(_SLICE_S, stall_timeout_s / 4))
        self._early = b""
        self.send_failed = False

    def close(self) -> None:
        self._socket.close()

    def is_quiet(self) -> bool:
        """Whether nothing has arrived on the idle connection: neither its end nor unexpected bytes."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not self._early and not poll.poll(0)

    def unacknowledged_bytes(self) -> int | None:
        """Bytes that were sent but not acknowledged. None: the system cannot tell."""
        try:
            return int(struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, struct.pack("i", 0)))[0])
        except OSError:
            return None

    def send(self, view: memoryview, watch: Watch) -> None:
        at = 0
        while at < view.nbytes:
            try:
                n = self._socket.send(view[at : at + _PIECE_BYTES])
            except TimeoutError:
                if self._has_answered():  # a server that refuses may read nothing more: the rest cannot be sent
                    self.send_failed = True
                    return
                watch.waited()  # the next try sends the same piece, as TLS requires
            else:
                at += n
                watch.sent(n)

    def _has_answered(self) -> bool:
        """Whether the head of a final answer, or the end of the connection, has arrived. Does not wait."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if poll.poll(0):
            waiting_s = self._socket.gettimeout()
            self._socket.settimeout(0)
            try:
                piece = self._socket.recv(8192)
            except (BlockingIOError, ssl.SSLWantReadError):  # TLS sends messages of its own
                return False
            finally:
                self._socket.settimeout(waiting_s)
            if not piece:
                return True
            self._early += piece
        while _INTERIM.match(self._early) and b"\r\n\r\n" in self._early:
            self._early = self._early.partition(b"\r\n\r\n")[2]
        return b"\r\n\r\n" in self._early

    def recv_into(self, view: memoryview, watch: Watch) -> int:
        """Receive bytes; returns their number, 0 at the end."""
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

    def _more(self, watch: Watch) -> None:
        piece = memoryview(bytearray(8192))
        early, self._early = self._early, b""
        n = self.recv_into(piece, watch)
        self._early = early + bytes(piece[:n])
        if not n:
            raise HttpError("the connection was closed before the answer")
        if len(self._early) > _MOST_HEAD_BYTES:
            raise HttpError("the answer is no HTTP: its head does not end")

    def read_line(self, watch: Watch) -> bytes:
        while b"\r\n" not in self._early:
            self._more(watch)
        line, _, self._early = self._early.partition(b"\r\n")
        return line

    def read_head(self, watch: Watch) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer; names in lower case."""
        for _ in range(_MOST_INTERIM):
            while b"\r\n\r\n" not in self._early:
                if len(self._early) > 4 and not self._early.startswith(b"HTTP/"):
                    raise HttpError("the answer is no HTTP: does the server want https?")
                self._more(watch)
            head, _, self._early = self._early.partition(b"\r\n\r\n")
            line, _, rest = head.partition(b"\r\n")
            parts = line.split(None, 2)
            if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not _STATUS.fullmatch(parts[1]):
                raise HttpError("the answer is no HTTP")
            status = int(parts[1])
            if status >= 200:
                found = email.parser.Parser().parsestr(rest.decode("latin-1"), headersonly=True)
                headers = {name.lower(): str(value) for name, value in found.items()}
                if parts[0] == b"HTTP/1.0" and "connection" not in headers:
                    headers["connection"] = "close"
                return status, headers
        raise HttpError("the answer does not come: only interim ones do")


def words_of(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


@functools.lru_cache(maxsize=16)
def tls_context(ca_bundle: bytes | None) -> ssl.SSLContext:
    """A context that trusts the system's and botocore's certificates, and the bundle. Takes 20 ms, so it is made once."""
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
    # The context contains locks, which another thread of the parent may have held.
    os.register_at_fork(after_in_child=tls_context.cache_clear)


def check_bundle(ca_bundle: bytes) -> None:
    """Raises ssl.SSLError or ValueError if the bundle is wrong."""
    tls_context(ca_bundle)
