"""Begins snapshots: one object per Checkpointer, which keeps what they use again and again."""

from __future__ import annotations

import torch

from fastckpt.errors import SaveError
from fastckpt.events import logger
from fastckpt.snapshot.copy_plan import DoesNotFit, plan_copies
from fastckpt.snapshot.fenced import Fenced
from fastckpt.snapshot.fingerprints import AllBytes, SaveFingerprints
from fastckpt.snapshot.pool import SlabPool
from fastckpt.snapshot.sampled import Sampled
from fastckpt.snapshot.side_stream import SideStream, is_capturing
from fastckpt.snapshot.slab_maker import SlabMaker
from fastckpt.snapshot.snapshot import Snapshot
from fastckpt.snapshot.spill import SpillFile
from fastckpt.state import Captured
from fastckpt.state.chunking import Cuts


class Stager:
    """Used by the thread that trains.

    budget_bytes: host memory for all snapshots together. threads: that copy host memory. target: named in events and errors. max_stall_s,
    verify, spill_dir: see Options.
    """

    def __init__(
        self,
        budget_bytes: int,
        threads: int,
        target: str,
        max_stall_s: float,
        verify: str = "off",
        spill_dir: str = "",
        pool: SlabPool | None = None,
    ) -> None:
        """pool: one that others use, too; by default one of its own. SaveError if nothing can be written to spill_dir."""
        self._spill_dir = spill_dir
        if spill_dir:
            SpillFile(spill_dir).close()
        self.pool = SlabPool(budget_bytes) if pool is None else pool
        self._threads, self._target, self._max_stall_s = threads, target, max_stall_s
        self._verify = verify
        self._sides: dict[torch.device, SideStream] = {}
        self._maker: SlabMaker | None = None

    def prepare(self, captured: Captured, cuts: Cuts, fenced: Fenced | None) -> None:
        """Begin to make the memory that a snapshot of this state will need, in the background, until one begins or `stop_preparing`."""
        try:
            plan = plan_copies(captured, cuts, self.pool.budget_bytes, fenced, ring=True)
        except DoesNotFit:  # such a save needs none
            return
        self._maker = SlabMaker(self.pool, plan.first_slabs, plan.for_device)

    def stop_preparing(self) -> None:
        """What is made by then stays. Waits for one slab at most."""
        maker, self._maker = self._maker, None
        if maker is not None:
            maker.stop()

    def begin(
        self,
        captured: Captured,
        cuts: Cuts,
        fenced: Fenced | None,
        step: int | None,
        *,
        ring: bool,
        samples: Sampled | None = None,
    ) -> Snapshot | None:
        """Begin to copy a state. None: earlier snapshots hold the memory that it needs.

        samples: of the state, taken by the caller now; what copies are compared with if `verify` is "sampled".
        fenced: what may be copied until `Snapshot.fence` (see `fenced_tensors`), all else is copied first; None: the caller fences at once,
        before anything can change. ring: whether a state larger than the budget may be copied in parts. DoesNotFit; SaveError while a
        graph is being captured.
        """
        self._refuse_capture(captured)
        self.stop_preparing()
        with self.pool.all_or_nothing():
            plan = plan_copies(captured, cuts, self.pool.budget_bytes, fenced, ring=ring)
            slabs = self.pool.take_all(plan.first_slabs, plan.for_device)
            if slabs is None:
                return None
            at_save = None if fenced is None else self._looks_at(captured, cuts, samples)
            spill = None
            if plan.is_ring and self._spill_dir:
                try:
                    spill = SpillFile(self._spill_dir)
                except SaveError as error:  # it could be used when this was made
                    logger.warning("%s", error)
            return Snapshot(
                captured,
                cuts,
                self.pool,
                plan,
                slabs,
                fenced,
                self._side,
                self._threads,
                target=self._target,
                step=step,
                max_stall_s=self._max_stall_s,
                at_save=at_save,
                spill=spill,
            )

    def _looks_at(self, captured: Captured, cuts: Cuts, samples: Sampled | None) -> SaveFingerprints | None:
        """What a snapshot of it is compared with."""
        if self._verify == "sampled":
            return None if samples is None else SaveFingerprints(samples)
        if self._verify == "off":
            return None
        if self._verify == "first":
            self._verify = "off"
        return SaveFingerprints(AllBytes(captured, cuts))

    def _side(self, device: torch.device) -> SideStream:
        side = self._sides.get(device)
        if side is None:
            side = self._sides[device] = SideStream(device)
        return side

    def _refuse_capture(self, captured: Captured) -> None:
        """What is given to a stream now would become part of the user's graph, and be replayed with it."""
        for device in {storage.device for storage in captured.storages}:
            if device is not None and is_capturing(device):
                raise SaveError(f"a graph is being captured on {device}: save before or after that")
