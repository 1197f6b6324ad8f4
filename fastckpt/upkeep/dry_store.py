"""A store that keeps nothing: for a save of which only the figures are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from fastckpt.errors import StoreError
from fastckpt.store.base import ObjectInfo, Store


class DryStore(Store):
    """Takes everything that is put, and has nothing."""

    url = "nowhere"

    def put(self, key: str, data: Any) -> None:
        """Does nothing."""

    def put_if_absent(self, key: str, data: Any) -> None:
        """Does nothing."""

    def get(self, key: str) -> bytes:
        self._refuse(key)

    def get_into(self, key: str, offset: int, out: Any) -> None:
        self._refuse(key)

    def head(self, key: str) -> ObjectInfo:
        self._refuse(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())

    def delete(self, key: str) -> None:
        """Does nothing."""

    def _refuse(self, key: str) -> NoReturn:
        raise StoreError(f"{key} was not kept: this store keeps nothing")


__all__ = ["DryStore"]
