"""Whether packs are there, by their lengths: a few LISTs instead of a request for each."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping

from fastckpt.errors import Damage
from fastckpt.format import keys
from fastckpt.format.directory import FileEntry
from fastckpt.host.threads import WorkerPool
from fastckpt.store.base import ObjectInfo, Store

_LISTS_AT_ONCE = 16
_FEW = 4
"""Listings that are not worth threads."""


def pack_sizes(store: Store, packs: Iterable[str]) -> Mapping[str, int]:
    """Lengths of the packs that lie beside these, by LISTs: one for each save, and a page for each 1,000 of its packs. StoreError."""
    folders: dict[str, set[str]] = defaultdict(set)
    for key in packs:
        if keys.parse_pack(key) is not None:
            folder = key.rpartition("/")[0]
            folders[folder.rpartition("/")[0]].add(folder)
    # Of a save of 1,024 ranks, one rank's vote needs only its own packs, mostly.
    prefixes = sorted(f"{min(ranks) if len(ranks) == 1 else save}/" for save, ranks in folders.items())
    threads = 0 if len(prefixes) <= _FEW else min(_LISTS_AT_ONCE, len(prefixes))
    with contextlib.closing(WorkerPool(threads, "fastckpt-sizes")) as pool:
        calls = [pool.submit(functools.partial(_listed, store, prefix)) for prefix in prefixes]
        return {info.key: info.n_bytes for call in calls for info in call.result()}


def packs_at_odds(store: Store, files: Iterable[FileEntry]) -> list[Damage]:
    """Packs that are missing, or of another length than a file table says. StoreError."""
    wanted = {file.key: file.n_bytes for file in files}
    sizes = pack_sizes(store, wanted)
    return [
        Damage("pack", key, f"{n_bytes} bytes", f"{sizes[key]} bytes" if key in sizes else "no such object")
        for key, n_bytes in sorted(wanted.items())
        if sizes.get(key) != n_bytes
    ]


def _listed(store: Store, prefix: str) -> list[ObjectInfo]:
    return list(store.list(prefix))
