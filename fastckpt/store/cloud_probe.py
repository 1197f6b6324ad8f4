"""Asks a server of S3 what the verbs of a store do not show: what becomes of a wrong checksum, of a range, and of a page.

Each question is one request, tried once.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace

from fastckpt.errors import StoreError, StoreUnavailableError
from fastckpt.kernels.checksums import crc64nvme
from fastckpt.store.cloud import S3Store
from fastckpt.store.cloud_errors import BeyondEndError
from fastckpt.store.cloud_listing import NotAListingError, read_page
from fastckpt.store.cloud_requests import ChecksumError, Requests
from fastckpt.store.findings import Checksum, Listing, Ranges, StoreFindings
from fastckpt.store.probe import cleaned, new_place

_BODY = b"the bytes that are sent"
_OTHER = b"the bytes that were meant"
_MOST_PAGE_BYTES = 1 << 20


def look_at_server(store: S3Store, found: StoreFindings) -> StoreFindings:
    """The findings with what a server of S3 was found to do. StoreError."""
    requests = Requests(store.connection)
    place = new_place()
    keys = [f"{place}{name}" for name in ("a", "b", "c", "d", "e")]
    with cleaned(store, keys):
        checksums = {name: _checksum(store, requests, keys[0], name) for name in ("crc64nvme", "md5", "sha256")}
        for key in keys:
            store.put(key, _BODY)
        ranges = found.ranges if _is_part(requests, keys[0]) or found.ranges is Ranges.WRONG else Ranges.IGNORED
        paged = Listing.YES if _pages(requests, place) == keys else Listing.NO
    # Over http without a header the payload is signed.
    signed = None if store.connection.anonymous else "sha256"
    used = store.connection.checksum or signed
    return replace(found, ranges=ranges, paged=paged, checksums=checksums, checksum_in_use=used)


def _checksum(store: S3Store, requests: Requests, key: str, name: str) -> Checksum:
    """What becomes of a body that differs from its checksum."""
    headers, payload = {}, None
    if name == "crc64nvme":
        headers["x-amz-checksum-crc64nvme"] = base64.b64encode(crc64nvme(_OTHER).to_bytes(8, "big")).decode()
    elif name == "md5":
        headers["content-md5"] = base64.b64encode(hashlib.md5(_OTHER, usedforsecurity=False).digest()).decode()
    elif store.connection.anonymous:
        return Checksum.UNKNOWN
    else:
        payload = hashlib.sha256(_OTHER).hexdigest()
    try:
        with requests.ask(
            "put", key, "PUT", headers=headers, body=memoryview(_BODY), payload_sha256=payload
        ) as response:
            response.read(_MOST_PAGE_BYTES)
    except ChecksumError:
        return Checksum.REFUSED
    except StoreUnavailableError as error:
        return Checksum.VERIFIED if error.refused else Checksum.UNKNOWN
    except StoreError:
        return Checksum.UNKNOWN
    return Checksum.IGNORED


def _is_part(requests: Requests, key: str) -> bool:
    try:
        with requests.ask("get", key, "GET", headers={"range": "bytes=1-2"}) as response:
            return response.status == 206 and response.n_bytes == 2
    except BeyondEndError:
        return False


def _pages(requests: Requests, place: str) -> list[str]:
    """The keys below a place, listed two by two."""
    prefix, names = requests.name_of(place), []
    query = {"list-type": "2", "max-keys": "2", "encoding-type": "url", "prefix": prefix}
    for _ in range(10):
        with requests.ask("list", place, "GET", query=query) as response:
            try:
                page = read_page(response.read(_MOST_PAGE_BYTES))
            except NotAListingError:
                return []
        names += [place + name.removeprefix(prefix) for name, _, _ in page.objects]
        if page.next_token is None:
            break
        query["continuation-token"] = page.next_token
    return names
