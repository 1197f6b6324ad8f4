"""Account and endpoint for S3. boto3 is asked once for each configuration of a process: that takes 0.1 to 0.2 s.

The answer is cached for sessions that boto3 makes itself; a session given by the caller is asked every time. The cached answer is used
while the configuration (environment, boto3's files, arguments) is unchanged. Keys that expire are renewed by the cached credentials
themselves; keys that were replaced at their source are renewed by `SessionCredentials.renewed_since`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastckpt.errors import StoreError
from fastckpt.store.cloud_credentials import SessionCredentials
from fastckpt.store.cloud_errors import harmless

DEFAULT_REGION = "us-east-1"
_MOST_KEPT = 16
_Stamp = tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class Account:
    """boto3's answers."""

    credentials: SessionCredentials
    """Keys are requested only when they are needed."""
    session: Any = field(repr=False)
    """botocore's session."""
    endpoint: str
    region: str
    addressing_style: str | None
    """The profile's setting, if there is one."""
    checksums: str
    """"when_supported" or "when_required"."""
    ca_bundle: bytes | None = field(repr=False)
    """Certificates to trust instead of the system's; None: the system's."""
    files: tuple[tuple[str, _Stamp], ...] = field(repr=False)
    """The files that the answers were read from."""

    def is_current(self) -> bool:
        """Whether these files are unchanged."""
        return all(_stamp(path) == stamp for path, stamp in self.files)


known_accounts: dict[bytes, Account] = {}
"""The answers of boto3 by a digest of the configuration, oldest first. Under `_lock`."""
_lock = threading.Lock()


def _in_forked_child() -> None:
    global _lock  # noqa: PLW0603 - the parent may have held it
    _lock = threading.Lock()
    known_accounts.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


def account(session: Any, endpoint_url: str | None, timeout_s: float, *, anonymous: bool = False) -> Account:
    """The account of a session; None: boto3's whole credential chain. timeout_s: for connections that boto3 makes itself.

    StoreAccessError without credentials, unless anonymous; StoreError for a configuration that cannot be used. Any thread.
    """
    if session is not None:
        return _proven(ask_boto3(session, endpoint_url, timeout_s), anonymous)
    key = _key(endpoint_url, timeout_s)
    with _lock:
        found = known_accounts.get(key)
    if found is None or not found.is_current():
        found = _proven(ask_boto3(None, endpoint_url, timeout_s), anonymous)
        with _lock:
            known_accounts.pop(key, None)
            known_accounts[key] = found
            while len(known_accounts) > _MOST_KEPT:
                del known_accounts[next(iter(known_accounts))]
    return _proven(found, anonymous)


def _proven(found: Account, anonymous: bool) -> Account:
    if not anonymous:
        found.credentials.frozen()
    return found


def botocore_client(session: Any, **settings: Any) -> Any:
    """A botocore S3 client with the session's own configuration where `settings` says nothing. Sends nothing by itself."""
    from botocore.config import Config

    timeout_s, style = settings.pop("timeout_s"), settings.pop("style", None)
    return session.create_client(
        "s3",
        region_name=settings.pop("region_name", None) or _region(session),
        config=Config(
            retries={"total_max_attempts": 1},
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            s3={"addressing_style": style} if style else None,
        ),
        **settings,
    )


def ask_boto3(session: Any, endpoint_url: str | None, timeout_s: float) -> Account:
    """The account of a session (None: of a new one), without a look at `known_accounts`. StoreError."""
    problem: Exception | None = None
    try:
        import botocore.session

        core = getattr(session, "_session", session) or botocore.session.Session()
        # This client is only used to find the endpoint. It gets dummy keys, so that it does not look for keys.
        client = botocore_client(
            core,
            endpoint_url=endpoint_url,
            timeout_s=timeout_s,
            aws_access_key_id="none",
            aws_secret_access_key="none",
        )
        bundle = core.get_config_variable("ca_bundle")
        paths = [core.get_config_variable("config_file"), core.get_config_variable("credentials_file"), bundle]
        files = tuple((path, _stamp(path)) for path in map(os.path.expanduser, filter(None, paths)))
        return Account(
            credentials=SessionCredentials(core),
            session=core,
            endpoint=client.meta.endpoint_url,
            region=client.meta.region_name,
            addressing_style=(client.meta.config.s3 or {}).get("addressing_style"),
            checksums=_checksums(core),
            ca_bundle=Path(bundle).read_bytes() if bundle else None,
            files=files,
        )
    except StoreError:
        raise
    except ImportError as error:
        raise StoreError(f"s3:// needs boto3: pip install boto3 ({error})") from error
    except Exception as error:  # a broken profile, an invalid endpoint URL, a certificate bundle that cannot be read
        problem = error
    raise StoreError(f"the AWS configuration cannot be used: {type(problem).__name__}: {problem}") from harmless(
        problem, ()
    )


def _region(session: Any) -> str:
    """The region. botocore reads only AWS_DEFAULT_REGION; all other SDKs, and AWS's own documents, use AWS_REGION."""
    given = session.instance_variables().get("region")
    return str(given or os.environ.get("AWS_REGION") or session.get_config_variable("region") or DEFAULT_REGION)


def _checksums(session: Any) -> str:
    """The checksum setting. boto3 before 1.36 does not know it, other SDKs do."""
    name = "request_checksum_calculation"
    found = session.get_config_variable(name) or os.environ.get(f"AWS_{name.upper()}") or "when_supported"
    if str(found).lower() not in ("when_supported", "when_required"):
        raise ValueError(f"{name} is {found!r}: expected when_supported or when_required")
    return str(found).lower()


def _key(endpoint_url: str | None, timeout_s: float) -> bytes:
    """A digest of everything that boto3 reads before it opens files. A digest, so that keys in the environment are not stored twice."""
    names = sorted(name for name in os.environ if name.startswith("AWS_") or name in ("HOME", "BOTO_CONFIG"))
    parts = [str(endpoint_url), repr(timeout_s), *(f"{name}={os.environ[name]}" for name in names)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()


def _stamp(path: str) -> _Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
