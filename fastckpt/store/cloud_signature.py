"""Signature version 4 of a request to S3."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field

UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
NO_PAYLOAD = hashlib.sha256().hexdigest()


@dataclass(frozen=True, slots=True)
class Keys:
    """The present credentials."""

    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(repr=False, default=None)


def quoted_path(path: str) -> str:
    """The path, quoted as S3 needs it in the request and in the signature."""
    return urllib.parse.quote(path, safe="/-_.~")


def quoted_query(query: Mapping[str, str]) -> str:
    """The query, sorted and quoted."""
    pairs = sorted((urllib.parse.quote(k, safe="-_.~"), urllib.parse.quote(v, safe="-_.~")) for k, v in query.items())
    return "&".join(f"{name}={value}" for name, value in pairs)


def signed(
    method: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    payload: str,
    keys: Keys | None,
    region: str,
    now: datetime.datetime,
) -> dict[str, str]:
    """The headers, including those of the signature. Pure.

    path, query: quoted. headers: names in lower case, `host` among them; all get signed. payload: hex SHA-256 of the body, or
    UNSIGNED_PAYLOAD. keys: None for anonymous requests, which have no signature. now: UTC.
    """
    if keys is None:
        return dict(headers)
    at = now.strftime("%Y%m%dT%H%M%SZ")
    found = {**headers, "x-amz-date": at, "x-amz-content-sha256": payload}
    if keys.token:
        found["x-amz-security-token"] = keys.token
    names = ";".join(sorted(found))
    lines = "".join(f"{name}:{' '.join(found[name].split())}\n" for name in sorted(found))
    request = "\n".join([method, path, query, lines, names, payload])
    scope = f"{at[:8]}/{region}/s3/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", at, scope, hashlib.sha256(request.encode()).hexdigest()])
    key = f"AWS4{keys.secret_key}".encode()
    for part in (at[:8], region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    found["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={keys.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return found
