"""Bytes by key: memory, a directory, S3, Google Cloud Storage, Azure Blob. Knows nothing of checkpoints (docs/stores.md).

    from fastckpt.store import open_store
    store = open_store("s3://bucket/prefix", endpoint_url="https://minio.example")

This module holds the public names; the modules below implement them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastckpt.store.base import ObjectInfo, Store
from fastckpt.store.local import LocalStore
from fastckpt.store.memory import MemoryStore
from fastckpt.store.open import open_store
from fastckpt.store.wrap import Retrying, Wrapper

if TYPE_CHECKING:
    from fastckpt.store.blob import BlobStore, open_blobs
    from fastckpt.store.cloud import S3Store, open_s3
    from fastckpt.store.cloud_bucket import BucketReport, check_bucket

# Imported on demand: saving to a directory does not need the libraries of clouds.
_CLOUDS = {
    "BlobStore": "fastckpt.store.blob",
    "BucketReport": "fastckpt.store.cloud_bucket",
    "S3Store": "fastckpt.store.cloud",
    "check_bucket": "fastckpt.store.cloud_bucket",
    "open_blobs": "fastckpt.store.blob",
    "open_s3": "fastckpt.store.cloud",
}


def __getattr__(name: str) -> Any:
    if name in _CLOUDS:
        return getattr(importlib.import_module(_CLOUDS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BlobStore",
    "BucketReport",
    "LocalStore",
    "MemoryStore",
    "ObjectInfo",
    "Retrying",
    "S3Store",
    "Store",
    "Wrapper",
    "check_bucket",
    "open_blobs",
    "open_s3",
    "open_store",
]
