"""A repository: its marker, its epochs, and what is committed in it. Reading here changes nothing; `claim` and `initialise` write.

Every method may be called from several threads. Errors: StoreError's subclasses, CorruptCheckpointError, UnsupportedFormatError,
RepositoryError.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fastckpt.errors import CheckpointError, ObjectNotFoundError, RepositoryError, StoreError
from fastckpt.format import keys
from fastckpt.format.keys import CheckpointId, commit_key, epoch_key
from fastckpt.format.repository_records import (
    Commit,
    Epoch,
    Marker,
    Parent,
    Pin,
    Skipped,
    Tombstone,
    epoch_bytes,
    marker_bytes,
    parse_epoch_record,
    parse_marker,
    parse_pin,
    utc_now,
    writer,
)
from fastckpt.repository.commit import create, read_commit, read_sealed
from fastckpt.store.base import ObjectInfo, Store

_README = """This is a fastckpt repository: the checkpoints of a training run.

  fastckpt ls URL        what is here
  fastckpt check URL     read and verify everything
  fastckpt prune URL     remove checkpoints that are no longer wanted (shows its plan first)

commits/   one small file for each checkpoint: it exists exactly as long as this file does
votes/     the index of each rank, named in the commit
data/      the bytes; checkpoints may share them
epochs/    one small file for each time the job was started or restored
pins/      checkpoints that are being read

Do not delete, move or change anything here by hand, and set no lifecycle rule that deletes or archives objects by age: old files in data/
can belong to the newest checkpoint. A rule that aborts incomplete multipart uploads, or one that expires *noncurrent versions*, is safe.
"""
_PROBE = "probe/"


@dataclass(frozen=True)
class Listing:
    """Names of what a repository holds: one LIST of epochs/ and one of commits/, and no object read."""

    epochs: tuple[int, ...]
    """Ascending."""
    commits: tuple[CheckpointId, ...]
    """Ascending; tombstones too."""
    modified_s: Mapping[CheckpointId, float] = field(default_factory=dict)
    infos: dict[str, ObjectInfo] = field(default_factory=dict)
    """By key, of all of them."""


class AllCommits(NamedTuple):
    """What stands at every commit key."""

    commits: dict[CheckpointId, Commit]
    tombstones: dict[CheckpointId, Tombstone]
    failed: dict[CheckpointId, CheckpointError]
    """Could not be read, and why."""
    missing: set[CheckpointId]
    """Gone since the LIST."""


class Repository:
    """A repository in a store. Does not own the store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._probed = False
        self._marker_bytes: bytes | None = None
        """As it was read or made here: what a running job puts back if a lifecycle rule takes it."""

    @property
    def url(self) -> str:
        return self.store.url

    def marker(self) -> Marker | None:
        """The marker, or None: nothing was ever saved here."""
        try:
            data = read_sealed(self.store, keys.MARKER)
        except ObjectNotFoundError:
            return None
        marker = parse_marker(data, f"{self.url}/{keys.MARKER}")
        self._marker_bytes = data
        return marker

    def require(self) -> Marker | None:
        """The marker; None where it is gone, but what it stands for is there. RepositoryError if this is no repository."""
        marker = self.marker()
        if marker is None and not self._has_records():
            raise RepositoryError(
                f"{self.url} is no fastckpt repository: there is no {keys.MARKER}. Check the URL; a Checkpointer makes one "
                "with its first save"
            )
        return marker

    def _has_records(self) -> bool:
        return any(True for prefix in (keys.COMMITS, keys.EPOCHS) for _ in self.store.list(prefix))

    def initialise(self) -> Marker:
        """The marker, made if there is none. RepositoryError if the store cannot keep G1.

        The store is probed first, once: `put_if_absent` twice, of which one must fail. Of a repository that is there already too: it may
        have been moved to another store, or the bucket's settings changed.
        """
        marker = self.marker()
        if marker is None:
            self._refuse_markerless()
        if not self._probed:
            self.probe()
            self._probed = True
        return marker or self.make_marker()

    def make_marker(self) -> Marker:
        """The marker that is there now, ours or somebody else's."""
        mine = marker_bytes(Marker(secrets.token_hex(16), utc_now(), writer()))
        there = create(self.store, keys.MARKER, mine)
        if there == mine:
            self.store.put(keys.README, _README.encode())
        self._marker_bytes = there
        return parse_marker(there, f"{self.url}/{keys.MARKER}")

    def put_back_marker(self) -> bool:
        """Whether the marker that was read at first is there, or is put back now. False: another one is."""
        mine = self._marker_bytes
        return mine is None or stands(self.store, keys.MARKER, mine)

    def _refuse_markerless(self) -> None:
        if self._has_records():
            raise RepositoryError(
                f"{self.url} has {keys.COMMITS} or {keys.EPOCHS} but no {keys.MARKER}: it was a repository and its marker is gone. Did a "
                "lifecycle rule of the bucket delete by age? Switch it off; then `fastckpt check --repair` makes a new marker"
            )

    def probe(self) -> None:
        """RepositoryError unless `put_if_absent` refuses an object that is there, and a put can be listed and read at once."""
        place = f"{_PROBE}{secrets.token_hex(8)}/"
        key = f"{place}object"
        first, second = b"first " + key.encode(), b"second " + key.encode()
        try:
            there = create(self.store, key, first), create(self.store, key, second)
            listed = [info.key for info in self.store.list(place)]
            if there != (first, first) or key not in listed:
                raise RepositoryError(
                    f"{self.url}: this store overwrites where it was asked to create, or does not list what was written: two "
                    "processes could destroy each other's checkpoints. Use a store with conditional writes (docs/stores.md)"
                )
        finally:
            with contextlib.suppress(
                StoreError
            ):  # who may not delete leaves some 40 bytes: a writer does not need the right
                self.store.delete(key)

    def list(self) -> Listing:
        """What is there, by name."""
        epochs = {n: info for info in self.store.list(keys.EPOCHS) if (n := keys.parse_epoch(info.key)) is not None}
        found = {c: info for info in self.store.list(keys.COMMITS) if (c := keys.parse_commit(info.key)) is not None}
        modified_s = {c: info.modified_s for c, info in found.items()}
        infos = {info.key: info for info in (*epochs.values(), *found.values())}
        return Listing(tuple(sorted(epochs)), tuple(sorted(found)), modified_s, infos)

    def newest_epoch(self) -> int:
        """The highest claimed number; 0 if there is none."""
        return max(
            (n for info in self.store.list(keys.EPOCHS) if (n := keys.parse_epoch(info.key)) is not None), default=0
        )

    def _highest_number(self) -> int:
        """Of anything that was ever written here: an epoch's record may have been deleted by age."""
        saves = [keys.parse_pack(info.key) for info in self.store.list(keys.DATA)]
        saves += [vote.save for info in self.store.list(keys.VOTES) if (vote := keys.parse_vote(info.key)) is not None]
        listing = self.list()
        numbers = (
            *listing.epochs,
            *(c.epoch for c in listing.commits),
            *(save.epoch for save in saves if save is not None),
        )
        return max(numbers, default=0)

    def epoch(self, number: int) -> Epoch:
        """An epoch record."""
        key = epoch_key(number)
        return parse_epoch_record(read_sealed(self.store, key, self._listed(key)), number, f"{self.url}/{key}")

    def commit(self, checkpoint: CheckpointId) -> Commit | Tombstone:
        """What stands at a commit key."""
        return read_commit(self.store, checkpoint, self._listed(commit_key(checkpoint)))

    def _listed(self, key: str) -> ObjectInfo | None:
        """What is known of an object without asking. Nothing, here: a plain repository remembers no names."""
        return None

    def pins(self) -> dict[str, ObjectInfo]:
        """Names of pins, by a LIST."""
        infos = {keys.parse_pin(info.key): info for info in self.store.list(keys.PINS)}
        return {name: info for name, info in infos.items() if name is not None}

    def pin(self, name: str) -> Pin:
        """A pin. ObjectNotFoundError."""
        key = keys.pin_key(name)
        return parse_pin(read_sealed(self.store, key, self._listed(key)), f"{self.url}/{key}")

    def read_all(self, listing: Listing) -> AllCommits:
        """All commit records, all tombstones, and what could not be read, with its error."""
        commits: dict[CheckpointId, Commit] = {}
        tombstones: dict[CheckpointId, Tombstone] = {}
        failed: dict[CheckpointId, CheckpointError] = {}
        missing: set[CheckpointId] = set()
        for checkpoint in listing.commits:
            try:
                found = self.commit(checkpoint)
            except ObjectNotFoundError:  # a tombstone, if all is well
                missing.add(checkpoint)
                continue
            except StoreError:
                raise
            except CheckpointError as error:
                failed[checkpoint] = error
                continue
            if isinstance(found, Commit):
                commits[checkpoint] = found
            else:
                tombstones[checkpoint] = found
        return AllCommits(commits, tombstones, failed, missing)

    def claim(
        self,
        parent: Parent | None,
        *,
        fresh: bool = False,
        rewind: bool = False,
        skipped: Iterable[Skipped] = (),
        world: int = 1,
        above: int = 0,
    ) -> Epoch:
        """Claim the next epoch number. Of several claimants each gets a number of its own. above: the claimant's last one."""
        number = max(above, self._highest_number()) + 1
        nonce = secrets.token_hex(16)
        while number <= keys.MAX_EPOCH:
            epoch = Epoch(number, parent, fresh, rewind, tuple(skipped), world, nonce, utc_now(), writer())
            mine = epoch_bytes(epoch)
            if create(self.store, epoch_key(number), mine) == mine:
                return epoch
            number += 1
        raise RepositoryError(f"{self.url}: all {keys.MAX_EPOCH} epochs are used up. Start a new repository")

    def location(self, checkpoint: CheckpointId) -> str:
        """For messages: where the commit record of a checkpoint is."""
        return f"{self.url}/{commit_key(checkpoint)}"


def stands(store: Store, key: str, mine: bytes) -> bool:
    """Whether an object has these bytes, or has been put back with them as there was none. False: it has others."""
    found = bytearray(len(mine))
    try:
        store.get_into(key, 0, found)  # as much as there should be: one request, whatever lies there
    except EOFError:
        return False
    except ObjectNotFoundError:
        return create(store, key, mine) == mine
    return bytes(found) == mine
