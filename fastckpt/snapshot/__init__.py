"""State → private copy in host memory, without stopping the training.

stager.py         begins snapshots (settings.py), keeps what they use again: slabs (pool.py, slab_maker.py), one side stream per device
                  (side_stream.py)
copy_plan.py      which chunks are copied first, where each one goes (slots.py); pure
snapshot.py       one snapshot: what training and those that save call
copier.py         gives out copies, in order: to devices (device_copies.py), to threads (host_copies.py)
ring.py           which slab holds what, and which may be used again; spiller.py moves some to a disk (spill.py)
progress.py       how far each copy and the whole have come; the lock that all parts share
fenced.py         what only an optimizer's step changes; hooks.py calls the fence before it does
tearing.py        whether state and copies still are what the state was at the call: by torch's versions, by fingerprints.py: of samples of
                  host memory (sampled.py), of all bytes of a device (device_prints.py)
unchanged.py      which chunks of a device still have the base's bytes and need no copy: by fingerprints (fingerprint_op.py, with a CUDA
                  kernel: fingerprint_kernel.py, nvrtc.py) of chunks that candidates.py chooses
probation.py      whether anything else changes the state between a save and that step
kept.py           what save_async keeps of it from call to call
"""

from fastckpt.snapshot.copy_plan import DoesNotFit
from fastckpt.snapshot.fenced import FencedTensors
from fastckpt.snapshot.hooks import FenceHooks
from fastckpt.snapshot.kept import kept
from fastckpt.snapshot.probation import Probation
from fastckpt.snapshot.sampled import Sampled, Sampler
from fastckpt.snapshot.snapshot import Snapshot
from fastckpt.snapshot.stager import Stager
from fastckpt.snapshot.unchanged import ChunkPrints, KnownPrints

__all__ = [
    "ChunkPrints",
    "DoesNotFit",
    "FenceHooks",
    "FencedTensors",
    "KnownPrints",
    "Probation",
    "Sampled",
    "Sampler",
    "Snapshot",
    "Stager",
    "kept",
]
