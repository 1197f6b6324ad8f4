"""Pins checkpoints while somebody reads them, so that retention leaves them alone (docs/format.md, section 11.1)."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from types import TracebackType

from fastckpt.errors import StoreAccessError, StoreError
from fastckpt.format.keys import CheckpointId, pin_key
from fastckpt.format.repository_records import Pin, pin_bytes, utc_now
from fastckpt.store.base import Store

EXPIRES_S = 3600
"""Of a pin whose owner was killed: retention removes it after that."""
_RENEW_S = EXPIRES_S / 4


class Pinning:
    """Pins of one reader: put by `hold`, put again by `renew`, removed by `release` and at the end. One thread.

    Without the right to write, nothing is pinned, and `refused` says why: a reader may go on, and meets a checkpoint that was retired
    meanwhile as an error.
    """

    def __init__(self, store: Store, owner: str, clock: Callable[[], float] = time.monotonic) -> None:
        """owner: who reads, for people."""
        self._store, self._owner, self._clock = store, owner, clock
        self._name = f"{secrets.token_hex(6)}"
        self._held: dict[CheckpointId, float] = {}
        self.refused: StoreAccessError | None = None

    def hold(self, checkpoint: CheckpointId) -> None:
        """Pin a checkpoint. StoreError, but for the right to write."""
        if self.refused is not None:
            return
        pin = Pin(checkpoint, EXPIRES_S, self._owner, utc_now())
        try:
            self._store.put(self._key(checkpoint), pin_bytes(pin))
        except StoreAccessError as error:
            self.refused = error
            return
        self._held[checkpoint] = self._clock()

    def renew(self) -> None:
        """Put pins again that are a quarter of their time old. To be called now and then. StoreError."""
        now_s = self._clock()
        for checkpoint in [c for c, since_s in self._held.items() if now_s - since_s >= _RENEW_S]:
            self.hold(checkpoint)

    def release(self, checkpoint: CheckpointId) -> None:
        """Remove a pin; one that cannot be removed expires."""
        if self._held.pop(checkpoint, None) is not None:
            with contextlib.suppress(StoreError):
                self._store.delete(self._key(checkpoint))

    def _key(self, checkpoint: CheckpointId) -> str:
        return pin_key(f"{self._name}-{checkpoint.epoch}-{checkpoint.step}")

    def __enter__(self) -> Pinning:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for checkpoint in list(self._held):
            self.release(checkpoint)


__all__ = ["EXPIRES_S", "Pinning"]
