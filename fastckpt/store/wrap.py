"""Stores that wrap stores. All retries are made here; those of the clients below are switched off."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fastckpt import events
from fastckpt.errors import ObjectChangedError, ObjectExistsError, StoreUnavailableError
from fastckpt.events import logger
from fastckpt.store import late_writes
from fastckpt.store.base import ObjectInfo, Store

T = TypeVar("T")


_TELL_S = 4.0
"""Seconds of trying before a message: it comes within 5 s, when a person would begin to wonder."""
_TELL_AGAIN_S = 30.0

# A generator of our own: drawing from the global one would change the numbers that training draws.
_random = random.Random()


class Wrapper(Store):
    """Passes every operation on to `inner`. Base class of wrapping stores: override `_call` to add something around each operation."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.url = inner.url
        self.useful_connections = inner.useful_connections
        self.most_put_bytes = inner.most_put_bytes
        self.one_writer = inner.one_writer
        self.has_files = inner.has_files

    def put(self, key: str, data: Any) -> None:
        self._call("put", key, lambda: self.inner.put(key, data))

    def put_if_absent(self, key: str, data: Any) -> None:
        self._call("put_if_absent", key, lambda: self.inner.put_if_absent(key, data))

    def get_version(self, key: str) -> tuple[bytes, str]:
        return self._call("get_version", key, lambda: self.inner.get_version(key))

    def replace_if_match(self, key: str, data: Any, version: str) -> None:
        self._call("replace_if_match", key, lambda: self.inner.replace_if_match(key, data, version))

    def get(self, key: str) -> bytes:
        return self._call("get", key, lambda: self.inner.get(key))

    def get_into(self, key: str, offset: int, out: Any) -> None:
        self._call("get_into", key, lambda: self.inner.get_into(key, offset, out))

    def head(self, key: str) -> ObjectInfo:
        return self._call("head", key, lambda: self.inner.head(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        # If a page fails in the middle of a listing, the whole listing fails and is repeated: that costs little.
        return iter(self._call("list", prefix, lambda: list(self.inner.list(prefix))))

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self.inner.delete(key))

    def open_file(self, key: str) -> int:
        return self._call(
            "get_into", key, lambda: self.inner.open_file(key)
        )  # what is read then cannot fail for a moment only

    def doubt(self, key: str) -> bool:
        """Note that what was read of an object is not what it should be. Returns whether the next read of it comes from another place, and
        may be right: what was read was a copy.
        """
        return isinstance(self.inner, Wrapper) and self.inner.doubt(key)

    def harmful_rules(self) -> tuple[str, ...]:
        return self.inner.harmful_rules()  # not an operation on objects, and not worth a second try

    def close(self) -> None:
        self.inner.close()

    def _call(self, verb: str, key: str, operation: Callable[[], T]) -> T:
        return operation()


class Retrying(Wrapper):
    """Repeats operations that ended in StoreUnavailableError, with growing random pauses, until `give_up_s` have passed since the first
    try.

    If an earlier try of a create ended without an answer, and the next one meets an object, the object is read back: equal bytes count as
    ours. So too for a replacement that meets another version. A put without an answer is noted (`late_writes`), because it may still
    arrive.
    """

    def __init__(
        self,
        inner: Store,
        *,
        give_up_s: float = 120.0,
        first_pause_s: float = 0.1,
        longest_pause_s: float = 5.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(inner)
        self._give_up_s = give_up_s
        self._first_pause_s, self._longest_pause_s = first_pause_s, longest_pause_s
        self._sleep, self._clock, self._jitter = sleep, clock, jitter
        self._told_s: float | None = None

    def put(self, key: str, data: Any) -> None:
        def once() -> None:
            try:
                self.inner.put(key, data)
            except StoreUnavailableError as error:
                if not error.refused:
                    late_writes.note(self.url, key)
                raise

        self._call("put", key, once)

    def put_if_absent(self, key: str, data: Any) -> None:
        unanswered = False

        def once() -> None:
            nonlocal unanswered
            try:
                self.inner.put_if_absent(key, data)
            except StoreUnavailableError:
                unanswered = True
                raise
            except ObjectExistsError:
                if not unanswered or self.inner.get(key) != bytes(memoryview(data).cast("B")):
                    raise

        self._call("put_if_absent", key, once)

    def replace_if_match(self, key: str, data: Any, version: str) -> None:
        unanswered = False

        def once() -> None:
            nonlocal unanswered
            try:
                self.inner.replace_if_match(key, data, version)
            except StoreUnavailableError:
                unanswered = True
                raise
            except ObjectChangedError:
                if not unanswered or self.inner.get(key) != bytes(memoryview(data).cast("B")):
                    raise

        self._call("replace_if_match", key, once)

    def _call(self, verb: str, key: str, operation: Callable[[], T]) -> T:
        started, attempt = self._clock(), 0
        while True:
            try:
                return operation()
            except StoreUnavailableError as error:
                attempt += 1
                # Full jitter: clients that were turned away together must not return together.
                pause_s = self._jitter() * min(self._longest_pause_s, self._first_pause_s * 2**attempt)
                if self._clock() - started + pause_s > self._give_up_s:
                    raise StoreUnavailableError(
                        f"{error} (given up after {attempt} tries in {self._clock() - started:.0f} s)"
                    ) from error
                events.emit(
                    events.StoreRetry(
                        target=self.url, verb=verb, key=key, attempt=attempt, pause_s=pause_s, error=error
                    )
                )
                # The message comes before a pause that would end later than this.
                if self._clock() - started + pause_s >= _TELL_S:
                    self._tell(error, attempt, self._clock() - started)
                self._sleep(pause_s)

    def _tell(self, error: BaseException, attempt: int, seconds: float) -> None:
        now = self._clock()
        if self._told_s is None or now - self._told_s >= _TELL_AGAIN_S:
            self._told_s = now
            logger.warning(
                "%s (try %d, after %.0f s; tried again until %.0f s have passed)",
                error,
                attempt,
                seconds,
                self._give_up_s,
            )
