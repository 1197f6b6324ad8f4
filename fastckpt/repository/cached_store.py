"""A store whose packs and votes are read from a folder of this machine where they are there, whole.

    vote ─→ folder ─ digest in its name ─┐
    pack ─→ folder ─ crc64nvme of the ───┼─→ caller          not there, or not the same: ─→ the store itself
                     vote's file table ──┘
    everything else: marker, epochs, commits, pins, lists, all writes ─→ the store itself

What lies in the folder is believed no more than what a store gives, and less: a damaged or foreign file there is a warning, and the object
is read from the store. The file tables come from votes that a commit record of the store names, so a folder cannot vouch for itself.
"""

from __future__ import annotations

import threading
from typing import Any

from fastckpt.errors import CheckpointError
from fastckpt.events import logger
from fastckpt.format import keys
from fastckpt.format.digest import crc64nvme_of, digest
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import SaveId, VoteName, vote_key
from fastckpt.format.repository_records import parse_marker
from fastckpt.repository.cache_folder import CacheFolder
from fastckpt.repository.cache_names import CacheNames, rank_of_pack
from fastckpt.repository.node_packs import NodePacks
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.store.wrap import Wrapper


def cached(store: Store, cache_dir: str) -> Store:
    """The store, read through a cache; itself if `cache_dir` is "". The result is closed instead of it."""
    return CachedStore(store, cache_dir) if cache_dir else store


class CachedStore(Wrapper):
    """See the module. Any thread. `inner` is closed with this."""

    def __init__(self, inner: Store, cache_dir: str) -> None:
        super().__init__(inner)
        self._cache = _Cache(inner, cache_dir)

    def share_with_node(self, save: SaveId) -> None:
        """From now on, packs that ranks of this machine have in common are fetched by one of them. save: of the checkpoint."""
        self._cache.share_with_node(save)

    def get(self, key: str) -> bytes:
        vote = keys.parse_vote(key)
        data = None if vote is None else self._cache.vote(key, vote)
        if data is None:
            data = super().get(key)
            self._cache.passed(key, data)
        return data

    def head(self, key: str) -> ObjectInfo:
        vote = keys.parse_vote(key)
        if vote is not None and self._cache.has(key, vote.n_bytes):
            return ObjectInfo(key, vote.n_bytes, 0.0)
        return super().head(key)

    def get_into(self, key: str, offset: int, out: Any) -> None:
        vote = keys.parse_vote(key)
        if vote is not None:
            data = self._cache.vote(key, vote)
            view = memoryview(out).cast("B")
            if data is not None and offset + view.nbytes <= len(data):
                view[:] = data[offset : offset + view.nbytes]
                return
        elif keys.parse_pack(key) is not None and self._cache.read_pack(key, offset, out):
            return
        super().get_into(key, offset, out)

    def doubt(self, key: str) -> bool:
        return self._cache.doubt(key) or super().doubt(key)

    def open_file(self, key: str) -> int:
        fd = self._cache.open_pack(key) if keys.parse_pack(key) is not None else None
        return super().open_file(key) if fd is None else fd


class _Cache:
    """What a `CachedStore` reads instead of its store."""

    def __init__(self, store: Store, cache_dir: str) -> None:
        self._store, self._cache_dir = store, cache_dir
        self._folder: CacheFolder | None = None
        self._unusable = self._told = False
        self._names = CacheNames()
        self._node: NodePacks | None = None
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        """Of each pack that somebody has asked for: it is verified once."""
        self._verdicts: dict[str, bool] = {}
        """Packs that were verified: whether they are what they should be. Of others, False: they will be read from the store."""
        self._doubted: set[str] = set()

    def doubt(self, key: str) -> bool:
        """Read a pack from the store from now on, because it was changed after it was verified. False: it was read there already."""
        with self._lock:
            is_first = self._verdicts.get(key, False)
            if is_first:
                self._verdicts[key] = False
                self._doubted.add(key)
        if is_first and self._folder is not None:
            self._refuse(self._folder, key)
        return key in self._doubted  # another thread may have read it before

    def passed(self, key: str, data: bytes) -> None:
        """Note what an object of the store says, as it was read by somebody."""
        vote, checkpoint = keys.parse_vote(key), keys.parse_commit(key)
        if vote is not None:
            if self._node is not None:
                self._node.leave(key, data)
            self._names.add_vote(vote, data, f"{self._store.url}/{key}")
        elif checkpoint is not None:
            self._names.add_commit(checkpoint, data, f"{self._store.url}/{key}")
        elif key == keys.MARKER:
            self._open_folder(data)

    def has(self, key: str, n_bytes: int) -> bool:
        """Whether there is a file of this length."""
        folder = self._there()
        return folder is not None and folder.size(key) == n_bytes

    def vote(self, key: str, vote: VoteName) -> bytes | None:
        """A vote that is there, and is what its name says."""
        folder = self._there()
        data = None if folder is None else folder.read(key, vote.n_bytes)
        if folder is None or data is None:
            return None
        if digest(data).hex() != vote.digest:
            self._refuse(folder, key)
            return None
        self._names.add_vote(vote, bytes(data), f"{self._store.url}/{key}")
        return bytes(data)

    def read_pack(self, key: str, offset: int, out: Any) -> bool:
        """Fill a buffer from a pack that is there, or that another rank of this machine needs, too. False: the store has to be read."""
        folder = self._there()
        return folder is not None and self._is_whole(folder, key) and folder.read_into(key, offset, out)

    def open_pack(self, key: str) -> int | None:
        """The descriptor of a pack's file; the caller closes it. None: the store has to be asked."""
        folder = self._there()
        return folder.open(key) if folder is not None and self._is_whole(folder, key) else None

    def share_with_node(self, save: SaveId) -> None:
        """See `CachedStore`."""
        self._there()
        if self._folder is None:
            return
        try:
            self._node = NodePacks(self._folder, save)
        except (OSError, CheckpointError) as error:
            logger.warning("ranks of this machine cannot share what they read: %s", error)

    def _there(self) -> CacheFolder | None:
        """The folder, if there is anything of this repository by now."""
        if self._unusable:
            return None
        if self._folder is None:
            try:
                self._open_folder(self._store.get(keys.MARKER))
            except CheckpointError as error:  # whoever needs the marker is told; without it there is no cache
                logger.debug("%s: no cache: %s", self._store.url, error)
        folder = self._folder
        if folder is None or not folder.exists:
            return None
        why = folder.why_not()
        if why is not None:
            self._unusable = True
            logger.warning("%s; everything is read from %s", why, self._store.url)
            return None
        return folder

    def _open_folder(self, marker: bytes) -> None:
        try:
            repository = parse_marker(marker, f"{self._store.url}/{keys.MARKER}").repository
        except CheckpointError as error:
            logger.debug("%s: no cache: %s", self._store.url, error)
            return
        self._folder = CacheFolder(self._cache_dir, repository)

    def _is_whole(self, folder: CacheFolder, key: str) -> bool:
        """Whether a pack is there, and is what the file table says. Reads it whole, once."""
        verdict = self._verdicts.get(key)
        if verdict is not None:
            return verdict
        if folder.size(key) is None and self._node is None:  # it may still come
            return False
        file = self._names.file(key) or self._learned(key)
        node = self._node if self._names.is_shared(key) else None
        if file is None or (node is None and folder.size(key) is None):
            return False
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._verdicts:
                verdict = None
                if folder.size(key) is None and node is not None:
                    verdict = node.bring(file, lambda data: self._store.get_into(key, 0, data))
                self._verdicts[key] = self._verified(folder, file) if verdict is None else verdict
            return self._verdicts[key]

    def _verified(self, folder: CacheFolder, file: FileEntry) -> bool:
        try:
            whole = folder.size(file.key) == file.n_bytes
            if whole and crc64nvme_of(folder.pieces(file.key, file.n_bytes)) == file.crc64nvme:
                self._tell(folder)
                return True
        except OSError as error:
            logger.debug("%s: %s", file.key, error)
        if folder.size(file.key) is not None:  # somebody may have removed it meanwhile
            self._refuse(folder, file.key)
        return False

    def _tell(self, folder: CacheFolder) -> None:
        """Say once that the folder is of use: otherwise nobody would know why a restore was fast, or that it was not."""
        if not self._told:
            self._told = True
            logger.info("packs of %s are read from the cache %s where they are there", self._store.url, folder.root)

    def _learned(self, key: str) -> FileEntry | None:
        """What the votes in the folder say of a pack, those that a commit record names: another rank of this node may have read the votes
        that this one uses.
        """
        for vote in self._names.unread(rank_of_pack(key)):
            self.vote(vote_key(vote), vote)
        return self._names.file(key)

    def _refuse(self, folder: CacheFolder, key: str) -> None:
        folder.remove(key)
        logger.warning(
            "%s in the cache %s is damaged, or of something else: it was removed, and is read from %s",
            key,
            folder.root,
            self._store.url,
        )


__all__ = ["CachedStore", "cached"]
