"""Nested state ↔ skeleton + storages + names. torch's own serializer decides how an object is pickled; fastckpt moves the bytes.

`capture` pickles the object with its storages taken out, `naming` finds the name of every tensor in it, `rebuild` unpickles
the skeleton, by default through torch's restricted unpickler, and asks for the storages one by one.
"""

from fastckpt.state.capture import Captured, CapturedStorage, capture
from fastckpt.state.rebuild import Rebuild, StorageProvider, may_be_refused, unsafe_globals
from fastckpt.state.recapture import Identity, Recapturer

__all__ = [
    "Captured",
    "CapturedStorage",
    "Identity",
    "Rebuild",
    "Recapturer",
    "StorageProvider",
    "capture",
    "may_be_refused",
    "unsafe_globals",
]
