"""What the next save of a Checkpointer may refer to: the newest checkpoint that it has made or restored, and its bytes in memory.

    save acknowledged ─ committed() ─┐
    checkpoint restored ─ restored() ─┴─→ newest ─→ the next upload, whenever that begins
    restore, SupersededError, close ─ drop() ─→ None: the next save is whole by itself

A save that failed changes nothing here: the next one is written against the same checkpoint as it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from fastckpt import events
from fastckpt.events import logger
from fastckpt.format.repository_records import Commit, Parent
from fastckpt.format.sealed_state import SealedState
from fastckpt.snapshot import ChunkPrints, KnownPrints
from fastckpt.snapshot.base_slabs import BaseSlabs
from fastckpt.training.worth import Worth
from fastckpt.writing.bases import Base, Uploaded


class Bases:
    """See the module. Any thread."""

    def __init__(self, target: str, *, wanted: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """target: for events. wanted: False keeps nothing, ever. clock: that of `Base.seen_s`."""
        self._target, self._wanted, self._clock = target, wanted, clock
        self._lock = threading.Lock()
        self._newest: Base | None = None
        self._memory: BaseSlabs | None = None
        """That of `newest`."""
        self._prints: KnownPrints | None = None
        """Those of `newest`."""
        self._told = False
        self._worth = Worth()

    @property
    def newest(self) -> Base | None:
        """What a save that begins now is written against; None: nothing."""
        return self._newest

    @property
    def memory(self) -> BaseSlabs | None:
        """What is kept of its bytes. None: nothing, or not yet."""
        return self._memory

    @property
    def prints(self) -> KnownPrints | None:
        """The fingerprints of its chunks on devices. None: there are none, or not yet."""
        return self._prints

    def committed(
        self,
        commit: Commit,
        sealed: SealedState,
        uploaded: Uploaded | None,
        memory: BaseSlabs | None,
        prints: ChunkPrints | None = None,
    ) -> None:
        """A save was acknowledged. uploaded: None if it is not this process's part that was committed. memory: its bytes. prints: their
        fingerprints.
        """
        base = None
        if uploaded is not None:
            base = uploaded.as_base(sealed, Parent(commit.checkpoint, commit.digest), memory, self._clock())
            if memory is not None:
                self._worth.learn(memory.roles, uploaded.saved)
                memory.sort(self._worth.of)
        self._set(base, memory, prints)

    def restored(self, base: Base | None, memory: BaseSlabs | None = None) -> None:
        """A checkpoint was restored. memory: its bytes, which must be what the checkpoint has."""
        self._set(base, memory)

    def complete(self, base: Base, memory: BaseSlabs, prints: ChunkPrints | None = None) -> None:
        """The bytes of a base, and their fingerprints, have come. They are dropped if it is not the newest any more."""
        with self._lock:
            if self._newest is base and not memory.is_dropped:
                self._newest, self._memory = replace(base, memory=memory), memory
                self._prints = _known(base, prints)
                return
        memory.drop()

    def drop(self, *, for_good: bool = False) -> None:
        """Keep nothing of what there was. for_good: nor of what may still come."""
        if for_good:
            self._wanted = False
        self._set(None, None)

    def _set(self, base: Base | None, memory: BaseSlabs | None, prints: ChunkPrints | None = None) -> None:
        if not self._wanted or base is None:
            base, kept = None, None
        else:
            kept = memory
        known = None if base is None else _known(base, prints)
        with self._lock:
            before, self._newest, self._memory, self._prints = self._memory, base, kept, known
        for old in (before, memory):
            if old is not None and old is not kept:
                old.drop()

    def tell_of_lost_memory(self, step: int, base: Base) -> None:
        """Report, as a save begins, what of its base's bytes is not in memory."""
        held = base.memory
        n_bytes = sum(chunk.n_bytes for chunk in base.chunks)
        lacking = n_bytes if held is None else held.evicted_bytes if isinstance(held, BaseSlabs) else 0
        if not lacking:
            return
        why = (
            "the snapshot before this one was not kept"
            if held is None
            else "host_budget_bytes has no room for a whole snapshot beside the one before it"
        )
        events.emit(events.BaseIncomplete(target=self._target, step=step, lacking_bytes=min(lacking, n_bytes), why=why))
        if not self._told:
            self._told = True
            logger.info(
                "step %d: %d bytes of the checkpoint before it are not in memory (%s): what has changed of them is stored whole, not as a "
                "difference. This is told once",
                step,
                min(lacking, n_bytes),
                why,
            )


def _known(base: Base, prints: ChunkPrints | None) -> KnownPrints | None:
    """Fingerprints, with the digests of the rows whose bytes they stand for."""
    if prints is None:
        return None
    digests: list[bytes | None] = [None] * len(base.chunks)
    for number in prints.fingerprints:
        place = base.places[number]
        if place is not None and not place.start:
            row = base.records[place.row]
            if int(row["raw_bytes"]) == base.chunks[number].n_bytes:
                digests[number] = row["digest"].tobytes()
    return KnownPrints(prints, digests)


__all__ = ["Bases"]
