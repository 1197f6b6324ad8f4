"""The contract that every store keeps. `fastckpt.testing.store_contract` is the same contract as tests.

A store has the verbs of object storage and no more. What it must guarantee (docs/guarantees.md builds on nothing else):

S1  An object is whole or absent: no reader ever sees a part of a `put`.
S2  When `put` or `put_if_absent` has returned, the object is durable, and every later `get`, `head` and `list` of any client sees it.
S3  Of several `put_if_absent` of one key, exactly one succeeds, whatever the others are told.
S4  An error of a write says nothing: the object may be there, now or a moment later.
S5  When `delete` has returned, every later operation of any client sees the key as absent.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from fastckpt.errors import StoreError

MAX_KEY_BYTES = 1024
_SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,255}")
_NAME_SEGMENT = re.compile(r"[^\x00-\x1f\x7f-\x9f/]+")


@dataclass(frozen=True, slots=True, order=True)
class ObjectInfo:
    """What a store knows about an object without reading it."""

    key: str
    n_bytes: int
    modified_s: float
    """When it was written, by the store's own clock: seconds since 1970. Never compared with another clock."""


def check_key(key: str) -> str:
    """The key itself, if it is one: segments of `A–Z a–z 0–9 . _ -`, separated by `/`, none of them `.` or `..`. StoreError.

    Every store checks every key: what a hostile record names must not leave the root.
    """
    segments = key.split("/")
    if len(key) > MAX_KEY_BYTES or not all(_SEGMENT.fullmatch(s) and s not in (".", "..") for s in segments):
        raise StoreError(
            f"{key!r} is no key: expected segments of A–Z a–z 0–9 . _ - separated by /, none of them . or .."
        )
    return key


def check_name(name: str) -> str:
    """The name itself, if an object that others named, or a user, can have it: wider than a key. StoreError.

    Everything that S3 takes, but for control characters, empty segments, and those that are `.` or `..`.
    """
    segments = name.split("/")
    try:
        n_bytes = len(name.encode())
    except UnicodeEncodeError:
        n_bytes = MAX_KEY_BYTES + 1
    if n_bytes > MAX_KEY_BYTES or not all(_NAME_SEGMENT.fullmatch(s) and s not in (".", "..") for s in segments):
        raise StoreError(
            f"{name!r} is no name of an object: expected up to {MAX_KEY_BYTES} bytes of UTF-8, no control characters, and between two / "
            "neither nothing nor . nor .."
        )
    return name


def check_prefix(prefix: str) -> str:
    """The prefix itself, if it is "" or a key with a `/` behind it. StoreError otherwise."""
    if prefix:
        if not prefix.endswith("/"):
            raise StoreError(f"{prefix!r} is no prefix to list: it must end with /")
        check_key(prefix[:-1])
    return prefix


class Store(abc.ABC):
    """Objects under one root, by key. Subclass it to save to a place of your own; `fastckpt.testing.store_contract` tests the result.

    Threads: every method blocks, and may be called from several threads at once.

    Raises: every method raises StoreError, or one of its subclasses, and nothing else, but for the EOFError of `get_into`:

    * StoreUnavailableError: no answer, or "later"; another try may help. Of a write: it may have been done.
    * StoreAccessError: the credentials, or the permissions, do not allow it.
    * StoreFullError: there is no room for the object, on the disk or by a quota. Nothing of it was written.
    * ObjectNotFoundError: of `get`, `get_into` and `head`.
    * ObjectExistsError: of `put_if_absent`.
    * StoreError itself: anything else (a key that is none, a closed store); another try will not help.
    """

    url: str
    """For messages and logs: where it is, never a secret."""
    useful_connections: int | None = None
    """More requests at once than this gain nothing. None: the more the better."""

    most_put_bytes: int | None = None
    """The largest object that one `put` can write. None: not limited."""

    @abc.abstractmethod
    def put(self, key: str, data: Any) -> None:
        """Write an object whole, over whatever is there.

        Args:
            key: what `check_key` accepts.
            data: one contiguous buffer (bytes, memoryview, NumPy array). The caller leaves it alone until this returns.

        Raises:
            StoreError: as the class says. The object may be there all the same, now or a moment later (S4).
        """

    @abc.abstractmethod
    def put_if_absent(self, key: str, data: Any) -> None:
        """Write an object if there is none. Of several callers at once, exactly one succeeds (S3).

        Args:
            key: what `check_key` accepts.
            data: as for `put`.

        Raises:
            ObjectExistsError: there is an object; it stays as it is.
            StoreError: as for `put`.
        """

    @abc.abstractmethod
    def get(self, key: str) -> bytes:
        """Return the whole object. For small ones: the caller has looked at the size.

        Raises:
            ObjectNotFoundError: there is none.
            StoreError: as the class says.
        """

    @abc.abstractmethod
    def get_into(self, key: str, offset: int, out: Any) -> None:
        """Fill a buffer from the object.

        Args:
            key: what `check_key` accepts.
            offset: first byte of the object to read.
            out: writable, contiguous buffer; as many bytes are read as it has. Written in part where this raises.

        Raises:
            EOFError: the object ends before `out` is full.
            ObjectNotFoundError: there is no object, even if `out` is empty.
            StoreError: as the class says.
        """

    @abc.abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Return the size and the time of an object.

        Raises:
            ObjectNotFoundError: there is none.
            StoreError: as the class says.
        """

    @abc.abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List objects in ascending order of their keys.

        Args:
            prefix: "" for all; else the start of their keys, with a / at its end.

        Returns:
            An iterator; what it has not come to yet may be asked for later, and raise then.

        Raises:
            StoreError: as the class says. Nothing that starts with `prefix` is no error.
        """

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object. None there is no error.

        Raises:
            StoreError: as the class says.
        """

    def harmful_rules(self) -> tuple[str, ...]:
        """Sentences for a person about rules of the place itself that delete what is written here, or put it out of reach.

        Advice: at most one request and some seconds, and where it cannot be found out, nothing. Raises nothing.
        """
        return ()

    def close(self) -> None:  # noqa: B027 - most stores have nothing to let go of
        """Let go of connections. Nothing may be called afterwards. May be called twice."""

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
