"""The copy that `async_save` makes before it returns, where torch leaves it to the writer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save

from fastckpt.host.torch_names import identity


class NoStager:
    """torch copies the state itself."""


class CopyingStager(BlockingAsyncStager):
    """Copies to host memory also what lies there already: the stager of an older torch (2.6) copies what lies on devices only."""

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state that training does not change."""
        found: dict[str, Any] = super().stage(_private(state_dict, {}))  # type: ignore[assignment, unused-ignore]
        return found


WriterBase: Any = NoStager if "async_stager" in inspect.signature(async_save).parameters else CopyingStager
"""The base of a writer. One that has the methods of a stager is taken for one, so it must not have them where torch does the work."""


def _private(value: Any, copies: dict[Any, torch.Tensor]) -> Any:
    """Everything copied but tensors on devices. copies: of views that occur more than once."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            return value
        local = value.to_local() if hasattr(value, "to_local") else value
        view = identity(local.untyped_storage()), value.dtype, local.storage_offset(), value.shape, local.stride()
        if view not in copies:
            copies[view] = value.detach().clone()
        return copies[view]
    if isinstance(value, Mapping):
        return {key: _private(item, copies) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_private(item, copies) for item in value)
    return copy.deepcopy(value)
