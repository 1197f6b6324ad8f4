"""Begins the snapshots of one owner, and keeps the memory and side streams that they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastckpt.errors import SaveError
from fastckpt.events import logger
from fastckpt.snapshot.copy_plan import DoesNotFit, plan_copies
from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.snapshot.fingerprints import AllBytes, SaveFingerprints
from fastckpt.snapshot.pool import SlabPool
from fastckpt.snapshot.sampled import Sampled
from fastckpt.snapshot.settings import StagerSettings
from fastckpt.snapshot.side_stream import SideStream, is_capturing
from fastckpt.snapshot.slab_maker import SlabMaker
from fastckpt.snapshot.snapshot import Snapshot
from fastckpt.snapshot.spill import SpillFile
from fastckpt.snapshot.unchanged import KnownPrints, Unchanged
from fastckpt.state import Captured
from fastckpt.state.chunking import Cuts


class Stager:
    """See the module. Used by the thread that trains."""

    def __init__(
        self,
        budget_bytes: int,
        threads: int,
        target: str,
        max_stall_s: float,
        verify: str = "off",
        spill_dir: str = "",
        pool: SlabPool | None = None,
        *,
        keeps: bool = False,
    ) -> None:
        """budget_bytes: host memory for all snapshots together. pool: a shared pool; None: the stager makes its own. keeps: whether slabs
        of a snapshot are kept as those of a base (base_slabs.py). Other arguments: see `StagerSettings`. SaveError if nothing can be
        written to spill_dir.
        """
        if spill_dir:
            SpillFile(spill_dir).close()
        self._settings = StagerSettings(target, threads, max_stall_s, verify, spill_dir)
        self.pool = SlabPool(budget_bytes) if pool is None else pool
        self._keeps = keeps
        self._newest_sizes: Sequence[int] = ()
        """Bytes of the slabs of the newest snapshot."""
        self._newest_for_device = False
        self._verified_once = False
        self._sides: dict[torch.device, SideStream] = {}
        self._maker: SlabMaker | None = None

    def prepare(self, captured: Captured, cuts: Cuts, fenced: FencedTensors | None) -> None:
        """Begin to allocate, in the background, the memory that a snapshot of this state will need, until one begins or
        `stop_preparing`.
        """
        try:
            plan = plan_copies(captured, cuts, self.pool.budget_bytes, fenced, ring=True)
        except DoesNotFit:  # such a save uses no slabs
            return
        self._maker = SlabMaker(self.pool, plan.first_slabs, plan.for_device)

    def prepare_next(self) -> None:
        """As `prepare`, for another snapshot like the newest one, whose slabs are kept: otherwise the next one would wait for its memory.
        Makes only what fits beside those.
        """
        if self._keeps and self._maker is None:
            self._maker = SlabMaker(self.pool, self._newest_sizes, self._newest_for_device)

    def stop_preparing(self) -> None:
        """Stop allocating ahead. Memory that is already made stays. Waits for one slab at most."""
        maker, self._maker = self._maker, None
        if maker is not None:
            maker.stop()

    def begin(
        self,
        captured: Captured,
        cuts: Cuts,
        fenced: FencedTensors | None,
        step: int | None,
        *,
        ring: bool,
        samples: Sampled | None = None,
        known: KnownPrints | None = None,
        pending: Sequence[Snapshot] = (),
    ) -> Snapshot | None:
        """Begin to copy a state. None: earlier snapshots hold the memory that it needs.

        fenced: tensors that may be copied until `Snapshot.fence`; everything else is copied first. None: the caller fences at once, before
        anything can change. ring: whether a state larger than the budget may be copied in parts. samples: samples of the state that the
        caller has just taken; copies are compared with them if `verify` is "sampled". known: fingerprints of the newest checkpoint, which
        the save will have as its base; pending: unless one of these is saved before that. DoesNotFit; SaveError while a graph is being
        captured.
        """
        self._refuse_capture(captured)
        self.stop_preparing()
        with self.pool.all_or_nothing():
            plan = plan_copies(captured, cuts, self.pool.budget_bytes, fenced, ring=ring)
            if plan.is_ring:  # it needs all memory, and must not wait for an encoder that waits for it
                self.pool.evict_bases()
            slabs = self.pool.take_all(plan.first_slabs, plan.for_device)
            if slabs is None:
                return None
            self._newest_sizes, self._newest_for_device = plan.first_slabs, plan.for_device
            return Snapshot(
                captured,
                cuts,
                self.pool,
                plan,
                slabs,
                fenced,
                self._side,
                self._settings,
                step=step,
                fingerprints=None if fenced is None else self._fingerprints(captured, cuts, samples),
                spill=self._spill_file() if plan.is_ring and self._settings.spill_dir else None,
                keeps=self._keeps,
                unchanged=self._unchanged(captured, cuts, fenced, known, pending) if plan.for_device else None,
            )

    def _unchanged(
        self,
        captured: Captured,
        cuts: Cuts,
        fenced: FencedTensors | None,
        known: KnownPrints | None,
        pending: Sequence[Snapshot],
    ) -> Unchanged | None:
        """What finds the chunks that need no copy. None: all are copied, because no save has a base."""
        if not self._keeps:
            return None
        before = [snapshot.unchanged for snapshot in pending]
        if None in before:
            known = None
        return Unchanged(captured, cuts.chunks, fenced, known, [one for one in before if one is not None])

    def _spill_file(self) -> SpillFile | None:
        """A file for slabs that hold up a ring. None, with a warning, if none can be made any more (it could when this object was made)."""
        try:
            return SpillFile(self._settings.spill_dir)
        except SaveError as error:
            logger.warning("%s", error)
            return None

    def _fingerprints(self, captured: Captured, cuts: Cuts, samples: Sampled | None) -> SaveFingerprints | None:
        """The fingerprints that copies of a state are compared with; None: copies are not compared."""
        if self._settings.verify == "sampled":
            return None if samples is None else SaveFingerprints(samples)
        if self._settings.verify == "off" or (self._settings.verify == "first" and self._verified_once):
            return None
        self._verified_once = True
        return SaveFingerprints(AllBytes(captured, cuts))

    def _side(self, device: torch.device) -> SideStream:
        side = self._sides.get(device)
        if side is None:
            side = self._sides[device] = SideStream(device)
        return side

    def _refuse_capture(self, captured: Captured) -> None:
        """SaveError while a graph is being captured: copies enqueued now would become part of the graph, and be replayed with it."""
        for device in {storage.device for storage in captured.storages}:
            if device is not None and is_capturing(device):
                raise SaveError(f"a graph is being captured on {device}: save before or after that")
