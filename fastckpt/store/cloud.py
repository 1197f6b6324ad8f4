"""A store on S3, or on a server with its protocol. boto3 supplies account, endpoint and keys; the bytes go through `cloud_http.py`.

One method is one HTTP request (`list`: one per 1,000 objects), tried once: the only retries are those of `store/wrap.py`. Two exceptions: a
refused HEAD, whose answer has no body, is repeated as a GET, whose answer has a reason; and a PUT is sent once more, with an MD5, if the
server refuses the checksum header, or requires one. docs/stores.md describes what users should know; here are the reasons.

* **Checksums.** Over https each body goes with its CRC64NVME, which S3 verifies and keeps; the payload is not signed (SHA-256 costs
  0.77 s of CPU per GiB, CRC64NVME 0.10). Over plain http nothing else protects the body, and servers that ignore checksum headers
  (Ceph 16) do verify the signature: there the payload is signed. MD5, which every server knows, costs 1.5 s per GiB.
* **Times** are S3's own Last-Modified, in whole seconds.
* **Processes.** A forked process may go on with a store that its parent has used: it opens connections of its own.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastckpt.errors import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
    UnsupportedVerbError,
)
from fastckpt.events import logger
from fastckpt.kernels.checksums import crc64nvme
from fastckpt.store.base import ObjectInfo, Store, check_key, check_name, check_prefix
from fastckpt.store.body import known_crc64nvme
from fastckpt.store.cloud_connection import Connection, connect
from fastckpt.store.cloud_errors import BeyondEndError
from fastckpt.store.cloud_http import HttpResponse
from fastckpt.store.cloud_lifecycle import NotRulesError, harms, read_rules
from fastckpt.store.cloud_listing import NotAListingError, read_page
from fastckpt.store.cloud_requests import MOST_ERROR_BYTES, ChecksumError, Requests, fill, fill_from_whole, require_etag

MAX_PUT_BYTES = 5 << 30
"""S3's limit for one PUT."""
_PAGE = 1000  # S3's own limit
_MOST_PAGE_BYTES = 16 << 20
_MOST_RULES_BYTES = 2 << 20  # S3 takes 1,000 rules, some 500 bytes each
_ADVICE_S = 2.0  # without progress; nobody should wait longer for mere advice
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.ASCII)
_MOST_EMPTY_PAGES = 10_000
"""Limit of empty pages in a row. S3 sends empty pages where it skips deleted objects."""


class S3Store(Store):
    """Objects under one prefix of a bucket. Made by `open_s3`. Nothing is sent before the first call."""

    most_put_bytes = MAX_PUT_BYTES

    def __init__(self, connection: Connection, *, any_names: bool = False) -> None:
        self.connection = connection
        self._requests = Requests(connection)
        self.url = self._requests.url
        self._check: Callable[[str], str] = check_name if any_names else check_key
        self._checksum = connection.checksum
        self._bare_etags = False
        self._ranges_told = False
        self._strangers_told = False

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    def put(self, key: str, data: Any) -> None:
        self._put("put", key, data, {})

    def put_if_absent(self, key: str, data: Any) -> None:
        """As the contract says. ObjectExistsError is S3's status 412. Its 409, which a race of two writers can cause, is worth another
        try.
        """
        self._put("put_if_absent", key, data, {"if-none-match": "*"})

    def replace_if_match(self, key: str, data: Any, version: str) -> None:
        """As the contract says: a PUT with If-Match. RFC 9110 quotes the ETag; Ceph 16 answers 412 to that, and takes it without quotes.
        So after a 412 the object is looked at: if it has not changed, the other form is tried, and used from then on.
        """
        for bare in (self._bare_etags, not self._bare_etags):
            try:
                self._put("replace", key, data, {"if-match": version.strip('"') if bare else version})
            except ObjectExistsError:
                with self._requests.ask("head", key, "HEAD") as response:
                    now = response.headers.get("etag", "")
                if now != version:
                    raise ObjectChangedError(f"replace {self.url}/{key}: it is not the version that was read") from None
                continue
            except StoreError as error:
                if type(error) is not StoreError:
                    raise
                raise UnsupportedVerbError(f"{error}. The server may not take If-Match") from error
            self._bare_etags = bare
            return
        raise UnsupportedVerbError(
            f"replace {self.url}/{key}: the server says that the object has changed, and it has not: its If-Match cannot be used"
        )

    def _put(self, doing: str, key: str, data: Any, headers: dict[str, str]) -> None:
        self._check(key)
        view = memoryview(data)
        if view.nbytes > self.most_put_bytes:
            raise StoreError(
                f"{doing} {self.url}/{key}: {view.nbytes} bytes; one PUT carries at most {self.most_put_bytes}"
            )
        body = view.cast("B") if view.nbytes else memoryview(b"")  # an empty view cannot be cast
        if self.connection.sse:
            headers["x-amz-server-side-encryption"] = self.connection.sse
        if self.connection.sse_kms_key_id:
            headers["x-amz-server-side-encryption-aws-kms-key-id"] = self.connection.sse_kms_key_id
        known = known_crc64nvme(data)
        try:
            self._put_once(doing, key, body, headers, known)
        except ChecksumError as error:
            if self._checksum == "md5":
                raise StoreError(
                    f"{error}. The body went with Content-MD5; another checksum may be what it wants: open_store(…, checksum=)"
                ) from None
            logger.info("%s does not take this checksum (%s): from now on bodies go with Content-MD5", self.url, error)
            self._checksum = "md5"
            self._put_once(doing, key, body, headers)

    def _put_once(
        self, doing: str, key: str, body: memoryview, headers: Mapping[str, str], known: int | None = None
    ) -> None:
        """known: the body's crc64nvme; None: it is computed if it is sent."""
        checksum = _checksum_headers(self._checksum, body, known)
        with self._requests.ask(doing, key, "PUT", headers={**headers, **checksum}, body=body) as response:
            response.read(MOST_ERROR_BYTES)
            require_etag(response, f"{doing} {self.url}/{key}")

    def get(self, key: str) -> bytes:
        return self.get_version(key)[0]

    def get_version(self, key: str) -> tuple[bytes, str]:
        """As the contract says; the version is the ETag."""
        self._check(key)
        with self._requests.ask("get", key, "GET") as response:
            require_etag(response, f"get {self.url}/{key}")
            if response.n_bytes is None:
                raise StoreUnavailableError(f"get {self.url}/{key}: the answer does not say how long it is")
            out = bytearray(response.n_bytes)
            fill(response, memoryview(out))
            return bytes(out), response.headers["etag"]

    def get_into(self, key: str, offset: int, out: Any) -> None:
        """As the contract says. The bytes go directly from the connection into `out`."""
        self._check(key)
        view = memoryview(out)
        if not view.nbytes:
            self.head(key)  # a missing object is an error even if no byte of it is wanted; S3 has no range of 0 bytes
            return
        view = view.cast("B")
        end = offset + view.nbytes
        try:
            with self._requests.ask("get", key, "GET", headers={"range": f"bytes={offset}-{end - 1}"}) as response:
                require_etag(response, f"get {self.url}/{key}")
                if response.status == 200 and response.n_bytes is not None:
                    size = response.n_bytes
                    if not self._ranges_told:
                        self._ranges_told = True
                        logger.warning(
                            "%s: the server ignores ranges and sends whole objects: reading takes longer", self.url
                        )
                    fill_from_whole(response, offset, view, f"get {self.url}/{key}")
                else:
                    size = _fill_range(response, offset, view, f"get {self.url}/{key}")
        except BeyondEndError as error:
            raise EOFError(f"{self.url}/{key} ends at or before byte {offset}: expected {end} or more") from error
        if size < end:
            raise EOFError(f"{self.url}/{key} has {size} bytes: expected {end} or more")

    def head(self, key: str) -> ObjectInfo:
        self._check(key)
        try:
            with self._requests.ask("head", key, "HEAD") as response:
                return _info(f"{self.url}/{key}", key, response, response.n_bytes)
        except (StoreUnavailableError, ObjectExistsError):
            raise
        except StoreError as error:
            if isinstance(error, ObjectNotFoundError) and self._requests.bucket_seen:
                raise
            problem = error
        # The answer to a HEAD has no body: a missing bucket looks like a missing object, and a wrong key like an expired token or a wrong
        # clock. A GET tells the reason; or it is answered, and says what a HEAD would have. Refused HEADs are rare.
        with (
            contextlib.suppress(BeyondEndError),
            self._requests.ask("head", key, "GET", headers={"range": "bytes=0-0"}) as response,
        ):
            found = _RANGE.fullmatch(response.headers.get("content-range", ""))
            return _info(f"{self.url}/{key}", key, response, int(found[3]) if found else None)
        raise problem

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """As the contract says. Objects whose keys are not valid (`check_key`) are left out, because no method would accept them."""
        check_prefix(prefix)
        return self._listed(prefix)

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        base = f"{self.connection.prefix}/" if self.connection.prefix else ""
        query = {"list-type": "2", "max-keys": str(_PAGE), "encoding-type": "url"}
        if base + prefix:
            query["prefix"] = base + prefix
        last = ""
        tokens: set[str] = set()
        empty = 0
        while True:
            with self._requests.ask("list", prefix, "GET", query=query) as response:
                try:
                    page = read_page(response.read(_MOST_PAGE_BYTES))
                except NotAListingError as error:
                    raise StoreUnavailableError(
                        f"list {self.url}/{prefix}: the answer is not one of S3 ({error}): a proxy or a login page may have spoken"
                    ) from error
            for name, n_bytes, modified_s in page.objects:
                key = name.removeprefix(base)
                if not name.startswith(base + prefix) or not self._is_key(key):
                    continue
                if key <= last:
                    raise StoreError(
                        f"list {self.url}/{prefix}: {key!r} comes after {last!r}; stores that do not sort (S3 Express) are not supported"
                    )
                last = key
                yield ObjectInfo(key, n_bytes, modified_s)
            if page.next_token is None:
                return
            empty = 0 if page.objects else empty + 1
            if page.next_token in tokens or empty > _MOST_EMPTY_PAGES:
                how = (
                    "one leads back to an earlier one" if page.next_token in tokens else f"{empty} in a row were empty"
                )
                raise StoreUnavailableError(f"list {self.url}/{prefix}: the server's pages do not end: {how}")
            tokens.add(page.next_token)
            query["continuation-token"] = page.next_token

    def _is_key(self, text: str) -> bool:
        try:
            check_key(text)
        except StoreError:
            if not self._strangers_told and text:
                self._strangers_told = True
                logger.warning(
                    "%s: %r is no name that fastckpt gives: it and others like it are ignored", self.url, text
                )
            return False
        return True

    def delete(self, key: str) -> None:
        """As the contract says. In a versioned bucket this adds a delete marker; older versions stay, and cost money."""
        self._check(key)
        # Some servers answer 404 where S3 answers 204. For a missing bucket the error is another one.
        with contextlib.suppress(ObjectNotFoundError), self._requests.ask("delete", key, "DELETE") as response:
            if response.status != 204 and response.read(1):
                raise StoreUnavailableError(
                    f"delete {self.url}/{key}: the answer is not one of S3 (it has a body): a proxy or a login page may have spoken"
                )

    def harmful_rules(self) -> tuple[str, ...]:
        """As the contract says: lifecycle rules that delete by age under the prefix, or archive (s3:GetLifecycleConfiguration)."""
        doing = "look at the lifecycle rules of"
        try:
            with self._requests.ask(doing, "", "GET", query={"lifecycle": ""}, most_s=_ADVICE_S) as response:
                rules = read_rules(response.read(_MOST_RULES_BYTES))
        except (
            StoreError,
            NotRulesError,
        ) as error:  # not allowed, not known to the server, not set, too slow: advice only, so no error
            logger.debug("%s: lifecycle rules are not known: %s", self.url, error)
            return ()
        return tuple(harms(rules, self.connection.prefix))

    def close(self) -> None:
        self._requests.close()


def _info(where: str, key: str, response: HttpResponse, n_bytes: int | None) -> ObjectInfo:
    require_etag(response, f"head {where}")
    try:
        at = email.utils.parsedate_to_datetime(response.headers.get("last-modified", ""))
        if n_bytes is None:
            raise ValueError("it has no length")
        return ObjectInfo(key, n_bytes, float(int(at.timestamp())))
    except (ValueError, OverflowError) as error:
        raise StoreUnavailableError(f"head {where}: the answer is not one of S3 ({error})") from error


def _fill_range(response: HttpResponse, offset: int, view: memoryview, what: str) -> int:
    """Fill the view, as far as the object reaches, with a range of it; returns the object's size. StoreUnavailableError: another range."""
    end = offset + view.nbytes
    found = _RANGE.fullmatch(response.headers.get("content-range", ""))
    start, stop, size = (int(found[1]), int(found[2]) + 1, int(found[3])) if found else (0, 0, 0)
    if found is None or response.status != 206 or start != offset or stop != min(end, size):
        raise StoreUnavailableError(
            f"{what}: bytes {start} to {stop} of {size} came (HTTP {response.status}): expected {offset} to {end}"
        )
    fill(response, view[: stop - start])
    return size


def _checksum_headers(kind: str | None, body: memoryview, known: int | None) -> dict[str, str]:
    if kind == "crc64nvme":
        value = (crc64nvme(body) if known is None else known).to_bytes(8, "big")
        return {"x-amz-checksum-crc64nvme": base64.b64encode(value).decode()}
    if kind == "md5":
        value = hashlib.md5(body, usedforsecurity=False).digest()
        return {"content-md5": base64.b64encode(value).decode()}
    return {}


def open_s3(
    url: str,
    *,
    endpoint_url: str | None = None,
    session: Any = None,
    sse: str | None = None,
    sse_kms_key_id: str | None = None,
    expected_bucket_owner: str | None = None,
    anonymous: bool | None = None,
    request_payer: bool | None = None,
    checksum: str | None = None,
    connect_timeout_s: float = 4.0,
    stall_timeout_s: float = 20.0,
    slowest_bytes_per_s: int = 256 << 10,
    connections: int = 64,
    any_names: bool = False,
) -> S3Store:
    """The store at `s3://bucket/prefix`. Nothing is sent to S3 yet; missing credentials are a StoreAccessError.

    `session`: a boto3 (or botocore) session; by default a new one, with boto3's whole credential chain. It also gives the region, the
        endpoint (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, the profile's; `endpoint_url` goes first), the addressing style and the CA bundle.
    `sse`: "AES256" or "aws:kms" (then `sse_kms_key_id` may name the key); by default the bucket's setting.
    `expected_bucket_owner`: 12 digits; S3 refuses requests to a bucket of another AWS account.
    `anonymous`: requests without a signature, for public buckets. None: whether AWS_NO_SIGN_REQUEST is true.
    `request_payer`: the reader of a Requester Pays bucket agrees to pay. None: whether AWS_REQUEST_PAYER is "requester".
    `checksum`: of each body, "crc64nvme" or "md5"; "sha256": no header, the payload is signed instead, over https too. None: over https
        crc64nvme, or md5 if AWS_REQUEST_CHECKSUM_CALCULATION (or the profile's request_checksum_calculation) is when_required; over http no
        header, because the payload is signed.
    `stall_timeout_s`: a request without progress for so long ends with StoreUnavailableError; a PUT gets its size /
        `slowest_bytes_per_s` in addition.
    `connections`: number of connections kept open between requests. The number of simultaneous requests is not limited.
    `any_names`: allow all names that `check_name` allows, for single objects; a repository does not need this.
    """
    return S3Store(
        connect(
            url,
            endpoint_url=endpoint_url,
            session=session,
            sse=sse,
            sse_kms_key_id=sse_kms_key_id,
            expected_bucket_owner=expected_bucket_owner,
            anonymous=anonymous,
            request_payer=request_payer,
            checksum=checksum,
            connect_timeout_s=connect_timeout_s,
            stall_timeout_s=stall_timeout_s,
            slowest_bytes_per_s=slowest_bytes_per_s,
            connections=connections,
        ),
        any_names=any_names,
    )
