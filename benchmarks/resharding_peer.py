"""torch_checkpointing as a contender of benchmarks/resharding_loads.py. It may be absent."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch.distributed as dist

NAME = "torch_checkpointing"


def absence() -> str:
    """Why it cannot take part; empty if it can."""
    return "" if importlib.util.find_spec(NAME) else "not installed"


def manager() -> Any:
    """Its manager, with its resharder. Direct I/O is left out: all contenders read from the page cache."""
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.config import SyncCheckpointSaverConfig
    from torch_checkpointing.default_resharder import DefaultResharder
    from torch_checkpointing.schema import ItemSpec
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    items = {name: ItemSpec(resharder=DefaultResharder()) for name in ("model", "optimizer")}
    storage = LocalFileSystemStorageConfig(use_direct_io=False)
    return CheckpointManager(
        CheckpointManager.Config(items=items, storage_config=storage, save=SyncCheckpointSaverConfig())
    )


def save(path: str, state: Any) -> None:
    """Save in a gloo group. Its exchange of metadata wants tensors on a GPU, which gloo does without; nothing of a load is touched."""
    from torch_checkpointing import metadata_manager

    def gathered(_: Any, data: Any, process_group: Any = None) -> dict[int, Any]:
        found: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(found, data, group=process_group)
        return dict(enumerate(found))

    metadata_manager.DefaultMetadataManager._all_gather_pickled_data = gathered
    made = manager()
    made.save(path, state)
    made.close()
