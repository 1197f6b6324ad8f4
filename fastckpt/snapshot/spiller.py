"""Keeps a ring advancing: writes slabs that the encoder needs last to a local disk, so that other chunks can be copied in their place."""

from __future__ import annotations

from collections.abc import Sequence

from fastckpt._types import U8
from fastckpt.events import logger
from fastckpt.host.threads import start_thread
from fastckpt.snapshot.copier import Copier
from fastckpt.snapshot.progress import Copy, Progress, Stage
from fastckpt.snapshot.ring import Ring
from fastckpt.snapshot.spill import SpillFile


class Spiller:
    """See the module. Writes in a thread of its own, until all copies are given out. If the disk fails, that is logged, and the ring goes
    on without it.
    """

    def __init__(self, file: SpillFile, copies: Sequence[Copy], copier: Copier, ring: Ring, progress: Progress) -> None:
        """file: closed with this object. copies: of all chunks, by number."""
        self._file, self._copies = file, copies
        self._copier, self._ring, self._progress = copier, ring, progress

    def start(self) -> None:
        """Begin, once the first copies have been given out."""
        if not self._copier.is_settled:
            start_thread(self._run, "fastckpt-spill")

    def __contains__(self, copy: Copy) -> bool:
        """Whether a chunk is on the disk, and no longer in memory."""
        return copy.number in self._file

    def read(self, copy: Copy, scratch: U8) -> U8:
        """A chunk's bytes, in `scratch`. SaveError if they differ from what was written."""
        content = scratch[: copy.n_bytes]
        self._file.read(copy.number, content)
        return content

    def close(self) -> None:
        """Close the file. No slab is on its way to it any more."""
        self._file.close()

    def _run(self) -> None:
        changed = self._progress.changed
        while True:
            with changed:
                changed.wait_for(lambda: self._copier.is_settled or self._farthest() is not None)
                found = self._farthest()
                if self._copier.is_settled or found is None:
                    return
                slab, numbers = found
                self._ring.leaving = slab
            written = self._write([self._copies[number] for number in numbers])
            with changed:
                self._ring.leaving = None
                changed.notify_all()
                if not written:
                    return
                self._ring.give_back(slab)
                try:
                    if not self._progress.closed:
                        self._copier.give_out()
                except BaseException as error:
                    self._progress.fail(error)
                    return

    def _farthest(self) -> tuple[int, Sequence[int]] | None:
        """The slab to write next, and its chunks; None while no slab has all its copies made. The caller holds the lock."""
        found = self._ring.farthest(self._copier.upcoming)
        if found is None or any(self._copies[number].stage < Stage.MARKED for number in found[1]):
            return None
        return found

    def _write(self, copies: Sequence[Copy]) -> bool:
        """Write the chunks of one slab. False: the disk accepts no more, or the snapshot has failed."""
        try:
            for copy in copies:
                self._copier.devices.wait(copy)
            self._file.write({copy.number: self._ring.content(copy) for copy in copies})
        except OSError as error:
            logger.warning("spill_dir cannot take more: %s. Training waits for the store instead", error)
            return False
        except BaseException as error:  # an error of the device
            self._progress.fail(error)
            return False
        for copy in copies:
            self._progress.there(copy)
        return True
