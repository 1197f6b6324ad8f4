"""S3 and what speaks its protocol. Bytes move through obstore (Rust: no GIL, no copy); boto3 says who we are, where, and with which key.

One method is one HTTP request (`list`: one per 1,000 objects), tried once: the only retries are those of `store/wrap.py`. docs/stores.md
has what users should know; here is why it is so.

* **Checksums.** Over https each body goes with its CRC64NVME, which S3 verifies and keeps; the payload is not signed (SHA-256 costs
  0.77 s of CPU per GiB, CRC64NVME 0.10). Over plain http nothing else protects the body, and servers that ignore checksum headers
  (Ceph 16) do verify the signature: there the payload is signed.
* **Time-outs.** obstore's read_timeout starts with the request, runs until the answer's head, and starts again with every piece of
  the answer's body. So for reads it measures progress, but a PUT's answer comes only after its whole body was sent. A PUT therefore
  has `stall_timeout_s` plus its size / `slowest_bytes_per_s`. obstore fixes time-outs per client: there is one client per power of two
  of the size.
* **Times** are S3's own Last-Modified, in whole seconds.
* **Processes.** obstore's threads do not survive a fork: open the store in the process that uses it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from fastckpt.errors import ObjectExistsError, ObjectNotFoundError, StoreAccessError, StoreError, StoreUnavailableError
from fastckpt.store.base import ObjectInfo, Store, check_key, check_prefix
from fastckpt.store.cloud_connection import Connection, connect
from fastckpt.store.cloud_credentials import is_ours
from fastckpt.store.cloud_errors import CREDENTIAL_CODES, BeyondEndError, harmless, read_answer, translate

T = TypeVar("T")

MAX_PUT_BYTES = 5 << 30
"""S3's limit for one PUT."""
_SMALL_PUT_BYTES = 64 << 10  # the smallest class of PUT sizes: commit records and votes share its client
_STREAM_BYTES = 1 << 20  # pieces of a GET handed to Python: 0.70 s of CPU per GiB; whole 16 MiB ranges took 1.0
_PAGE = 1000  # S3's own limit


class S3Store(Store):
    """Objects under one prefix of a bucket. Made by `open_s3`. Nothing is sent before the first call."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.url = f"s3://{connection.bucket}" + (f"/{connection.prefix}" if connection.prefix else "")
        self._clients: dict[tuple[float, bool], Any] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._bucket_seen = False
        self._owner_seen = connection.expected_bucket_owner is None

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    def _client(self, n_bytes: int = 0, *, owner_header: bool = True) -> Any:
        """The client for a request with a body of `n_bytes`."""
        connection = self.connection
        timeout_s = connection.stall_timeout_s
        if n_bytes > 0:
            size = max(_SMALL_PUT_BYTES, 1 << (n_bytes - 1).bit_length())
            timeout_s += size / connection.slowest_bytes_per_s
        key = (timeout_s, owner_header)
        with self._lock:
            if self._closed:
                raise StoreError(f"{self.url} is closed")
            client = self._clients.get(key)
            if client is None:
                client = self._clients[key] = connection.client(timeout_s, owner_header=owner_header)
        return client

    def _call(self, doing: str, key: str, work: Callable[[], T]) -> T:
        """`work()`, its exceptions translated. `key` is for messages."""
        generation = self.connection.credentials.generation
        try:
            result = work()
        except (StoreError, EOFError):
            raise
        except Exception as error:  # obstore's, OSError's and ValueError's kinds: all mean that the request failed
            problem = error
        else:
            self._bucket_seen = True
            return result
        # Raised out here so that obstore's exception, which may hold a session token, is not kept as the context.
        raise self._explain(problem, doing, key, generation) from harmless(problem, self.connection.credentials.secrets)

    def _explain(self, problem: Exception, doing: str, key: str, generation: int) -> StoreError:
        credentials = self.connection.credentials
        where = f"{self.url}/{key}" if key else self.url
        if is_ours(problem):
            failure = credentials.failure
            return type(failure)(f"{doing} {where}: {failure}")
        answer = read_answer(problem)
        if answer.elsewhere and not answer.region:
            answer = replace(answer, region=self.connection.ask_region())
        found = translate(problem, answer, doing, where, credentials.secrets, self.connection.region)
        if isinstance(found, (ObjectExistsError, ObjectNotFoundError)) and answer.code:
            self._bucket_seen = True
        if answer.code in CREDENTIAL_CODES and credentials.renewed_since(generation):
            again = StoreUnavailableError(
                f"{found} The credentials have been replaced meanwhile: another try uses the new ones"
            )
            again.refused = True
            return again
        owner = self.connection.expected_bucket_owner
        if isinstance(found, StoreAccessError) and owner and answer.status == 403:
            return StoreAccessError(f"{found}, and whether the bucket belongs to account {owner} as you expect")
        return found

    def put(self, key: str, data: Any) -> None:
        self._put("put", key, data, "overwrite")

    def put_if_absent(self, key: str, data: Any) -> None:
        """As the contract says. ObjectExistsError is S3's 412; its 409, which a race of two writers can cause, is worth another try."""
        self._put("put_if_absent", key, data, "create")

    def _put(self, doing: str, key: str, data: Any, mode: Any) -> None:
        import obstore

        check_key(key)
        view = memoryview(data)
        if view.nbytes > MAX_PUT_BYTES:
            raise StoreError(f"{doing} {self.url}/{key}: {view.nbytes} bytes; one PUT carries at most {MAX_PUT_BYTES}")
        body: Any = view.cast("B") if view.nbytes else b""  # a view of nothing cannot be cast
        client = self._client(view.nbytes)
        self._call(doing, key, lambda: obstore.put(client, key, body, mode=mode, use_multipart=False))

    def get(self, key: str) -> bytes:
        import obstore

        check_key(key)
        client = self._client()

        def work() -> bytes:
            answer = obstore.get(client, key)
            self._check_etag("get", key, answer.meta)
            data = answer.bytes().to_bytes()
            self._check_length("get", key, len(data), answer.meta["size"])
            return data

        return self._call("get", key, work)

    def _check_etag(self, doing: str, key: str, found: Any) -> None:
        if found["e_tag"] is None:  # an error page sent with status 200; S3 never omits it
            raise StoreUnavailableError(f"{doing} {self.url}/{key}: the answer is not one of S3 (it has no ETag)")

    def _check_length(self, doing: str, key: str, found: int, expected: int) -> None:
        if found != expected:
            raise StoreUnavailableError(f"{doing} {self.url}/{key}: {found} bytes came: expected {expected}")

    def get_into(self, key: str, offset: int, out: Any) -> None:
        """As the contract says. The bytes are copied once, in pieces of 1 MiB, as they come."""
        import obstore

        check_key(key)
        view = memoryview(out)
        if not view.nbytes:
            self.head(key)  # absent is absent even when nothing is wanted of it; S3 has no range of 0 bytes
            return
        view = view.cast("B")
        client = self._client()
        end = offset + view.nbytes

        def work() -> None:
            answer = obstore.get(client, key, options={"range": (offset, end)})
            size = answer.meta["size"]
            start, stop = answer.range
            if start != offset or stop != min(end, size):
                raise StoreUnavailableError(
                    f"get {self.url}/{key}: bytes {start} to {stop} came: expected {offset} to {min(end, size)}"
                )
            at = 0
            for piece in answer.stream(min_chunk_size=_STREAM_BYTES):
                part = memoryview(piece)
                if at + part.nbytes > stop - start:
                    raise StoreUnavailableError(
                        f"get {self.url}/{key}: more bytes came than the {stop - start} announced"
                    )
                view[at : at + part.nbytes] = part
                at += part.nbytes
            self._check_length("get", key, at, stop - start)
            if size < end:
                raise EOFError(f"{self.url}/{key} has {size} bytes: expected {end} or more")

        try:
            self._call("get", key, work)
        except BeyondEndError as error:
            raise EOFError(f"{self.url}/{key} ends at or before byte {offset}: expected {end} or more") from error

    def head(self, key: str) -> ObjectInfo:
        import obstore

        check_key(key)
        client = self._client()
        try:
            found = self._call("head", key, lambda: obstore.head(client, key))
        except ObjectNotFoundError:
            if self._bucket_seen:
                raise
            # The answer to a HEAD has no body, so a missing bucket looks like a missing object. Asked once, not at every HEAD.
            self._call("head", key, lambda: obstore.get(client, key))
            raise
        self._check_etag("head", key, found)
        return _info(key, found)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the contract says. Objects whose key is none of ours (`check_key`) are left out: no method could be given it."""
        import obstore

        check_prefix(prefix)
        self._check_owner()
        # obstore does not sign default headers of this one request, and S3 refuses unsigned ones.
        client = self._client(owner_header=False)
        pages = obstore.list(client, prefix[:-1] or None, chunk_size=_PAGE)
        return self._listed(prefix, iter(pages))

    def _listed(self, prefix: str, pages: Iterator[Any]) -> Iterator[ObjectInfo]:
        last = ""
        while True:
            page = self._call("list", prefix, lambda: next(pages, None))
            if page is None:
                return
            for found in page:
                key = found["path"]
                if not key.startswith(prefix) or not _is_key(key):
                    continue
                if key <= last:
                    raise StoreError(
                        f"list {self.url}/{prefix}: {key!r} comes after {last!r}; stores that do not sort (S3 Express) are not supported"
                    )
                last = key
                yield _info(key, found)

    def _check_owner(self) -> None:
        """Before the first `list`, whose requests cannot say whose bucket is expected: one that can."""
        if not self._owner_seen:
            with contextlib.suppress(ObjectNotFoundError):
                self.head("fastckpt.json")
            self._owner_seen = True

    def delete(self, key: str) -> None:
        """As the contract says. In a versioned bucket this adds a delete marker; older versions stay, and cost."""
        import obstore

        check_key(key)
        client = self._client()
        # Some servers answer 404 where S3 answers 204. A missing bucket is another error.
        with contextlib.suppress(ObjectNotFoundError):
            self._call("delete", key, lambda: obstore.delete(client, key))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._clients.clear()


def _is_key(text: str) -> bool:
    try:
        check_key(text)
    except StoreError:
        return False
    return True


def _info(key: str, found: Any) -> ObjectInfo:
    # HEAD has whole seconds; some servers' LIST has fractions. One object has one time.
    return ObjectInfo(key, found["size"], float(int(found["last_modified"].timestamp())))


def open_s3(
    url: str,
    *,
    endpoint_url: str | None = None,
    session: Any = None,
    sse: str | None = None,
    sse_kms_key_id: str | None = None,
    expected_bucket_owner: str | None = None,
    connect_timeout_s: float = 5.0,
    stall_timeout_s: float = 20.0,
    slowest_bytes_per_s: int = 256 << 10,
    connections: int = 16,
) -> S3Store:
    """The store at `s3://bucket/prefix`. Nothing is sent to S3 yet; missing credentials are a StoreAccessError.

    `session`: a boto3 (or botocore) session; by default a new one, with boto3's whole chain. It also gives the region, the endpoint
        (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, the profile's; `endpoint_url` goes first), the addressing style and the CA bundle.
    `sse`: "AES256" or "aws:kms" (then `sse_kms_key_id` may name the key); by default what the bucket is set to.
    `expected_bucket_owner`: 12 digits; requests to a bucket of another AWS account are refused by S3.
    `stall_timeout_s`: a request without progress ends with StoreUnavailableError; a PUT may take its size / `slowest_bytes_per_s` longer.
    `connections`: how many stay open between requests. Requests are as many as there are callers.
    """
    return S3Store(
        connect(
            url,
            endpoint_url=endpoint_url,
            session=session,
            sse=sse,
            sse_kms_key_id=sse_kms_key_id,
            expected_bucket_owner=expected_bucket_owner,
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
            slowest_bytes_per_s=slowest_bytes_per_s,
            connections=connections,
        )
    )
