"""A fake EC2 instance metadata service on loopback: faithful, and adversarial on request.

    with MetadataServer() as server:
        os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = server.url
        server.post_notice(in_s=120)

    python -m fastckpt.testing.metadata_server --port 1338 --notice-after 60

Version 2 only: token by PUT with a TTL header, 401 without a valid token, 404 for absent items, text/plain, a Date header. A notice has one
fixed deadline. `fault` makes every reply wrong in one way until it is reset.
"""

from __future__ import annotations

import argparse
import datetime
import email.utils
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

FAULTS = (
    "hop-limit",  # PUT is accepted but never answered
    "off",  # 403 for everything
    "throttled",  # 503
    "reset",  # the connection is reset
    "drip",  # one byte at a time, for ever
    "truncated",  # half of the body
    "oversize",  # a megabyte
    "redirect",  # 302 to somewhere else
    "garbage",  # not HTTP at all
    "bad-token",  # every token is refused
)
_META = "/latest/meta-data/"


class MetadataServer:
    """Starts on entering `with`. All methods may be called from any thread."""

    def __init__(self, port: int = 0, clock: Callable[[], float] = time.time) -> None:
        self.items: dict[str, str] = {
            "instance-life-cycle": "spot",
            "instance-id": "i-0123456789abcdef0",
            "instance-type": "g5.xlarge",
        }
        """Path below latest/meta-data/ → text. Other paths are 404."""
        self.fault: str | None = None
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request."""
        self.tokens: dict[str, float] = {}
        self.released = threading.Event()
        """Ends replies that a fault keeps waiting."""
        self.skew_s = 0.0
        """Error of the server's clock in its Date header, in seconds."""
        self._clock = clock
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._http = _Server(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> MetadataServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def utc(self, in_s: float = 0.0) -> str:
        """A time as the service writes it."""
        then = datetime.datetime.fromtimestamp(self._clock() + self.skew_s + in_s, datetime.timezone.utc)
        return then.strftime("%Y-%m-%dT%H:%M:%SZ")

    def post_notice(self, action: str = "terminate", in_s: float = 120.0) -> None:
        """Post the interruption notice, with a fixed deadline."""
        when = self.utc(in_s)
        self.items["spot/instance-action"] = json.dumps({"action": action, "time": when})
        if action == "terminate":
            self.items["spot/termination-time"] = when

    def post_rebalance(self) -> None:
        """Post the rebalance recommendation, an early warning."""
        self.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": self.utc()})

    def post_lifecycle_end(self) -> None:
        """Post the autoscaling group's decision to end the instance."""
        self.items["autoscaling/target-lifecycle-state"] = "Terminated"

    def expire_tokens(self) -> None:
        """Make all tokens stale that were given out so far."""
        self.tokens.clear()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore: connections that a fault or the client has broken are expected here."""


class _Handler(BaseHTTPRequestHandler):
    server_state: MetadataServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "EC2ws", ""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        return email.utils.formatdate(self.server_state._clock() + self.server_state.skew_s, usegmt=True)

    def _reply(self, status: int, text: str = "", headers: dict[str, str] | None = None) -> None:
        fault, body = self.server_state.fault, text.encode()
        if fault == "oversize":
            body = b"x" * (1 << 20)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            if fault == "truncated":
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            else:
                self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def _faulty(self, method: str) -> bool:
        state = self.server_state
        state.requests.append((method, self.path))
        fault = state.fault
        if fault == "hop-limit" and method == "PUT":
            state.released.wait()
            self.close_connection = True
        elif fault == "off":
            self._reply(403)
        elif fault == "throttled":
            self._reply(503)
        elif fault == "redirect":
            self._reply(302, "", {"Location": "http://127.0.0.1:1/"})
        elif fault == "garbage":
            self.wfile.write(b"\x00\xff not http\r\n\r\n")
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "drip":
            self._drip()
        else:
            return False
        return True

    def _drip(self) -> None:
        try:
            while not self.server_state.released.wait(0.05):
                self.wfile.write(b"H")
                self.wfile.flush()
        except OSError:
            pass  # the client has closed the connection
        self.close_connection = True

    def do_PUT(self) -> None:
        if self._faulty("PUT"):
            return
        state = self.server_state
        if self.headers.get("X-Forwarded-For"):
            self._reply(403)
        elif self.path != "/latest/api/token":
            self._reply(403 if self.path.endswith("/api/token") else 404)
        else:
            ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if not ttl.isdigit() or not 1 <= int(ttl) <= 21600:
                self._reply(400)
                return
            token = secrets.token_urlsafe(40)
            state.tokens[token] = state._clock() + int(ttl)
            self._reply(200, token, {"X-aws-ec2-metadata-token-ttl-seconds": ttl})

    def do_GET(self) -> None:
        if self._faulty("GET"):
            return
        state = self.server_state
        token = self.headers.get("X-aws-ec2-metadata-token", "")
        if state.fault == "bad-token" or state.tokens.get(token, 0.0) <= state._clock():
            self._reply(401)
        elif self.path.startswith(_META) and self.path.endswith("/"):
            below = self.path.removeprefix(_META)
            names = {
                k[len(below) :].split("/")[0] + ("/" if "/" in k[len(below) :] else "")
                for k in state.items
                if k.startswith(below)
            }
            self._reply(200 if names else 404, "\n".join(sorted(names)))
        else:
            text = state.items.get(self.path.removeprefix(_META))
            self._reply(404 if text is None else 200, text or "")


def main() -> None:
    """Run a server for a training job; a notice appears after a while."""
    parser = argparse.ArgumentParser(description="A fake EC2 metadata service on 127.0.0.1")
    parser.add_argument("--port", type=int, default=1338)
    parser.add_argument("--notice-after", type=float, metavar="SECONDS", help="post a termination notice after so long")
    parser.add_argument(
        "--notice-seconds", type=float, default=120.0, help="how long before the end it comes (default 120)"
    )
    arguments = parser.parse_args()
    with MetadataServer(arguments.port) as server:
        print(f"AWS_EC2_METADATA_SERVICE_ENDPOINT={server.url}", flush=True)
        try:
            if arguments.notice_after is not None:
                threading.Event().wait(arguments.notice_after)
                server.post_notice(in_s=arguments.notice_seconds)
                print("notice posted", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
