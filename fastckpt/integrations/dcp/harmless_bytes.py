"""Objects of a checkpoint → bytes that torch's planners may unpickle without restriction, as they do (`torch.load(weights_only=False)`)."""

from __future__ import annotations

import contextlib
import io
import pickle
from typing import Any

import torch

from fastckpt.errors import CheckpointError, RefusedStateError
from fastckpt.host.torch_names import torch_load, torch_save
from fastckpt.state import harmless, invariants


def load_harmless(data: bytes, fqn: str, url: str) -> Any:
    """Load the bytes of torch.save with torch's restricted unpickler. RefusedStateError if they could run code, or are something else."""
    try:
        found = torch_load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError as error:
        found = _load_beyond_torch(data, fqn, url, error)
    except Exception as error:  # no file of torch.save, or one of TorchScript
        raise _refused(data, fqn, url, error) from error
    invariants.require_fit(found, f"{fqn} of {url}")
    return found


def _load_beyond_torch(data: bytes, fqn: str, url: str, refused: Exception) -> Any:
    """With the types that `restore` accepts, too. torch has found that it is a plain file of torch.save: only types were refused."""
    try:
        return torch_load(io.BytesIO(data), pickle_module=harmless, weights_only=False)
    except Exception as error:
        raise _refused(data, fqn, url, refused) from error


def _refused(data: bytes, fqn: str, url: str, error: Exception) -> CheckpointError:
    why = str(error).partition("\n")[0]
    with contextlib.suppress(Exception):  # it may be no file of torch.save
        types = set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))) - harmless.NAMES
        why = f"it needs {', '.join(sorted(types))}" if types else why
    return RefusedStateError(
        f"{fqn} of {url} is an object that could run code while it is loaded, or no object that torch.save has written: {why}. If you "
        "trust the checkpoint, pass FastckptReader(…, weights_only=False), or allow its types with torch.serialization.add_safe_globals"
    )


def made_harmless(data: bytes, fqn: str, url: str) -> io.BytesIO:
    """The same object as bytes that this process has written itself. RefusedStateError as `load_harmless`."""
    out = io.BytesIO()
    torch_save(load_harmless(data, fqn, url), out)
    out.seek(0)
    return out
