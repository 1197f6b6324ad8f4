"""Credentials for S3, from boto3's whole chain (environment, profile, assumed role, web identity, container, instance).

The chain is asked before every request, which takes 0.1 ms: a role's key may be valid for only 10 more minutes when botocore returns it,
and botocore renews it in time.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastckpt.errors import StoreAccessError, StoreError, StoreUnavailableError
from fastckpt.store.cloud_errors import cut_secrets, harmless

_NEXT_STEP = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run `aws configure`, or give the machine a role "
    "(boto3's chain: https://boto3.amazonaws.com/v1/documentation/api/latest/guide/credentials.html). "
    "For a public bucket set AWS_NO_SIGN_REQUEST=true, or anonymous=True"
)
_IN_A_HEADER = re.compile(r"[!-~]+")
_TRANSIENT = (
    "ConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "EndpointConnectionError",
    "HTTPClientError",
)


class SessionCredentials:
    """The present credentials of a boto3 session. Any thread; its text form shows no secret."""

    def __init__(self, session: Any) -> None:
        self._chain = getattr(session, "_session", session)
        """botocore's session; boto3's session holds it in `_session`."""
        self._lock = threading.Lock()
        self._found: Any = None
        self._generation = 0
        self._seen: set[str] = set()
        _alive.add(self)

    def __repr__(self) -> str:
        return f"SessionCredentials(generation={self._generation})"

    @property
    def generation(self) -> int:
        """Number of times that the chain was searched anew. Note it before a request, and pass it to `renewed_since` after a refusal."""
        return self._generation

    @property
    def secrets(self) -> list[str]:
        """All secret keys and session tokens returned so far, longest first: none of them may occur in a message."""
        with self._lock:
            return sorted(self._seen, key=len, reverse=True)

    def frozen(self) -> Any:
        """botocore's (access_key, secret_key, token), renewed if due. StoreAccessError, StoreUnavailableError."""
        problem: Exception | None = None
        try:
            if self._found is None:
                self._found = self._chain.get_credentials()
            frozen = self._found.get_frozen_credentials() if self._found is not None else None
        except Exception as error:  # botocore's own errors, and those of a user's credential_process or plug-in
            problem = error
        if problem is not None:
            raise self._explain(problem) from harmless(problem, self.secrets)
        if frozen is None or not frozen.access_key or not frozen.secret_key:
            raise StoreAccessError(f"no AWS credentials found. {_NEXT_STEP}")
        _check_form(frozen)
        with self._lock:
            self._seen.update(part for part in (frozen.secret_key, frozen.token) if part)
        return frozen

    def _explain(self, error: Exception) -> StoreError:
        text = cut_secrets(f"{type(error).__name__}: {error}", self.secrets)
        if any(kind.__name__ in _TRANSIENT for kind in type(error).__mro__):
            return StoreUnavailableError(f"AWS credentials could not be fetched just now: {text}")
        return StoreAccessError(f"AWS credentials could not be had: {text}. {_NEXT_STEP}")

    def renewed_since(self, generation: int) -> bool:
        """After a refusal: search the chain anew, unless that was done since `generation`. Returns whether the credentials have changed.

        botocore renews a role's credentials itself, but it reads the environment and the profile's files only once. A key that was replaced
        there during the training is found here. Only the source of the present credentials is read again: keys from elsewhere in the chain,
        or given to the session by hand, may belong to another person.
        """
        with self._lock:
            if self._generation != generation:
                return True
            before = self._found
            try:
                if before is None or before.method == "explicit":
                    return False
                found = self._chain.get_component("credential_provider").load_credentials()
                if found is None or found.method != before.method or _same(found, before):
                    return False
            except Exception:  # the refusal is reported; an error of the chain would add nothing to it
                return False
            self._found = found
            self._generation += 1
            return True


_alive: weakref.WeakSet[SessionCredentials] = weakref.WeakSet()


def _in_forked_child() -> None:
    for one in list(_alive):
        one._lock = threading.Lock()  # a thread of the parent may have held it while it asked for keys


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


def _check_form(frozen: Any) -> None:
    """StoreAccessError for keys that contain white space, mostly from copying: S3 would only call the signature wrong."""
    bad = [
        what
        for what, text, good in (
            ("the access key", frozen.access_key, _IN_A_HEADER.fullmatch(frozen.access_key)),
            ("the secret key", frozen.secret_key, frozen.secret_key == frozen.secret_key.strip()),
            ("the session token", frozen.token, not frozen.token or _IN_A_HEADER.fullmatch(frozen.token)),
        )
        if text and not good
    ]
    if bad:
        raise StoreAccessError(
            f"the AWS credentials cannot be used: {' and '.join(bad)} has white space or characters that no key has, such as a line end "
            "that was copied with it. Take it out of the variable or file that the key comes from"
        )


def _same(one: Any, other: Any) -> bool:
    return bool(one.get_frozen_credentials() == other.get_frozen_credentials())


class _OfThisThread(logging.Filter):
    """Drops DEBUG records of one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.DEBUG or record.thread != self._thread


@contextmanager
def no_debug_logs() -> Iterator[None]:
    """Context in which botocore writes no DEBUG logs about this thread's requests: they would contain the session token."""
    import botocore.session  # noqa: F401 # its loggers exist once it is imported

    names = [
        name for name in logging.Logger.manager.loggerDict if name.split(".")[0] in ("boto3", "botocore", "urllib3")
    ]
    silence = _OfThisThread()
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(silence)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(silence)
