"""A store that uses the freedom of the contract: it fails in every way that the contract allows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from fastckpt.errors import StoreUnavailableError
from fastckpt.store.base import Store
from fastckpt.store.wrap import Wrapper

T = TypeVar("T")
Mode = Literal["before", "after", "delayed"]


class FaultyStore(Wrapper):
    """Counts operations and makes chosen ones fail. Any thread; the count is one for all of them.

    before: the operation is not done. after: it is done, but its reply is lost. delayed: a write that is not done now, but when `release`
    is called, like a request that was still on its way (guarantees.md, A1). Each ends in StoreUnavailableError, or in the error that
    `error` makes.
    """

    def __init__(
        self,
        inner: Store,
        fail: Callable[[int, str, str], bool] = lambda number, verb, key: False,
        mode: Mode = "before",
        *,
        error: Callable[[str], BaseException] = StoreUnavailableError,
        hook: Callable[[int, str, str, str], None] = lambda number, verb, key, when: None,
    ) -> None:
        """fail: called with number (from 0), verb and key of each operation; True makes it fail. hook: called with "before" and "after"
        around each operation; may end the process.
        """
        super().__init__(inner)
        self._fail, self._mode, self._error, self._hook = fail, mode, error, hook
        self._lock = threading.Lock()
        self.operations: list[tuple[str, str]] = []
        self._late: list[Callable[[], Any]] = []

    def _call(self, verb: str, key: str, operation: Callable[[], T]) -> T:
        with self._lock:
            number = len(self.operations)
            self.operations.append((verb, key))
        self._hook(number, verb, key, "before")
        if not self._fail(number, verb, key):
            try:
                return operation()
            finally:  # also after a refusal, which is an answer, too
                self._hook(number, verb, key, "after")
        if self._mode == "after":
            operation()
        elif self._mode == "delayed" and verb in ("put", "put_if_absent", "replace_if_match", "delete"):
            self._late.append(operation)
        raise self._error(f"operation {number}, {verb} {key}, was made to fail ({self._mode})")

    # A delayed write must have the data of the time of the call.
    def put(self, key: str, data: Any) -> None:
        copy = bytes(memoryview(data).cast("B")) if self._mode == "delayed" else data
        super().put(key, copy)

    def put_if_absent(self, key: str, data: Any) -> None:
        copy = bytes(memoryview(data).cast("B")) if self._mode == "delayed" else data
        super().put_if_absent(key, copy)

    def replace_if_match(self, key: str, data: Any, version: str) -> None:
        copy = bytes(memoryview(data).cast("B")) if self._mode == "delayed" else data
        super().replace_if_match(key, copy, version)

    def release(self) -> None:
        """Let the delayed writes take effect; the store's answers to them are ignored."""
        late, self._late = self._late, []
        for operation in late:
            try:
                operation()
            except Exception:  # nobody is left to be told
                continue
