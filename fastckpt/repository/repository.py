"""A repository: its marker, its epochs, and its commits. Only `claim`, `initialise`, `probe` and the methods for the marker write.

Every method may be called from several threads. Errors: StoreError's subclasses, CorruptCheckpointError, UnsupportedFormatError,
RepositoryError.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import NoReturn

from fastckpt.errors import ObjectNotFoundError, RepositoryError
from fastckpt.format import keys
from fastckpt.format.keys import epoch_key
from fastckpt.format.repository_records import (
    Epoch,
    Marker,
    Origin,
    Parent,
    Skipped,
    epoch_bytes,
    marker_bytes,
    parse_marker,
    utc_now,
    writer,
)
from fastckpt.host.files import NoAtomicCreateError
from fastckpt.repository.commit import create, read_again, read_sealed
from fastckpt.repository.inventory import take_inventory
from fastckpt.repository.record_reader import RecordReader
from fastckpt.store.base import Store
from fastckpt.store.findings import refusals
from fastckpt.store.probe import look

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


class Repository(RecordReader):
    """A repository in a store. Does not own the store."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._probed = False
        self.marker_bytes: bytes | None = None
        """The marker as it was read or made here. A running job puts it back if a lifecycle rule deletes it."""

    def marker(self) -> Marker | None:
        """The marker, or None: nothing was ever saved here."""

        def read() -> tuple[Marker, bytes]:
            data = read_sealed(self.store, keys.MARKER)
            return parse_marker(data, f"{self.url}/{keys.MARKER}"), data

        try:
            marker, self.marker_bytes = read_again(read)
        except ObjectNotFoundError:
            return None
        return marker

    def require(self) -> Marker | None:
        """The marker; None if the marker is gone but the repository's other objects are there. RepositoryError if this is no repository."""
        marker, has_records = self._look()
        if marker is None and not has_records:
            raise RepositoryError(
                f"{self.url} is no fastckpt repository: there is no {keys.MARKER}. Check the URL; a Checkpointer makes one "
                "with its first save"
            )
        return marker

    def _look(self) -> tuple[Marker | None, bool]:
        """The marker, and whether there is any record. A missing marker is looked for again if there are records: another process may have
        begun the repository between the two requests.
        """
        marker = self.marker()
        if marker is not None:
            return marker, True
        has_records = any(True for prefix in (keys.COMMITS, keys.EPOCHS) for _ in self.store.list(prefix))
        return (self.marker() if has_records else None), has_records

    def initialise(self, writers: int = 1) -> Marker:
        """The marker, made if there is none. RepositoryError if the store cannot keep G1 for so many processes that write.

        The store is probed first, once: of two calls of `put_if_absent`, the second must fail. An existing repository is probed, too: it
        may have been moved to another store, or the bucket's settings may have changed.
        """
        if writers > 1 and self.store.one_writer is not None:
            raise RepositoryError(
                f"{self.url}: {self.store.one_writer}. So one process may write here, and {writers} want to. Use another store; or, if "
                "`fastckpt probe` shows atomic creates, open_store(…, many_writers=True)"
            )
        marker, has_records = self._look()
        if marker is None and has_records:
            self._refuse_markerless()
        if not self._probed:
            self.probe()
            self._probed = True
        return marker or self.make_marker()

    def make_marker(self, origin: Origin | None = None) -> Marker:
        """Make the marker, unless there is one. Returns the marker that is there now, ours or that of somebody else.

        origin: the repository that this one will be a copy of.
        """
        mine = marker_bytes(Marker(secrets.token_hex(16), utc_now(), writer(), origin))
        there = create(self.store, keys.MARKER, mine)
        if there == mine:
            self.store.put(keys.README, _README.encode())
        else:  # a bit may have flipped on the way
            there = read_sealed(self.store, keys.MARKER)
        self.marker_bytes = there
        return parse_marker(there, f"{self.url}/{keys.MARKER}")

    def put_back_marker(self) -> bool:
        """Put the first marker back: none was found. False: there is another one now."""
        mine = self.marker_bytes
        return mine is None or create(self.store, keys.MARKER, mine) == mine

    def _refuse_markerless(self) -> NoReturn:
        raise RepositoryError(
            f"{self.url} has {keys.COMMITS} or {keys.EPOCHS} but no {keys.MARKER}: it was a repository and its marker is gone. Did a "
            "lifecycle rule of the bucket delete by age? Switch it off; then `fastckpt check --repair` makes a new marker"
        )

    def probe(self) -> None:
        """Raise unless `put_if_absent` refuses to replace an object, and a new object can be listed and read at once."""
        found = look(self.store)
        why = refusals(found)
        if found.create_error is not None and isinstance(found.create_error.__cause__, NoAtomicCreateError):
            raise found.create_error  # it says what this file system lacks
        if why:
            raise RepositoryError(
                f"{self.url} cannot hold a repository: {'; '.join(why)}. Use a store with conditional writes (docs/stores.md); `fastckpt "
                "probe` shows what this one does. fastckpt.save and load need none"
            )

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
        """Claim the next epoch number. Each of several claimants gets its own number. above: the claimant's last number."""
        number = max(above, _highest_number(self.store)) + 1
        nonce = secrets.token_hex(16)
        while number <= keys.MAX_EPOCH:
            epoch = Epoch(number, parent, fresh, rewind, tuple(skipped), world, nonce, utc_now(), writer())
            mine = epoch_bytes(epoch)
            if create(self.store, epoch_key(number), mine) == mine:
                return epoch
            number += 1
        raise RepositoryError(f"{self.url}: all {keys.MAX_EPOCH} epochs are used up. Start a new repository")


def is_there(store: Store, key: str, mine: bytes) -> bool | None:
    """Whether an object has these bytes. None: there is no object. False: it has other bytes, twice read: a job should not be stopped by a
    bit that flipped on the way.
    """
    found = bytearray(len(mine))
    for _ in range(2):
        try:
            store.get_into(
                key, 0, found
            )  # reads as many bytes as expected: one request, whatever the object's length is
        except EOFError:
            return False
        except ObjectNotFoundError:
            return None
        if bytes(found) == mine:
            return True
    return False


def _highest_number(store: Store) -> int:
    """The highest epoch number in any key ever written there: an epoch's own record may have been deleted by age."""
    found = take_inventory(store, keys.DATA, keys.VOTES, keys.EPOCHS, keys.COMMITS)
    saves = (*found.packs, *found.votes)
    numbers = (*found.epochs, *(c.epoch for c in found.commits), *(save.epoch for save in saves))
    return max(numbers, default=0)
