"""Who we are to S3 and where it is, asked of boto3 once for each configuration of a process: asking takes 0.1 to 0.2 s.

Kept for sessions that boto3 makes by itself; one that is given is asked every time. The configuration is the environment, boto3's files
and the arguments: what is kept is used again while none of them has changed. Keys that run out are renewed by the kept credentials
themselves, those that are replaced at their place by `SessionCredentials.renewed_since`.
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
    """What boto3 says."""

    credentials: SessionCredentials
    """Proven to be there."""
    session: Any = field(repr=False)
    """botocore's."""
    endpoint: str
    region: str
    addressing_style: str | None
    """The profile's, if it says."""
    ca_bundle: bytes | None = field(repr=False)
    """Certificates to trust, if they are not the system's."""
    files: tuple[tuple[str, _Stamp], ...] = field(repr=False)
    """What it was read from."""

    def is_current(self) -> bool:
        """Whether the files are still those that were read."""
        return all(_stamp(path) == stamp for path, stamp in self.files)


_kept: dict[bytes, Account] = {}
_lock = threading.Lock()


def _in_forked_child() -> None:
    global _lock  # noqa: PLW0603 - the parent may have held it
    _lock = threading.Lock()
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


def account(session: Any, endpoint_url: str | None, timeout_s: float) -> Account:
    """The account that a session stands for; None: boto3's whole chain. timeout_s: for connections of boto3's own.

    StoreAccessError without credentials; StoreError for a configuration that cannot be used. Any thread.
    """
    if session is not None:
        return _ask(session, endpoint_url, timeout_s)
    key = _key(endpoint_url, timeout_s)
    with _lock:
        found = _kept.get(key)
    if found is None or not found.is_current():
        found = _ask(None, endpoint_url, timeout_s)
        with _lock:
            _kept.pop(key, None)
            _kept[key] = found
            while len(_kept) > _MOST_KEPT:
                del _kept[next(iter(_kept))]
    return found


def botocore_client(session: Any, **settings: Any) -> Any:
    """A botocore S3 client with the session's own configuration where `settings` says nothing. Sends nothing by itself."""
    from botocore.config import Config

    timeout_s, style = settings.pop("timeout_s"), settings.pop("style", None)
    return session.create_client(
        "s3",
        region_name=settings.pop("region_name", None) or session.get_config_variable("region") or DEFAULT_REGION,
        config=Config(
            retries={"total_max_attempts": 1},
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            s3={"addressing_style": style} if style else None,
        ),
        **settings,
    )


def _ask(session: Any, endpoint_url: str | None, timeout_s: float) -> Account:
    problem: Exception | None = None
    try:
        import botocore.session

        core = getattr(session, "_session", session) or botocore.session.Session()
        credentials = SessionCredentials(core)
        credentials.frozen()
        client = botocore_client(core, endpoint_url=endpoint_url, timeout_s=timeout_s)
        bundle = core.get_config_variable("ca_bundle")
        paths = [core.get_config_variable("config_file"), core.get_config_variable("credentials_file"), bundle]
        files = tuple((path, _stamp(path)) for path in map(os.path.expanduser, filter(None, paths)))
        return Account(
            credentials=credentials,
            session=core,
            endpoint=client.meta.endpoint_url,
            region=client.meta.region_name,
            addressing_style=(client.meta.config.s3 or {}).get("addressing_style"),
            ca_bundle=Path(bundle).read_bytes() if bundle else None,
            files=files,
        )
    except StoreError:
        raise
    except ImportError as error:
        raise StoreError(f"s3:// needs boto3 and obstore: pip install boto3 obstore ({error})") from error
    except Exception as error:  # a broken profile, an endpoint that is no URL, a bundle that cannot be read
        problem = error
    raise StoreError(f"the AWS configuration cannot be used: {type(problem).__name__}: {problem}") from harmless(
        problem, ()
    )


def _key(endpoint_url: str | None, timeout_s: float) -> bytes:
    """Of all that boto3 looks at before it opens files. A digest: keys of the environment need not lie about twice."""
    names = sorted(name for name in os.environ if name.startswith("AWS_") or name in ("HOME", "BOTO_CONFIG"))
    parts = [str(endpoint_url), repr(timeout_s), *(f"{name}={os.environ[name]}" for name in names)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()


def _stamp(path: str) -> _Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
