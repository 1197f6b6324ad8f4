from typing import Any

import pytest

from fastckpt.snapshot import pool


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the slabs of ordinary memory that are made."""
    sizes: list[int] = []
    fresh = pool.fresh_pages

    def counted(n_bytes: int) -> Any:
        sizes.append(n_bytes)
        return fresh(n_bytes)

    monkeypatch.setattr(pool, "fresh_pages", counted)
    return sizes
