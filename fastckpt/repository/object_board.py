"""A board made of objects of the repository, for ranks that have lost the store of their process group (docs/format.md, section 11)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fastckpt.errors import ObjectNotFoundError, StoreError
from fastckpt.format.keys import NOTICES, notice_key, notices_prefix
from fastckpt.ranks.board import BoardLostError, member_key
from fastckpt.repository.commit import create
from fastckpt.store.base import Store


class ObjectBoard:
    """See the module, and `Board`. Written to only where ranks cannot reach each other otherwise."""

    def __init__(self, store: Store, epoch: Callable[[], int | None]) -> None:
        """epoch: of this job, by which its keys are told from those of others; None: there is none yet."""
        self._store, self._epoch = store, epoch

    def put(self, key: str, value: bytes) -> None:
        with _as_lost():
            self._store.put(self._key(key), value)

    def put_once(self, key: str, value: bytes) -> bytes:
        with _as_lost():
            return create(self._store, self._key(key), value)

    def get(self, key: str) -> bytes | None:
        with _as_lost():
            try:
                return self._store.get(self._key(key))
            except ObjectNotFoundError:
                return None

    def get_all(self, keys: Sequence[str]) -> list[bytes] | None:
        found = [self.get(key) for key in keys]
        return None if None in found else [value for value in found if value is not None]

    def has_all(self, keys: Sequence[str]) -> bool:
        return self.get_all(keys) is not None

    def join(self, group: str, member: int, value: bytes) -> None:
        self.put(member_key(group, member), value)

    def n_joined(self, group: str) -> int:
        with _as_lost():
            return sum(1 for _ in self._store.list(f"{self._key(group)}/"))

    def delete(self, keys: Sequence[str]) -> None:
        with _as_lost():
            for key in keys:
                self._store.delete(self._key(key))

    def _key(self, key: str) -> str:
        epoch = self._epoch()
        if epoch is None:
            raise BoardLostError("this job has not begun to save: there is nothing to agree on in the repository")
        return notice_key(epoch, key)


def remove_old_notices(store: Store, epoch: int) -> None:
    """Remove what ranks of earlier epochs have agreed on in objects. StoreError."""
    now = notices_prefix(epoch)
    for info in list(store.list(NOTICES)):
        if not info.key.startswith(now):
            store.delete(info.key)


@contextmanager
def _as_lost() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        raise BoardLostError(f"{type(error).__name__}: {error}") from error
