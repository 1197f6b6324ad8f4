"""checkpoint_ids → URLs of repositories."""

from __future__ import annotations

import os

from fastckpt.errors import StoreError
from fastckpt.store.location import is_url, location
from fastckpt.store.open import BLOB_SCHEMES

_SCHEMES = ("s3", *BLOB_SCHEMES, "memory")


def require_url(checkpoint_id: str | os.PathLike[str]) -> str:
    """The URL or path of a checkpoint_id, which any process can open. StoreError if there is no store for such a one."""
    url = location(checkpoint_id)
    scheme = url.partition("://")[0] if is_url(url) else ""
    if not url or (scheme and scheme not in _SCHEMES):
        raise StoreError(
            f"{url!r}: expected a directory, file:///path, s3://, gs:// or az://bucket/prefix, or memory://name"
        )
    return url


def rank_url(url: str, rank: int) -> str:
    """Where one rank saves for itself (`use_collectives=False`)."""
    return f"{url.rstrip('/')}/rank-{rank:05}"
