"""One signed request to S3, tried once, and its answer: a success, or one of StoreError's subclasses."""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

from fastckpt._version import __version__
from fastckpt.errors import ObjectExistsError, ObjectNotFoundError, StoreAccessError, StoreError, StoreUnavailableError
from fastckpt.store.cloud_connection import Connection
from fastckpt.store.cloud_errors import (
    CREDENTIAL_CODES,
    Answer,
    cut_secrets,
    harmless,
    read_answer,
    refuses_checksum,
    translate,
    wants_checksum,
)
from fastckpt.store.cloud_http import HttpResponse
from fastckpt.store.cloud_pool import shared_client
from fastckpt.store.cloud_proxy import host_header
from fastckpt.store.cloud_signature import NO_PAYLOAD, UNSIGNED_PAYLOAD, quoted_path, quoted_query, signed
from fastckpt.store.cloud_socket import HttpError

MOST_ERROR_BYTES = 64 << 10
MOST_WHOLE_BYTES = 64 << 20
"""The largest object that is read whole for a part of it; packs are smaller."""
_NOT_SIGNED = {"accept-encoding": "identity", "user-agent": f"fastckpt/{__version__}"}  # proxies change these


class ChecksumError(StoreError):
    """The server refuses the header with the body's checksum, or requires one. Stays inside the store."""


class Requests:
    """Requests to one bucket, below one prefix. Any thread. Nothing is sent before the first one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.url = f"s3://{connection.bucket}" + (f"/{connection.prefix}" if connection.prefix else "")
        self.bucket_seen = False
        """Whether any answer has shown that the bucket exists."""
        self._http = shared_client(connection.server)
        self._closed = False

    def _path(self, name: str) -> str:
        """The quoted path. `name`: within the bucket."""
        connection = self._connection
        base = urlsplit(connection.endpoint).path.rstrip("/")
        bucket = "" if connection.virtual_host else f"/{connection.bucket}"
        return quoted_path(f"{base}{bucket}/{name}" if name or not bucket else f"{base}{bucket}")

    def name_of(self, key: str) -> str:
        return f"{self._connection.prefix}/{key}" if self._connection.prefix else key

    @contextmanager
    def ask(
        self,
        doing: str,
        key: str,
        method: str,
        *,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: memoryview | None = None,
        most_s: float | None = None,
        payload_sha256: str | None = None,
    ) -> Iterator[HttpResponse]:
        """Send one request and return its answer, if that is a success; else raise a subclass of StoreError. With `query` the request is
        for the bucket, else for the object `key`.

        most_s: longest time without progress, if that is to be shorter than the store's. payload_sha256: signed in
        place of what the settings say about a body.
        """
        if self._closed:
            raise StoreError(f"{self.url} is closed")
        connection = self._connection
        where = f"{self.url}/{key}" if key else self.url
        generation = connection.credentials.generation
        try:
            keys = connection.keys()
        except StoreError as error:
            raise type(error)(f"{doing} {where}: {error}") from error.__cause__
        path, asked = self._path("" if query else self.name_of(key)), quoted_query(query or {})
        sent = signed(
            method,
            path,
            asked,
            {"host": host_header(connection.endpoint), **self._common_headers(), **(headers or {})},
            payload_sha256 or self._payload(body),
            keys,
            connection.region,
            datetime.datetime.now(datetime.timezone.utc),
        )
        try:
            with self._http.request(
                method, f"{path}?{asked}" if asked else path, {**sent, **_NOT_SIGNED}, body, most_s=most_s
            ) as response:
                if 200 <= response.status < 300:
                    yield response
                    self.bucket_seen = True
                    return
                text = response.read(MOST_ERROR_BYTES)
        except HttpError as error:
            raise self._no_answer(error, doing, where) from harmless(error, connection.credentials.secrets)
        raise self._refused(read_answer(response.status, response.headers, text), doing, where, generation)

    def _common_headers(self) -> dict[str, str]:
        found = {}
        if self._connection.expected_bucket_owner:
            found["x-amz-expected-bucket-owner"] = self._connection.expected_bucket_owner
        if self._connection.request_payer:
            found["x-amz-request-payer"] = "requester"
        return found

    def _payload(self, body: memoryview | None) -> str:
        if body is None:
            return NO_PAYLOAD
        signs = self._connection.checksum == "sha256" or not self._connection.encrypted
        return hashlib.sha256(body).hexdigest() if signs and not self._connection.anonymous else UNSIGNED_PAYLOAD

    def _no_answer(self, error: HttpError, doing: str, where: str) -> StoreError:
        text = cut_secrets(f"{doing} {where}: {error}", self._connection.credentials.secrets)
        if error.untrusted:
            return StoreError(text)
        found = StoreUnavailableError(text)
        found.refused = error.never_sent
        return found

    def _refused(self, answer: Answer, doing: str, where: str, generation: int) -> StoreError:
        credentials = self._connection.credentials
        found = translate(answer, doing, where, credentials.secrets, self._connection.region, time.time())
        if isinstance(found, (ObjectExistsError, ObjectNotFoundError)) and answer.code:
            self.bucket_seen = True
        if refuses_checksum(answer) or wants_checksum(answer):
            return ChecksumError(str(found))
        if answer.code in CREDENTIAL_CODES and not self._connection.anonymous and credentials.renewed_since(generation):
            again = StoreUnavailableError(
                f"{found} The credentials have been replaced meanwhile: another try uses the new ones"
            )
            again.refused = True
            return again
        owner = self._connection.expected_bucket_owner
        if isinstance(found, StoreAccessError) and owner and answer.status == 403:
            return StoreAccessError(f"{found}, and whether the bucket belongs to account {owner} as you expect")
        return found

    def close(self) -> None:
        """Send nothing more. Requests in flight go on. The connections stay, for other stores of this process."""
        self._closed = True


def require_etag(response: HttpResponse, what: str) -> None:
    """StoreUnavailableError for an answer without an ETag: an error page sent with status 200; S3 never omits it."""
    if "etag" not in response.headers:
        raise StoreUnavailableError(
            f"{what}: the answer is not one of S3 (it has no ETag): a proxy or a login page may have spoken"
        )


def fill(response: HttpResponse, view: memoryview) -> None:
    """Fill the view with the body. HttpError if it has another length."""
    at = 0
    while at < view.nbytes:
        n = response.read_into(view[at:])
        if not n:
            raise HttpError(f"{at} bytes came: expected {view.nbytes}")
        at += n
    if response.read(1):
        raise HttpError(f"more bytes came than the {view.nbytes} announced")


def fill_from_whole(response: HttpResponse, offset: int, view: memoryview, what: str) -> None:
    """Fill the view, as far as the object reaches, from an answer that has the whole object though a range was asked for.

    StoreError for a large object: each read of a part of it would get all of it. HttpError.
    """
    size = response.n_bytes or 0
    if size > MOST_WHOLE_BYTES:
        raise StoreError(
            f"{what}: the server ignores ranges and sends all {size} bytes; more than {MOST_WHOLE_BYTES} are not read for a part. Copy the "
            "object to a disk, or use a server or proxy that knows Range"
        )
    scratch = memoryview(bytearray(min(max(offset, 1), 1 << 20)))
    left = min(offset, size)
    while left and (n := response.read_into(scratch[:left])):
        left -= n
    part, at = view[: max(0, size - offset)], 0
    while at < part.nbytes and (n := response.read_into(part[at:])):
        at += n
    if left or at < part.nbytes:
        raise HttpError(f"{what}: the answer ended early")
