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
from fastckpt.format.digest import crc64nvme, digest
from fastckpt.format.directory import FileEntry
from fastckpt.format.keys import CheckpointId, VoteName, vote_key
from fastckpt.format.repository_records import Commit, parse_commit_record, parse_marker
from fastckpt.repository.cache_folder import CacheFolder
from fastckpt.repository.file_tables import file_table
from fastckpt.store.base import ObjectInfo, Store
from fastckpt.store.wrap import Wrapper

_VERIFIED_AT_ONCE = 2
"""Packs that are in memory whole while they are verified: 32 MiB each."""
_VOTES = 1024
"""Votes whose file tables are remembered: those of the checkpoint that is restored, whatever is saved beside it."""


def cached(store: Store, cache_dir: str) -> Store:
    """The store, read through a cache; itself if `cache_dir` is "". The result is closed instead of it."""
    return CachedStore(store, cache_dir) if cache_dir else store


class CachedStore(Wrapper):
    """See the module. Any thread. `inner` is closed with this."""

    def __init__(self, inner: Store, cache_dir: str) -> None:
        super().__init__(inner)
        self._cache_dir = cache_dir
        self._folder: CacheFolder | None = None
        self._unusable = False
        self._named = _Named()
        self._lock = threading.Lock()
        self._at_once = threading.BoundedSemaphore(_VERIFIED_AT_ONCE)
        self._locks: dict[str, threading.Lock] = {}
        """Of each pack that somebody has asked for: it is verified once."""
        self._verdicts: dict[str, bool] = {}
        """Packs that were verified: whether they are what they should be."""

    # -- what passes -----------------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        vote = keys.parse_vote(key)
        if vote is not None:
            data = self._vote(key, vote)
            if data is None:
                data = super().get(key)
            self._named.add_vote(vote, data, f"{self.url}/{key}")
            return data
        data = super().get(key)
        checkpoint = keys.parse_commit(key)
        if checkpoint is not None:
            self._named.add_commit(checkpoint, data, f"{self.url}/{key}")
        elif key == keys.MARKER:
            self._open_folder(data)
        return data

    def head(self, key: str) -> ObjectInfo:
        vote = keys.parse_vote(key)
        folder = self._there() if vote is not None else None
        if vote is not None and folder is not None and folder.size(key) == vote.n_bytes:
            return ObjectInfo(key, vote.n_bytes, 0.0)
        return super().head(key)

    def get_into(self, key: str, offset: int, out: Any) -> None:
        vote = keys.parse_vote(key)
        if vote is not None:
            data = self._vote(key, vote)
            view = memoryview(out).cast("B")
            if data is not None and offset + view.nbytes <= len(data):
                view[:] = data[offset : offset + view.nbytes]
                return
        elif keys.parse_pack(key) is not None:
            folder = self._there()
            if folder is not None and self._is_whole(folder, key) and folder.read_into(key, offset, out):
                return
        super().get_into(key, offset, out)

    # -- the folder ------------------------------------------------------------------------------------------------------

    def _there(self) -> CacheFolder | None:
        """The folder, if there is anything of this repository by now."""
        if self._unusable:
            return None
        if self._folder is None:
            try:
                self._open_folder(self.inner.get(keys.MARKER))
            except CheckpointError as error:  # whoever needs the marker is told; without it there is no cache
                logger.debug("%s: no cache: %s", self.url, error)
        folder = self._folder
        if folder is None or not folder.exists:
            return None
        why = folder.why_not()
        if why is not None:
            self._unusable = True
            logger.warning("%s; everything is read from %s", why, self.url)
            return None
        return folder

    def _open_folder(self, marker: bytes) -> None:
        try:
            repository = parse_marker(marker, f"{self.url}/{keys.MARKER}").repository
        except CheckpointError as error:
            logger.debug("%s: no cache: %s", self.url, error)
            return
        self._folder = CacheFolder(self._cache_dir, repository)

    def _vote(self, key: str, vote: VoteName) -> bytes | None:
        folder = self._there()
        data = None if folder is None else folder.read(key, vote.n_bytes)
        if folder is None or data is None:
            return None
        if digest(data).hex() != vote.digest:
            _refuse(folder, key, self.url)
            return None
        return bytes(data)

    def _is_whole(self, folder: CacheFolder, key: str) -> bool:
        """Whether a pack is there, and is what the file table says. Reads it whole, once."""
        verdict = self._verdicts.get(key)
        if verdict is not None:
            return verdict
        n_bytes = folder.size(key)
        if n_bytes is None:  # it may still come
            return False
        file = self._named.file(key) or self._learned(folder, key)
        if file is None:
            return False
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock, self._at_once:
            verdict = self._verdicts.get(key)
            if verdict is None:
                data = folder.read(key, file.n_bytes)
                verdict = data is not None and crc64nvme(data) == file.crc64nvme
                self._verdicts[key] = verdict
                if not verdict:
                    _refuse(folder, key, self.url)
        return verdict

    def _learned(self, folder: CacheFolder, key: str) -> FileEntry | None:
        """What the votes in the folder say of a pack, those that a commit record names: another rank of this node may have read the votes
        that this one uses.
        """
        for vote in self._named.unread():
            data = self._vote(vote_key(vote), vote)
            if data is not None:
                self._named.add_vote(vote, data, f"{self.url}/{vote_key(vote)}")
        return self._named.file(key)


def _refuse(folder: CacheFolder, key: str, url: str) -> None:
    """Remove what is not what it should be, and tell."""
    folder.remove(key)
    logger.warning(
        "%s in the cache %s is damaged, or of something else: it was removed, and is read from %s",
        key,
        folder.root,
        url,
    )


class _Named:
    """What commit records that came from the store name. Any thread. Forgets the oldest: a run commits for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._votes: dict[VoteName, dict[str, FileEntry] | None] = {}
        """Packs that each vote names; None: the vote was not looked for yet."""

    def add_commit(self, checkpoint: CheckpointId, data: bytes, source: str) -> None:
        """Note the votes of a commit record, as it was read; a tombstone has none."""
        try:
            commit = parse_commit_record(data, checkpoint, source)
        except CheckpointError:  # whoever reads it is told
            return
        if isinstance(commit, Commit):
            with self._lock:
                for rank in range(commit.world):
                    self._votes.setdefault(commit.vote(rank), None)
                self._forget(max(_VOTES, commit.world))

    def add_vote(self, vote: VoteName, data: bytes, source: str) -> None:
        """Note the file table of a vote whose name somebody has from a commit record."""
        if digest(data).hex() != vote.digest:
            return
        try:
            files = {file.key: file for file in file_table(data, source)}
        except CheckpointError:  # whoever reads it is told
            files = {}
        with self._lock:
            self._votes[vote] = files
            self._forget(max(_VOTES, vote.world))

    def _forget(self, most: int) -> None:
        for vote in list(self._votes)[: max(0, len(self._votes) - most)]:
            del self._votes[vote]

    def unread(self) -> list[VoteName]:
        """Votes that were not read yet, each given once."""
        with self._lock:
            found = [vote for vote, files in self._votes.items() if files is None]
            self._votes |= {vote: {} for vote in found}
        return found

    def file(self, key: str) -> FileEntry | None:
        """A pack's length and checksum, as far as known."""
        with self._lock:
            return next((files[key] for files in self._votes.values() if files and key in files), None)


__all__ = ["CachedStore", "cached"]
