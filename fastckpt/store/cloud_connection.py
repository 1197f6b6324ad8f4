"""Endpoint and settings of an S3 store: interprets `s3://bucket/prefix` and boto3's configuration."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from fastckpt.errors import StoreError
from fastckpt.events import logger
from fastckpt.store.base import check_name
from fastckpt.store.cloud_account import DEFAULT_REGION, Account, account, botocore_client
from fastckpt.store.cloud_credentials import SessionCredentials
from fastckpt.store.cloud_proxy import proxy_of
from fastckpt.store.cloud_signature import Keys
from fastckpt.store.cloud_socket import Server, check_bundle

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_IN_A_HOST = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
"""Bucket names that can be part of a host name. Names with dots could be, too, but no wildcard certificate covers them."""
_REGION = re.compile(r"[A-Za-z0-9-]+")
_AWS_HOST = re.compile(r"(^|\.)s3[.-]([a-z0-9.-]*\.)?amazonaws\.com(\.cn)?$")
_KMS_KEY = re.compile(r"[!-~]+")
_OWNER = re.compile(r"[0-9]{12}")


@dataclass(frozen=True, slots=True)
class Connection:
    """Everything that requests need to know, decided once. Its 14 attributes are options, as in `open_s3`."""

    bucket: str
    prefix: str
    """"" or segments without a / at either end."""
    server: Server
    """Its endpoint contains the bucket's name if `virtual_host`."""
    region: str
    virtual_host: bool
    credentials: SessionCredentials
    session: Any = field(repr=False)
    """botocore's session."""
    service_url: str
    """The endpoint without the bucket's name."""
    sse: str | None = None
    sse_kms_key_id: str | None = None
    expected_bucket_owner: str | None = None
    anonymous: bool = False
    request_payer: bool = False
    checksum: str | None = None
    """What protects a body: the header "crc64nvme" or "md5"; "sha256", its signature, over https too; or None."""

    @property
    def endpoint(self) -> str:
        """The URL of requests: http:// or https://, host, optionally a port and a path."""
        return self.server.endpoint

    @property
    def encrypted(self) -> bool:
        """Whether the endpoint uses https."""
        return self.endpoint.startswith("https://")

    @property
    def is_aws(self) -> bool:
        """Whether the endpoint is one of Amazon's own."""
        return _AWS_HOST.search(urlsplit(self.service_url).hostname or "") is not None

    def boto3_client(self) -> Any:
        """A new botocore client for the same place with the same credentials: for questions about the bucket."""
        frozen = self.credentials.frozen()
        return botocore_client(
            self.session,
            timeout_s=self.server.connect_timeout_s,
            style="virtual" if self.virtual_host else "path",
            region_name=self.region,
            endpoint_url=self.service_url,
            aws_access_key_id=frozen.access_key,
            aws_secret_access_key=frozen.secret_key,
            aws_session_token=frozen.token,
        )

    def keys(self) -> Keys | None:
        """The keys to sign with now; None: requests are not signed. StoreAccessError, StoreUnavailableError."""
        if self.anonymous:
            return None
        frozen = self.credentials.frozen()
        return Keys(frozen.access_key, frozen.secret_key, frozen.token)


def parse_s3_url(url: str) -> tuple[str, str]:
    """Bucket and prefix (no / at either end) of `s3://bucket/prefix`. StoreError."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    if scheme != "s3" or not _BUCKET.fullmatch(bucket):
        raise StoreError(
            f"{url!r} is no S3 location: expected s3://bucket/prefix, the bucket of 3 to 255 letters, digits "
            "and . - _ (for an access point take its alias)"
        )
    if prefix:
        try:
            check_name(prefix)
        except StoreError as error:
            raise StoreError(f"{url!r} is no S3 location: {error}") from None
    return bucket, prefix


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if _is_address(host):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def connect(
    url: str,
    *,
    endpoint_url: str | None = None,
    session: Any = None,
    anonymous: bool | None = None,
    request_payer: bool | None = None,
    checksum: str | None = None,
    connect_timeout_s: float = 4.0,
    stall_timeout_s: float = 20.0,
    slowest_bytes_per_s: int = 256 << 10,
    connections: int = 64,
    **options: Any,
) -> Connection:
    """The Connection for the arguments of `open_s3`. Nothing is sent to S3; missing credentials are a StoreAccessError here."""
    bucket, prefix = parse_s3_url(url)
    _check_options(checksum=checksum, **options)
    _check_numbers(
        connect_timeout_s=connect_timeout_s,
        stall_timeout_s=stall_timeout_s,
        slowest_bytes_per_s=slowest_bytes_per_s,
        connections=connections,
    )
    if anonymous is None:
        anonymous = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")
    if request_payer is None:
        request_payer = os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester"
    who = account(session, endpoint_url, connect_timeout_s, anonymous=anonymous)
    _check_account(who)
    endpoint, virtual_host = _address(who, bucket)
    encrypted = endpoint.startswith("https://")
    host = urlsplit(endpoint).hostname or ""
    if not encrypted and not _is_loopback(host):
        logger.warning(
            "%s is reached without encryption: whoever is on the way to %s can read the checkpoints", url, host
        )
    if checksum is None and (encrypted or anonymous):
        # Over http the payload is signed instead: servers without checksum headers verify that.
        checksum = "crc64nvme" if who.checksums == "when_supported" else "md5"
    return Connection(
        bucket=bucket,
        prefix=prefix,
        server=Server(
            endpoint, who.ca_bundle, connect_timeout_s, stall_timeout_s, slowest_bytes_per_s, int(connections)
        ),
        region=who.region,
        virtual_host=virtual_host,
        credentials=who.credentials,
        session=who.session,
        service_url=who.endpoint,
        anonymous=anonymous,
        request_payer=request_payer,
        checksum=checksum,
        **options,
    )


def _check_account(who: Account) -> None:
    """StoreError for an account with which no request can be made."""
    try:
        parts = urlsplit(who.endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        good = good and re.search(r"[^!-~]", who.endpoint) is None
    except ValueError:  # a port that is not a number, or half an IPv6 address
        good = False
    if not good:
        raise StoreError(
            f"the endpoint is {who.endpoint!r}: expected http:// or https://, a host and perhaps a port, without white space"
        )
    if not _REGION.fullmatch(who.region):
        raise StoreError(f"the region is {who.region!r}: expected a name such as us-east-1, without white space")
    proxy_of(who.endpoint)
    if who.ca_bundle is not None:
        try:
            check_bundle(who.ca_bundle)
        except (ssl.SSLError, ValueError) as error:
            raise StoreError(
                f"the CA bundle (AWS_CA_BUNDLE, or the profile's ca_bundle) cannot be used: {error}"
            ) from error


def _check_options(
    *, checksum: Any, sse: Any = None, sse_kms_key_id: Any = None, expected_bucket_owner: Any = None
) -> None:
    if checksum not in (None, "crc64nvme", "md5", "sha256"):
        raise StoreError(f'checksum is {checksum!r}: expected None, "crc64nvme", "md5" or "sha256"')
    if sse not in (None, "AES256", "aws:kms"):
        raise StoreError(f'sse is {sse!r}: expected None, "AES256" or "aws:kms"')
    if sse_kms_key_id is not None and sse != "aws:kms":
        raise StoreError('sse_kms_key_id is for sse="aws:kms"')
    if sse_kms_key_id is not None and not _KMS_KEY.fullmatch(sse_kms_key_id):
        raise StoreError(f"sse_kms_key_id is {sse_kms_key_id!r}: expected a key's id or ARN, without white space")
    if expected_bucket_owner is not None and not _OWNER.fullmatch(expected_bucket_owner):
        raise StoreError(
            f"expected_bucket_owner is {expected_bucket_owner!r}: expected the 12 digits of an AWS account"
        )


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise StoreError(f"{name} is {value!r}: expected more than 0")


def _address(who: Account, bucket: str) -> tuple[str, bool]:
    """Endpoint, and whether the bucket's name is in its host.

    AWS needs the bucket's name in the host. Other servers get it in the path, because a private server rarely has a wildcard in DNS and in
    its certificate. Names that a host cannot have, or with dots (no wildcard certificate covers them), are always in the path. The
    profile's `s3 = addressing_style` overrides the rule for servers; as with boto3, it does not override the rule for names.
    """
    parts = urlsplit(who.endpoint)
    if (
        parts.netloc == "s3.amazonaws.com"
    ):  # botocore returns the old global endpoint, but sends requests to the regional one
        parts = parts._replace(netloc=f"s3.{DEFAULT_REGION}.amazonaws.com")
    host = parts.hostname or ""
    if who.addressing_style in ("virtual", "path"):
        virtual = who.addressing_style == "virtual"
    else:
        virtual = bool(_AWS_HOST.search(host)) and ".vpce." not in host
    virtual = virtual and _IN_A_HOST.fullmatch(bucket) is not None and not _is_address(host)
    if virtual:
        parts = parts._replace(netloc=f"{bucket}.{parts.netloc}")
    return urlunsplit(parts).rstrip("/"), virtual
