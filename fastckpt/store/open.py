"""Opens the store at a URL."""

from __future__ import annotations

import os
import threading
from typing import Any

from fastckpt.errors import SaveError, StoreError
from fastckpt.store.base import Store
from fastckpt.store.local import LocalStore
from fastckpt.store.location import is_url, location
from fastckpt.store.memory import MemoryStore
from fastckpt.store.wrap import Retrying

BLOB_SCHEMES = ("gs", "gcs", "az", "azure")
_memory: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()


def open_object(url: str, **settings: Any) -> tuple[Store, str]:
    """The store and the key of the single object that a URL names; any program may have named it. The caller closes the store.

    url: as `location` returned it. settings, errors: those of `open_store`. SaveError or StoreError for a URL that names no object.
    """
    root, _, key = url.rpartition("/")
    if not key or root.endswith(("/", ":")):
        kind = StoreError if key else SaveError
        raise kind(f"{url!r} names no object: expected scheme://place/…/name")
    if root.partition("://")[0] in ("s3", *BLOB_SCHEMES):
        settings["any_names"] = True
    return open_store(root, **settings), key


def open_store(url: str | os.PathLike[str], **settings: Any) -> Store:
    """The store at a URL: a path, file://, s3://, gs://, az:// or memory://name (this process only). The caller closes it.

    A path object may hold a URL, even if pathlib has left only one slash of it (`Path("s3://bucket/run")`). settings: those of
    `fastckpt.store.cloud.open_s3` for s3://, those of `fastckpt.store.blob.open_blobs` for gs:// and az://. StoreError for an invalid URL;
    for S3 also for missing credentials or a wrong configuration. Nothing is written.
    """
    url = location(url)
    if not url:
        raise StoreError("the URL is empty: expected a directory or s3://bucket/prefix")
    scheme, _, rest = url.partition("://") if is_url(url) else ("", "", "")
    if scheme == "s3":
        from fastckpt.store.cloud import open_s3  # boto3 takes half a second to import

        return Retrying(open_s3(url, **settings))
    if scheme in BLOB_SCHEMES:
        from fastckpt.store.blob import open_blobs

        return Retrying(open_blobs(url, **settings))
    if settings:
        raise StoreError(
            f"{url!r} takes no settings, found {', '.join(sorted(settings))}: they are for s3://, gs:// and az:// only"
        )
    if not scheme:
        return LocalStore(os.path.expanduser(url))
    if scheme == "memory":
        name = rest.strip("/") or "memory"
        with _memory_lock:
            return _memory.setdefault(name, MemoryStore(name=name))
    if scheme in ("abfs", "abfss"):
        raise StoreError(f"{url!r}: write az://container/prefix, and name the account in AZURE_STORAGE_ACCOUNT_NAME")
    raise StoreError(f"{url!r} is no URL of a store: expected a directory, file://, s3://, gs://, az:// or memory://")
