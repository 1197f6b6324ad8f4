"""The contract of every store. `fastckpt.testing.store_contract` tests it.

A store has only the verbs of object storage. It must guarantee the following (docs/guarantees.md relies on nothing else):

S1  An object is whole or absent: no reader ever sees a part of a `put`.
S2  When `put` or `put_if_absent` has returned, the object is durable, and every later `get`, `head` and `list` of any client sees it.
S3  Of several `put_if_absent` of one key, exactly one succeeds, whatever the others return.
S4  After an error of a write the result is unknown: the object may be there, now or a moment later.
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
    """Facts about an object that a store knows without reading it."""

    key: str
    n_bytes: int
    modified_s: float
    """The time of writing, by the store's own clock, in seconds since 1970. It is never compared with another clock."""


def check_key(key: str) -> str:
    """Return the key if it is valid: segments of `A–Z a–z 0–9 . _ -`, separated by `/`, none of them `.` or `..`. Otherwise StoreError.

    Every store checks every key: a key in a hostile record must not lead out of the root.
    """
    segments = key.split("/")
    if len(key) > MAX_KEY_BYTES or not all(_SEGMENT.fullmatch(s) and s not in (".", "..") for s in segments):
        raise StoreError(
            f"{key!r} is no key: expected segments of A–Z a–z 0–9 . _ - separated by /, none of them . or .."
        )
    return key


def check_name(name: str) -> str:
    """Return the name if it is valid for an object that a user or another program has named: a wider set than keys. Otherwise StoreError.

    Allows everything that S3 allows, except control characters, empty segments, and the segments `.` and `..`.
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
    """Return the prefix if it is "" or a key followed by `/`. Otherwise StoreError."""
    if prefix:
        if not prefix.endswith("/"):
            raise StoreError(f"{prefix!r} is no prefix to list: it must end with /")
        check_key(prefix[:-1])
    return prefix


class Store(abc.ABC):
    """Objects under one root, by key. Subclass it to save to a place of your own; `fastckpt.testing.store_contract` tests the result.

    Threads: every method blocks, and may be called from several threads at once.

    Raises: every method raises StoreError or one of its subclasses, and nothing else, except the EOFError of `get_into`:

    * StoreUnavailableError: no answer, or "later"; another try may help. If it was a write, it may have been done.
    * StoreAccessError: the credentials, or the permissions, do not allow it.
    * StoreFullError: there is no room for the object, on the disk or by a quota. Nothing of it was written.
    * ObjectNotFoundError: of `get`, `get_into` and `head`.
    * ObjectExistsError: of `put_if_absent`.
    * StoreError itself: anything else (an invalid key, a closed store); another try will not help.
    """

    url: str
    """The store's location, for messages and logs; never contains a secret."""
    useful_connections: int | None = None
    """More simultaneous requests than this gain nothing. None: no limit is known."""

    has_files: bool = False
    """Whether objects are files of this machine, which `open_file` opens."""

    most_put_bytes: int | None = None
    """The largest object that one `put` can write. None: not limited."""

    @abc.abstractmethod
    def put(self, key: str, data: Any) -> None:
        """Write a whole object, and replace an existing one.

        Args:
            key: what `check_key` accepts.
            data: one contiguous buffer (bytes, memoryview, NumPy array). The caller must not change it until this returns.

        Raises:
            StoreError: as the class says. The object may be there nevertheless, now or a moment later (S4).
        """

    @abc.abstractmethod
    def put_if_absent(self, key: str, data: Any) -> None:
        """Write an object if there is none. Of several simultaneous callers, exactly one succeeds (S3).

        Args:
            key: what `check_key` accepts.
            data: as for `put`.

        Raises:
            ObjectExistsError: there is an object; it stays as it is.
            StoreError: as for `put`.
        """

    @abc.abstractmethod
    def get(self, key: str) -> bytes:
        """Return the whole object. For small objects: the caller has checked the size before.

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
            out: writable, contiguous buffer; its length is the number of bytes to read. After an error it may be partly written.

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
            prefix: "" for all objects; else the beginning of their keys, ending in /.

        Returns:
            An iterator. It may request further objects later, and raise then.

        Raises:
            StoreError: as the class says. It is no error if no object starts with `prefix`.
        """

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object. It is no error if there is none.

        Raises:
            StoreError: as the class says.
        """

    def open_file(self, key: str) -> int:
        """Open the file of an object, to read it by position. Only of stores that have files.

        Returns:
            A descriptor; the caller closes it.

        Raises:
            ObjectNotFoundError: there is none.
            StoreError: as the class says.
        """
        raise StoreError(f"{self.url} has no files: {key} cannot be opened as one")

    def harmful_rules(self) -> tuple[str, ...]:
        """Sentences for a person about rules of the storage service itself that delete objects of this store, or make them unreadable.

        This is only advice: it takes at most one request and some seconds, and returns nothing if the rules cannot be read. Raises nothing.
        """
        return ()

    def close(self) -> None:  # noqa: B027 - most stores have nothing to let go of
        """Close connections. Nothing may be called afterwards. May be called twice."""

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
