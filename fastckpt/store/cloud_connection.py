"""Where an S3 store is and how it is spoken to: from `s3://bucket/prefix` and boto3's configuration to obstore's."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from fastckpt.errors import StoreError
from fastckpt.store.cloud_account import DEFAULT_REGION, Account, account, botocore_client
from fastckpt.store.cloud_credentials import SessionCredentials, no_debug_logs
from fastckpt.store.cloud_errors import harmless

logger = logging.getLogger("fastckpt")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# What S3 calls safe in a key, and what obstore was seen to send as it is.
_PREFIX_SEGMENT = re.compile(r"[A-Za-z0-9!\-_.'()=+@,:&$; ]+")
_AWS_HOST = re.compile(r"(^|\.)s3[.-]([a-z0-9.-]*\.)?amazonaws\.com(\.cn)?$")
_OWNER = re.compile(r"[0-9]{12}")
_NEVER = datetime.timedelta(days=1)  # obstore's time-out for a whole request; 0 would end it at once
# Shorter than what servers grant an idle connection, so that a request rarely meets one that is just being closed.
_IDLE = datetime.timedelta(seconds=15)


@dataclass(frozen=True, slots=True)
class Connection:
    """Everything that obstore needs to know, decided once. Options as in `open_s3`."""

    bucket: str
    prefix: str
    """"" or segments without a / at either end."""
    endpoint: str
    """With the bucket's name in it if `virtual_host`."""
    region: str
    virtual_host: bool
    credentials: SessionCredentials
    session: Any = field(repr=False)
    """botocore's."""
    service_url: str
    """The endpoint without the bucket's name."""
    sse: str | None = None
    sse_kms_key_id: str | None = None
    expected_bucket_owner: str | None = None
    connect_timeout_s: float = 5.0
    stall_timeout_s: float = 20.0
    slowest_bytes_per_s: int = 256 << 10
    connections: int = 16
    ca_bundle: bytes | None = field(default=None, repr=False)

    @property
    def encrypted(self) -> bool:
        """https?"""
        return self.endpoint.startswith("https://")

    @property
    def is_aws(self) -> bool:
        """One of Amazon's own endpoints?"""
        return _AWS_HOST.search(urlsplit(self.service_url).hostname or "") is not None

    def boto3_client(self) -> Any:
        """A new botocore client that speaks to the same place with the same credentials: for questions about the bucket."""
        frozen = self.credentials.frozen()
        return botocore_client(
            self.session,
            timeout_s=self.connect_timeout_s,
            style="virtual" if self.virtual_host else "path",
            region_name=self.region,
            endpoint_url=self.service_url,
            aws_access_key_id=frozen.access_key,
            aws_secret_access_key=frozen.secret_key,
            aws_session_token=frozen.token,
        )

    def ask_region(self) -> str:
        """Where the bucket is, if the server tells; "" otherwise. One request. obstore does not show the header that says it."""
        with no_debug_logs():
            try:
                client = self.boto3_client()
                answer = client.head_bucket(Bucket=self.bucket)
            except Exception as error:  # this only makes a message better
                answer = getattr(error, "response", {})
        return str(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region", ""))

    def client(self, timeout_s: float, *, owner_header: bool = True) -> Any:
        """A new obstore S3Store, whose requests end after `timeout_s` without progress. Takes 5 ms."""
        from obstore.store import S3Store as ObstoreS3

        # Whatever is not said here obstore takes from variables such as AWS_SKIP_SIGNATURE, which boto3 does not know.
        config: dict[str, Any] = {
            "endpoint": self.endpoint,
            "aws_endpoint_url_s3": self.endpoint,  # else the variable of that name goes before `endpoint`
            "region": self.region,
            "virtual_hosted_style_request": self.virtual_host,
            "unsigned_payload": self.encrypted,
            "skip_signature": False,
            "conditional_put": "etag",
            "s3_express": False,
            "request_payer": False,
            # The bulk call answers 200 with errors inside and asks for a checksum that some servers do not know.
            "disable_bulk_delete": True,
        }
        if self.encrypted:
            config["checksum_algorithm"] = "crc64nvme"
        if self.sse:
            config["server_side_encryption"] = self.sse
        if self.sse_kms_key_id:
            config["sse_kms_key_id"] = self.sse_kms_key_id
        options: dict[str, Any] = {
            "allow_http": not self.encrypted,
            "allow_invalid_certificates": False,
            "connect_timeout": datetime.timedelta(seconds=self.connect_timeout_s),
            "read_timeout": datetime.timedelta(seconds=timeout_s),
            "timeout": _NEVER,
            "pool_idle_timeout": _IDLE,
            "pool_max_idle_per_host": str(self.connections),
        }
        if self.ca_bundle:
            options["root_certificate"] = self.ca_bundle
        if self.expected_bucket_owner and owner_header:
            options["default_headers"] = {"x-amz-expected-bucket-owner": self.expected_bucket_owner}
        try:
            return ObstoreS3(
                self.bucket,
                prefix=self.prefix or None,
                config=config,  # type: ignore[arg-type] # built piece by piece
                client_options=options,  # type: ignore[arg-type]
                retry_config={"max_retries": 0},
                credential_provider=self.credentials,
            )
        except Exception as error:  # a certificate that is none; settings that obstore before 0.11 does not know
            problem = error
        words = str(problem).partition("\n\n")[0]
        raise StoreError(f"obstore does not take its settings (0.11 or newer is needed): {words}") from harmless(
            problem, ()
        )


def parse_s3_url(url: str) -> tuple[str, str]:
    """Bucket and prefix (no / at either end) of `s3://bucket/prefix`. StoreError."""
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.removesuffix("/")
    if scheme != "s3" or not _BUCKET.fullmatch(bucket):
        raise StoreError(f"{url!r} is no S3 location: expected s3://bucket/prefix, the bucket in lower case")
    for segment in prefix.split("/") if prefix else ():
        if segment in (".", "..") or not _PREFIX_SEGMENT.fullmatch(segment):
            raise StoreError(
                f"{url!r}: {segment!r} cannot be part of the prefix: expected A–Z a–z 0–9 ! - _ . ' ( ) = + @ , : & $ ; or spaces, "
                "and neither . nor .."
            )
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


def connect(url: str, *, endpoint_url: str | None = None, session: Any = None, **options: Any) -> Connection:
    """The Connection for the arguments of `open_s3`. Nothing is sent to S3; missing credentials are a StoreAccessError here."""
    bucket, prefix = parse_s3_url(url)
    _check_options(**options)
    who = account(session, endpoint_url, options["connect_timeout_s"])
    endpoint, virtual_host = _address(who, bucket)
    host = urlsplit(endpoint).hostname or ""
    if endpoint.startswith("http://") and not _is_loopback(host):
        logger.warning(
            "%s is reached without encryption: whoever is on the way to %s can read the checkpoints", url, host
        )
    return Connection(
        bucket=bucket,
        prefix=prefix,
        endpoint=endpoint,
        region=who.region,
        virtual_host=virtual_host,
        credentials=who.credentials,
        session=who.session,
        service_url=who.endpoint,
        ca_bundle=who.ca_bundle,
        **options,
    )


def _check_options(*, sse: Any, sse_kms_key_id: Any, expected_bucket_owner: Any, **numbers: float) -> None:
    if sse not in (None, "AES256", "aws:kms"):
        raise StoreError(f'sse is {sse!r}: expected None, "AES256" or "aws:kms"')
    if sse_kms_key_id is not None and sse != "aws:kms":
        raise StoreError('sse_kms_key_id is for sse="aws:kms"')
    if expected_bucket_owner is not None and not _OWNER.fullmatch(expected_bucket_owner):
        raise StoreError(
            f"expected_bucket_owner is {expected_bucket_owner!r}: expected the 12 digits of an AWS account"
        )
    for name, value in numbers.items():
        if not value > 0:
            raise StoreError(f"{name} is {value!r}: expected more than 0")


def _address(who: Account, bucket: str) -> tuple[str, bool]:
    """Endpoint for obstore, and whether the bucket's name is in its host.

    AWS wants the name in the host. Everything else gets it in the path: a private server's name has seldom a wildcard in DNS and in
    its certificate. So does a bucket with dots, which no wildcard certificate covers. The profile's `s3 = addressing_style` goes first.
    """
    parts = urlsplit(who.endpoint)
    if parts.netloc == "s3.amazonaws.com":  # botocore names the old global endpoint, but sends to the regional one
        parts = parts._replace(netloc=f"s3.{DEFAULT_REGION}.amazonaws.com")
    host = parts.hostname or ""
    if who.addressing_style in ("virtual", "path"):
        virtual = who.addressing_style == "virtual"
    else:
        virtual = bool(_AWS_HOST.search(host)) and ".vpce." not in host and "." not in bucket
    if virtual and not _is_address(host):
        parts = parts._replace(netloc=f"{bucket}.{parts.netloc}")
    return urlunsplit(parts).rstrip("/"), virtual and not _is_address(host)
