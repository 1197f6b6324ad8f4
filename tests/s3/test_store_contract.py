"""The shipped contract on a real server."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastckpt.store.base import Store
from fastckpt.store.cloud import S3Store
from fastckpt.store.wrap import Retrying
from fastckpt.testing.store_contract import StoreContract

pytestmark = pytest.mark.s3


class TestS3(StoreContract):
    """About 20 s: 1,100 objects one by one for the listing of more than a page."""

    rounds = 20

    @pytest.fixture
    def store(self, store: S3Store) -> Store:
        return store


class TestS3Retrying(StoreContract):
    many = 10
    rounds = 5

    @pytest.fixture
    def store(self, open_store: Callable[..., S3Store]) -> Store:
        return Retrying(open_store())
