"""State → private copy in host memory, without stopping what trains it.

stager.py    begins snapshots, keeps what they use again: slabs (pool.py), one side stream per device (side_stream.py)
copy_plan.py which chunks are copied first, where each one goes (slots.py); pure
kept.py      what save_async keeps of it from call to call
snapshot.py  one snapshot: gives out copies, fences, hands chunks to the encoder
fenced.py    what only an optimizer's step changes; hooks.py calls the fence before it does
probation.py whether anything else changes the state between a save and that step
fingerprints.py whether copies are what the state was at the call: by samples of host memory (sampled.py), by all bytes of a device
                (device_prints.py)
"""

from fastckpt.snapshot.copy_plan import DoesNotFit
from fastckpt.snapshot.fenced import Fenced
from fastckpt.snapshot.hooks import FenceHooks
from fastckpt.snapshot.kept import kept
from fastckpt.snapshot.probation import Probation
from fastckpt.snapshot.sampled import Sampled, Sampler
from fastckpt.snapshot.snapshot import Snapshot
from fastckpt.snapshot.stager import Stager

__all__ = ["DoesNotFit", "FenceHooks", "Fenced", "Probation", "Sampled", "Sampler", "Snapshot", "Stager", "kept"]
