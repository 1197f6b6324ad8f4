"""An HTTP proxy that causes the faults of networks and servers between a client and an object store. Standard library only.

    with FaultProxy("127.0.0.1", 9000) as proxy:
        proxy.add(Fault.LOST_ACK, method="PUT", match=r"/commits/")      # the first such request; then all is well again
        store = open_s3("s3://bucket/prefix", endpoint_url=proxy.url)
        ...
        assert proxy.requests("PUT")[0].fault is Fault.LOST_ACK

It listens on 127.0.0.1, speaks HTTP/1.1 to both sides (with `tls` over TLS to the client), and passes requests on unchanged (Host and
signature included), except `Expect: 100-continue`, which it answers itself. Each connection has a thread of its own. Rules are tried in the
order in which they were added; the first one that matches a request is applied, and removed after `count` requests. All methods may be
called from any thread.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from fastckpt.testing.fault_script import Exchange, Fault, Rule, Script
from fastckpt.testing.http_stream import PIECE_BYTES, HttpStream

_BURST_S = 0.02  # unused bandwidth that is kept
_FAULT_ID = "x-amz-request-id: FAULT\r\n"
_NO_BODY = frozenset({204, 304})


class FaultProxy:
    """Listens from the constructor until `close`. Use its `url` in place of the server's. Its 14 attributes: the faults to play, and
    counts.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        bytes_per_s: float = 0.0,
        bytes_per_s_each: float = 0.0,
        delay_s: float = 0.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Make a proxy in front of http://host:port. `bytes_per_s`: of all connections together, both directions; `bytes_per_s_each`: of
        each; 0: no limit. `delay_s`: before each request is passed on. All three may be changed at any time. `tls`: a server's context.
        """
        self.bytes_per_s = bytes_per_s
        self.bytes_per_s_each = bytes_per_s_each
        self.delay_s = delay_s
        self._upstream = (host, port)
        self._tls = tls
        self._lock = threading.Lock()
        self._script = Script()
        self._paid_until = 0.0
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        if (
            bytes_per_s or bytes_per_s_each
        ):  # otherwise the kernel's receive buffer would hide the limit from the client
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 << 10)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._acceptor = threading.Thread(target=self._accept, name="fault-proxy", daemon=True)
        self._acceptor.start()

    @property
    def port(self) -> int:
        """The port on which it listens."""
        return int(self.url.rpartition(":")[2])

    def add(
        self,
        fault: Fault,
        *,
        method: str = "",
        match: str = "",
        count: int = 1,
        skip: int = 0,
        status: int = 500,
        code: str = "InternalError",
        detail: str = "",
        headers: dict[str, str] | None = None,
    ) -> Rule:
        """Add a rule for `count` requests whose method is `method` and whose path and query match the expression `match` ("": any), after
        `skip` such requests. For Fault.ANSWER: `status`, `code` (of the XML body; "": no body), `detail` (XML beside the code) and
        `headers`.
        """
        rule = Rule(fault, method, match, count, skip, status, code, detail, headers or {})
        self._script.add(rule)
        return rule

    def clear(self) -> None:
        """Forget rules and log; let stalled requests continue."""
        self._script.clear()

    def requests(self, method: str = "") -> list[Exchange]:
        """All requests so far."""
        return self._script.exchanges(method)

    def close(self) -> None:
        """End every connection and wait for the threads."""
        self._closing.set()
        with self._lock:
            open_sockets, threads = list(self._sockets), list(self._threads)
        self._script.release()
        for one in [self._listener, *open_sockets]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes the thread that is in accept or recv; close would not
        self._acceptor.join(10)
        self._listener.close()
        for thread in threads:
            thread.join(10)

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), name="fault-proxy-connection", daemon=True)
            with self._lock:
                self._threads = [other for other in self._threads if other.is_alive()]
                self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        if self._tls is not None:
            try:
                client = self._tls.wrap_socket(client, server_side=True)
            except OSError:  # includes ssl.SSLError: the client does not trust us, or has closed
                client.close()
                return
        connection = _Connection(self, client)
        try:
            while not self._closing.is_set() and connection.one_request():
                pass
        except (OSError, EOFError, ValueError, IndexError):
            pass  # a side has closed, or sent no HTTP: the connection ends, as with any proxy
        finally:
            connection.close()

    def _track(self, one: socket.socket, *, is_open: bool) -> None:
        with self._lock:
            (self._sockets.add if is_open else self._sockets.discard)(one)

    def _connect(self) -> socket.socket:
        upstream = socket.create_connection(self._upstream)
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return upstream

    def _pace(self, n_bytes: int, connection: _Connection) -> None:
        """Sleep as long as the limits require for `n_bytes`."""
        now = time.monotonic()
        wait_s = 0.0
        if self.bytes_per_s > 0:
            with self._lock:
                self._paid_until = max(self._paid_until, now - _BURST_S) + n_bytes / self.bytes_per_s
                wait_s = self._paid_until - now
        if self.bytes_per_s_each > 0:
            connection.paid_until = max(connection.paid_until, now - _BURST_S) + n_bytes / self.bytes_per_s_each
            wait_s = max(wait_s, connection.paid_until - now)
        if wait_s > 0:
            self._closing.wait(wait_s)


class _Connection:
    """One client's connection and, if needed, one to the server. Used by one thread."""

    def __init__(self, proxy: FaultProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = HttpStream(client)
        self._server: HttpStream | None = None
        self.paid_until = 0.0
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        proxy._track(client, is_open=True)

    def close(self) -> None:
        for stream in (self._client, self._server):
            if stream is not None:
                self._proxy._track(stream.socket, is_open=False)
                stream.socket.close()

    def _reset_client(self) -> None:
        # Linger 0: close sends RST.
        self._client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._proxy._track(self._client.socket, is_open=False)
        self._client.socket.close()

    def _upstream(self) -> HttpStream:
        if self._server is None:
            self._server = HttpStream(self._proxy._connect())
            self._proxy._track(self._server.socket, is_open=True)
        return self._server

    def one_request(self) -> bool:
        """Pass on one request and its answer. Returns whether this connection can have another one."""
        try:
            head, headers = self._client.head()
        except EOFError:
            return False
        method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        exchange = Exchange(method, target, headers, None)
        rule = self._proxy._script.pick(exchange)
        if self._proxy.delay_s > 0:
            self._proxy._closing.wait(self._proxy.delay_s)
        if headers.get("expect", "").lower() == "100-continue":
            self._client.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)expect:[^\r]*\r\n", b"", head)
        if rule is not None:
            rule.reached.set()
            if not self._before_the_server(rule, exchange, head, headers):
                return False
        upstream = self._upstream()
        upstream.socket.sendall(head)
        flip = rule is not None and rule.fault is Fault.FLIP_REQUEST
        self._copy(self._client.body(headers), upstream.socket.sendall, flip=flip)
        return self._answer(rule, exchange)

    def _before_the_server(self, rule: Rule, exchange: Exchange, head: bytes, headers: dict[str, str]) -> bool:
        """Do the rule's work while the request arrives. Returns whether the server shall see the request."""
        fault = rule.fault
        if fault is Fault.STALL:
            rule.release.wait()
            return not self._proxy._closing.is_set()
        if fault in (Fault.SLOW_DOWN, Fault.ERROR_IN_200, Fault.ANSWER):
            self._copy(self._client.body(headers), lambda piece: None)
            if fault is Fault.SLOW_DOWN:
                self._say(exchange, 503, "SlowDown")
            elif fault is Fault.ERROR_IN_200:
                self._say(exchange, 200, "InternalError")
            else:
                self._say(exchange, rule.status, rule.code, rule.detail, rule.headers)
            return False
        if fault in (Fault.INTERNAL_ERROR, Fault.RESET):
            half = int(headers.get("content-length") or 0) // 2
            if half:  # a request without a body would be carried out by the server
                upstream = self._upstream()
                upstream.socket.sendall(head)
                self._copy(self._client.body(headers), upstream.socket.sendall, stop_at=half)
            if fault is Fault.RESET:
                self._reset_client()
                return False
            self._say(exchange, 500, "InternalError")
            # Closing with unread bytes would send RST, which can overtake the answer. So read the rest first.
            self._client.socket.shutdown(socket.SHUT_WR)
            while self._client.socket.recv(PIECE_BYTES):
                pass
            return False
        return True

    def _say(
        self, exchange: Exchange, status: int, code: str, detail: str = "", headers: dict[str, str] | None = None
    ) -> None:
        exchange.status = status
        body = (
            f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message>{detail}</Error>'
            if code
            else ""
        )
        extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        text = (
            f"HTTP/1.1 {status} Injected\r\n{_FAULT_ID}{extra}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._client.socket.sendall((text + ("" if exchange.method == "HEAD" else body)).encode("latin-1"))

    def _answer(self, rule: Rule | None, exchange: Exchange) -> bool:
        upstream, fault = self._upstream(), None if rule is None else rule.fault
        while True:
            head, headers = upstream.head()
            status = int(head.split(b" ", 2)[1])
            if status >= 200:
                break
        exchange.status = status
        if exchange.method == "HEAD" or status in _NO_BODY:
            headers = {name: value for name, value in headers.items() if name == "connection"}
        half = int(headers.get("content-length") or 0) // 2
        if fault is Fault.LOST_ACK:
            self._copy(upstream.body(headers), lambda piece: None)
            self._reset_client()
            return False
        self._client.socket.sendall(head)
        body = upstream.body(headers)
        send = self._client.socket.sendall
        if fault is Fault.TRUNCATE:
            self._copy(body, send, stop_at=half)
            return False
        if fault is Fault.STALL_RESPONSE and rule is not None:
            self._copy(body, send, stop_at=half, then=rule.release.wait)
        else:
            self._copy(body, send, flip=fault is Fault.FLIP_RESPONSE)
        return headers.get("connection", "").lower() != "close"

    def _copy(
        self,
        body: Iterator[bytes],
        sink: Callable[[bytearray], object],
        *,
        flip: bool = False,
        stop_at: int | None = None,
        then: Callable[[], object] | None = None,
    ) -> None:
        """Pass a body on. `stop_at`: after this many bytes call `then` and go on, or end if there is no `then`."""
        passed = 0
        for whole in body:
            piece = bytearray(whole)
            if flip:
                piece[len(piece) // 2] ^= 4
                flip = False
            if stop_at is not None and passed + len(piece) >= stop_at:
                self._send(piece[: stop_at - passed], sink)
                if then is None:
                    return
                then()
                del piece[: stop_at - passed]
                stop_at = None
            self._send(piece, sink)
            passed += len(whole)

    def _send(self, piece: bytearray, sink: Callable[[bytearray], object]) -> None:
        self._proxy._pace(len(piece), self)
        sink(piece)


__all__ = ["Exchange", "Fault", "FaultProxy", "Rule"]
