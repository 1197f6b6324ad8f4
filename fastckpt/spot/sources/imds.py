"""A client of the EC2 instance metadata service, version 2 only.

Our own, because botocore's falls back to version 1 in silence, obeys http_proxy, fetches a token for every request, and cannot tell "no
notice" from "stale token". This client uses botocore's environment names. It treats every reply as hostile: size and time are limited,
parsing is strict, redirects are not followed.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastckpt.host.threads import start

_TOKEN_TTL_S = 21600
_RENEW_S = 60.0  # before the token expires: a poll must not meet a stale token in the last two minutes
_MAX_REPLY_BYTES = 64 << 10
_TOKEN_HEADER = "X-aws-ec2-metadata-token"
_TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
_IPV4, _IPV6 = "http://169.254.169.254", "http://[fd00:ec2::254]"


class MetadataUnavailable(Exception):
    """The service cannot be asked; the text gives the reason and the next step."""


@dataclass(frozen=True)
class Reply:
    """The answer to a GET: the text, and the server's clock (Unix seconds) if it was given."""

    text: str
    date_s: float | None


class ImdsClient:
    """One thread at a time. Holds a token, no connection."""

    def __init__(
        self, endpoint: str, timeout_s: float = 1.0, attempts: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        parts = urllib.parse.urlsplit(endpoint)
        problems = []
        if parts.scheme != "http":
            problems.append("the scheme must be http")
        if (
            not parts.hostname
            or parts.username is not None
            or parts.query
            or parts.fragment
            or parts.path not in ("", "/")
        ):
            problems.append("expected http://host or http://host:port and nothing else")
        try:
            port = parts.port or 80
        except ValueError:
            problems.append("the port is no port")
        if not 0 < timeout_s <= 60:
            problems.append(f"a time-out of {timeout_s} s; expected more than 0 and at most 60")
        if not 1 <= attempts <= 10:
            problems.append(f"{attempts} attempts; expected 1 to 10")
        if problems:
            raise ValueError(f"metadata service {endpoint!r}: {'; '.join(problems)}")
        self.endpoint = endpoint.rstrip("/")
        self._host, self._port = parts.hostname or "", port
        self._timeout_s, self._attempts, self._clock = timeout_s, attempts, clock
        self._token: str | None = None
        self._token_until_s = 0.0

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> ImdsClient | None:
        """Make a client as the environment says. None if AWS_EC2_METADATA_DISABLED is true. ValueError lists what is wrong in the
        environment.
        """
        if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            return None
        mode = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "").lower()
        if not mode:
            mode = "ipv6" if environ.get("AWS_IMDS_USE_IPV6", "").lower() == "true" else "ipv4"
        if mode not in ("ipv4", "ipv6"):
            raise ValueError(f"AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE is {mode!r}: expected ipv4 or ipv6")
        endpoint = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or (_IPV6 if mode == "ipv6" else _IPV4)
        numbers = {}
        for name, default in (("AWS_METADATA_SERVICE_TIMEOUT", "1"), ("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1")):
            try:
                numbers[name] = float(environ.get(name) or default)
            except ValueError:
                raise ValueError(f"{name} is {environ[name]!r}: expected a number") from None
        return cls(endpoint, numbers["AWS_METADATA_SERVICE_TIMEOUT"], int(numbers["AWS_METADATA_SERVICE_NUM_ATTEMPTS"]))

    def get(self, path: str) -> Reply | None:
        """An item, such as "latest/meta-data/spot/instance-action"; None if it is absent, as notices are most of the time.

        MetadataUnavailable for everything else.
        """
        for last in (False, True):
            status, reply = self._try(lambda: self._request("GET", path, {_TOKEN_HEADER: self._fresh_token()}))
            if status == 200:
                return reply
            if status == 404:
                return None
            if (
                status == 401 and not last
            ):  # the token has expired, or belongs to another instance: this machine was restored from an image
                self._token = None
                continue
            break
        raise MetadataUnavailable(f"{self.endpoint}: GET {path} was answered with status {status}. {_advice(status)}")

    def _try(self, request: Callable[[], tuple[int, Reply]]) -> tuple[int, Reply]:
        for attempt in range(1, self._attempts + 1):
            try:
                status, reply = request()
            except (OSError, http.client.HTTPException) as error:
                if attempt == self._attempts:
                    raise MetadataUnavailable(
                        f"{self.endpoint}: {type(error).__name__}: {error}. Not on EC2, a firewall, or the hop limit of a container: "
                        "aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2"
                    ) from error
            else:
                if status not in (429, 500, 502, 503, 504) or attempt == self._attempts:
                    return status, reply
        raise AssertionError("unreachable")

    def _fresh_token(self) -> str:
        if self._token is None or self._clock() >= self._token_until_s:
            asked = self._clock()
            status, reply = self._request("PUT", "latest/api/token", {_TTL_HEADER: str(_TOKEN_TTL_S)})
            if status != 200 or not reply.text.isascii() or not reply.text.isprintable() or not reply.text:
                raise MetadataUnavailable(f"{self.endpoint}: no token, status {status}. {_advice(status)}")
            self._token, self._token_until_s = reply.text, asked + _TOKEN_TTL_S - _RENEW_S
        return self._token

    def _request(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, Reply]:
        """One request, which ends within the time-out even if the reply drips. No proxies: http.client knows none. No redirects."""
        deadline_s = time.monotonic() + self._timeout_s
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, f"/{path}", headers=headers)
            response = _WithDeadline(connection, deadline_s).response()
            body = bytearray()
            while len(body) <= _MAX_REPLY_BYTES:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"no whole reply within {self._timeout_s} s")
                if connection.sock is not None:
                    connection.sock.settimeout(left_s)
                piece = response.read1(4096)
                if not piece:
                    break
                body += piece
            else:
                raise OSError(f"a reply of more than {_MAX_REPLY_BYTES} bytes")
            date = email.utils.parsedate_to_datetime(response.headers["Date"]) if response.headers["Date"] else None
            return response.status, Reply(body.decode("utf-8", "replace").strip(), date.timestamp() if date else None)
        except (ValueError, TypeError, OverflowError) as error:
            raise OSError(f"a reply that cannot be read: {error}") from error
        finally:
            connection.close()


class _WithDeadline:
    """Limits the time for the head of a reply: http.client reads line by line, and each line may take the whole time-out. A timer closes
    the socket.
    """

    def __init__(self, connection: http.client.HTTPConnection, deadline_s: float) -> None:
        self._connection, self._deadline_s = connection, deadline_s

    def response(self) -> http.client.HTTPResponse:
        sock = self._connection.sock
        assert sock is not None

        def cut() -> None:
            with contextlib.suppress(OSError):  # closed already
                sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(max(0.0, self._deadline_s - time.monotonic()), cut)
        timer.daemon = True  # holds only a socket
        start(timer)  # does not start if the interpreter is ending; each read still has its time-out
        try:
            return self._connection.getresponse()
        finally:
            timer.cancel()


def _advice(status: int) -> str:
    if status == 403:
        return "It is switched off or not allowed: aws ec2 modify-instance-metadata-options --http-endpoint enabled"
    if status == 401:
        return "A new token was refused as well: something between here and the service changes requests"
    if status in (429, 503):
        return "It asks to come back later; fewer pollers on this machine would help"
    if 300 <= status < 400:
        return "It redirects, which the real service never does: this is something else"
    return "This is not what the service answers"
