"""One save against its base, chunk by chunk: named again, stored as a difference, or in full.

    known on the device ──────────────────────────────┐
    the base's bytes in memory: equal ────────────────┼─→ the base's row again: nothing is stored
    no bytes: equal digest ───────────────────────────┘
    changed, the base's bytes in memory, allowed ───────→ encoded with the base, if the sample says that it pays
    all else ───────────────────────────────────────────→ in full

What is allowed is `delta_policy`'s.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from typing import NamedTuple

import numpy as np

from fastckpt import codec
from fastckpt._types import U8
from fastckpt.errors import SaveError
from fastckpt.events import logger
from fastckpt.format.sealed_state import SealedState
from fastckpt.kernels import kernels
from fastckpt.kernels.checksums import digest
from fastckpt.kernels.transform import HAS_BASE
from fastckpt.writing.bases import Base, Place
from fastckpt.writing.chains import work_of
from fastckpt.writing.delta_policy import LEAST_GAIN, Balance, plan, scouts
from fastckpt.writing.foresight import foresee
from fastckpt.writing.index_rows import Kind
from fastckpt.writing.matching import match


class Kept(NamedTuple):
    """A chunk that equals the base's: nothing of it is stored."""

    kind: Kind
    """COPIED, or BASED: a REF to bytes that are not one whole row."""
    place: Place
    digest: bytes


class Against(NamedTuple):
    """A chunk that was encoded."""

    encoded: codec.Encoded
    place: Place | None
    """Its base; None: it is stored in full."""


class Deltas:
    """See the module. Any thread; each chunk by one."""

    def __init__(self, base: Base, sealed: SealedState, rank: int, read_amplification: float) -> None:
        """read_amplification: see `Options`."""
        self._base, self._chunks = base, sealed.chunks
        self._chunk_of = match(base, sealed, rank).tolist()
        places = [base.places[number] if number >= 0 else None for number in self._chunk_of]
        lanes = [chunk.element.float_lane_bytes for chunk in sealed.chunks]
        aligned = [
            bool(lane) and (place is None or not place.start % lane) for lane, place in zip(lanes, places, strict=True)
        ]
        seen = foresee(base, sealed, places, np.array(aligned, bool), base.memory is not None)
        self._places, self._is_same = places, seen.is_same.tolist()
        self._balance = Balance(plan(seen.known, seen.packs, read_amplification))
        self._lock = threading.Lock()
        self.chunks: Counter[str] = Counter()
        """How many chunks became what: equal, difference, full."""
        self.raw_bytes: Counter[str] = Counter()
        self.saved: dict[int, float] = {}
        """See `Uploaded`. What equals the base is found by its digest, too: bytes in memory save nothing of it."""
        self.scouts = scouts(seen.known)
        """Chunks that are best encoded first."""
        self.expected_bytes: list[int] = np.minimum(seen.known.delta_bytes, seen.known.raw_bytes).astype(int).tolist()
        """Of each chunk the bytes that it is likely to store."""

    def keep_known(self, number: int, found: bytes) -> Kept:
        """A chunk of which the device says that it equals the base's. SaveError if the base has other bytes there.

        found: the digest that the source gave.
        """
        place = self._places[number]
        if place is None or self._digest(number, place) != found:
            raise SaveError(
                f"chunk {number} was not copied, because it was found to equal step {self._base.parent.checkpoint.step}, which has other "
                "bytes there. Nothing was committed. This is a fault of fastckpt: please report it"
            )
        with self._lock:
            self._count(number, "equal")
            self._balance.is_kept(number, 0, 0)
        return Kept(Kind.COPIED, place, found)

    def is_cast(self, number: int) -> None:
        """Nothing is stored of a chunk, and nothing is needed of the base."""
        with self._lock:
            self._balance.is_full(number, 0)

    def encode(self, number: int, raw: U8, out: U8, effort: codec.Effort) -> Against | Kept:
        """Encode a chunk, or find that the base has it. The outcome counts against what is allowed for the others.

        out: where stored bytes go, as in `codec.encode_into`.
        """
        place = self._places[number]
        if place is None:
            return self._full(number, raw, out, effort)
        with self._lent(number) as old:
            if old is not None:
                return self._compared(number, place, raw, old, out, effort)
        return self._digested(number, place, raw, out, effort)

    def _compared(self, number: int, place: Place, raw: U8, old: U8, out: U8, effort: codec.Effort) -> Against | Kept:
        """With the base's bytes."""
        is_equal = kernels(raw.size).equal(raw, old)
        if not is_equal and (effort == codec.Effort.NONE or not self._may_differ(number)):
            return self._full(number, raw, out, effort)
        theirs = self._digest(number, place)
        known = self._base.digests.get(self._chunk_of[number]) if theirs is None else theirs
        if known is None and not is_equal:
            return self._full(number, raw, out, effort)
        if known is not None and digest(old) != known:  # a bit of that memory has flipped: nothing may be built on it
            logger.warning(
                "what memory keeps of chunk %d of step %d has changed", number, self._base.parent.checkpoint.step
            )
            return self._full(number, raw, out, effort)
        if is_equal:
            return self._keep(number, place, raw, theirs) or self._full(number, raw, out, effort)
        element = self._chunks[number].element
        found = codec.encode_into(
            raw,
            element.const_lane_bytes,
            element.float_lane_bytes,
            out,
            effort=effort,
            base=old,
            min_gain=LEAST_GAIN,
        )
        if found.transform not in HAS_BASE:
            self._settle_full(number, found, tried=True)
            return Against(found, None)
        if self._is_allowed(number, found):
            return Against(found, place)
        return self._full(number, raw, out, effort)

    def _digested(self, number: int, place: Place, raw: U8, out: U8, effort: codec.Effort) -> Against | Kept:
        """Without the base's bytes: digest first where the chunk is likely to be equal."""
        theirs = self._digest(number, place)
        if theirs is not None and self._is_same[number] and digest(raw) == theirs:
            kept = self._keep(number, place, raw, theirs)
            if kept is not None:
                return kept
        element = self._chunks[number].element
        found = codec.encode_into(raw, element.const_lane_bytes, element.float_lane_bytes, out, effort=effort)
        if theirs == found.digest and len(found.stored):
            kept = self._keep(number, place, raw, theirs)
            if kept is not None:
                return kept
        self._settle_full(number, found)
        return Against(found, None)

    def _full(self, number: int, raw: U8, out: U8, effort: codec.Effort) -> Against:
        element = self._chunks[number].element
        found = codec.encode_into(raw, element.const_lane_bytes, element.float_lane_bytes, out, effort=effort)
        self._settle_full(number, found)
        return Against(found, None)

    # -- what is allowed -----------------------------------------------------------------------------------------------

    def _may_differ(self, number: int) -> bool:
        with self._lock:
            return self._balance.may_differ(number)

    def _keep(self, number: int, place: Place, raw: U8, found: bytes | None) -> Kept | None:
        """The base's bytes again, if that is allowed. found: the digest of its row, if they are one whole row."""
        with self._lock:
            if not self._balance.fits(number, 0, 0):
                return None
            self._balance.is_kept(number, 0, 0)
            self.saved[number] = 0.0
            self._count(number, "equal")
        return Kept(Kind.BASED, place, digest(raw)) if found is None else Kept(Kind.COPIED, place, found)

    def _is_allowed(self, number: int, found: codec.Encoded) -> bool:
        """Whether a difference that was made may be stored."""
        n_bytes, work = len(found.stored), work_of(found.transform, found.lane_bytes, self._chunks[number].n_bytes)
        with self._lock:
            self._tried(number, n_bytes)
            if not self._balance.fits(number, n_bytes, work):
                return False
            self._balance.is_kept(number, n_bytes, work)
            self._count(number, "difference")
        return True

    def _settle_full(self, number: int, found: codec.Encoded, *, tried: bool = False) -> None:
        with self._lock:
            if tried:
                self._tried(number, None)
            self._balance.is_full(number, len(found.stored))
            self._count(number, "full")

    def _tried(self, number: int, stored_bytes: int | None) -> None:
        """What a difference took; None: it does not pay."""
        self._balance.tried(number, stored_bytes)
        full_bytes = max(float(self._balance.plan.known.full_bytes[number]), 1.0)
        self.saved[number] = 0.0 if stored_bytes is None else max(0.0, 1 - stored_bytes / full_bytes)

    def _count(self, number: int, what: str) -> None:
        self.chunks[what] += 1
        self.raw_bytes[what] += self._chunks[number].n_bytes

    # -- the base ------------------------------------------------------------------------------------------------------

    def _lent(self, number: int) -> contextlib.AbstractContextManager[U8 | None]:
        memory = self._base.memory
        return contextlib.nullcontext() if memory is None else memory.lend(self._chunk_of[number])

    def _digest(self, number: int, place: Place) -> bytes | None:
        """The digest of the base's chunk; None if it is not one whole row."""
        record = self._base.records[place.row]
        if place.start or int(record["raw_bytes"]) != self._chunks[number].n_bytes:
            return None
        return record["digest"].tobytes()  # type: ignore[no-any-return]
