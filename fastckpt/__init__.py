"""fastckpt: a checkpoint storage engine for PyTorch.

    the way out                                                         the way back
    state ─→ snapshot ─→ codec ─→ format ─→ store                       repository ─→ reading ─→ state
    nested   private     bytes →  container  memory,                    which         verified,  unpickled,
    objects, copy        fewer    or packs   directory,                 commit        decoded    restricted
    cut                           and vote   S3                                       in threads
             └────── writing/ moves it ──────┘
                              └─→ repository/commit.py: one conditional put

`save`, `load` and `save_async` take torch.save's and torch.load's arguments; `open` fetches single tensors by name. A training loop uses

    with fastckpt.Checkpointer("s3://bucket/run-7", {"model": model, "optim": optim, "rng": fastckpt.RNGState()}) as ckpt:
        for step in range(ckpt.restore(), total_steps):
            train_one(step)
            if ckpt.step(step + 1, metrics={"loss": loss}):   # True: a notice came, and this step is durable
                break
    sys.exit(ckpt.exit_code)

The rooms, from the bottom up. A room imports only from rooms that stand before it here; scripts/house.py has the rule.

    errors       what goes wrong, as types
    host/        this machine, its interpreter, its torch. files: fsync, rename; threads; pages; torch_names: every private name of torch
    kernels/     the loops over every byte: select (C++ in csrc/, numba, or NumPy's reference/)
    trace/       recorder: events to a file; the rest shows what is in it
    events       what happened, as types
    options      every knob, its default, its environment variable
    codec/       bytes to fewer bytes. choose: which transform a chunk gets; transforms does it
    format/      bytes on storage. container: header, footer; records: of chunks; directory: of tensors; vote, keys, repository_records
    store/       bytes by key. base: the contract; memory; local: a directory; cloud: S3 (cloud_http: connections, cloud_errors: its
                 answers, cloud_credentials, …); blob: Azure, Google; probe: what a store can do; wrap: tries failed requests again
    state/       object ↔ pickle stream + storages + names. capture, naming, chunking (where to cut), rebuild (torch's unpicklers), refused
    spot/        notices that the machine goes. sources/: one module for each cloud, signal or file; watcher; ladder: what the seconds allow
    snapshot/    device → private host memory, beside training. stager, snapshot, copier, ring, hooks (before an optimizer's step),
                 pool (pinned memory and its budget), tearing (was it overwritten?)
    writing/     chunks → stored bytes → somewhere. container: writes a file; rank: one rank's part of a save in a repository (packs,
                 vote_builder); target: which sink a path, URL or file object is; turns: saves to one target in the order of their calls
    reading/     stored bytes → objects. chunk_reader (verifies each chunk), storage_loader (in threads), object_loader, tensor_reader,
                 foreign (files of torch.save and safetensors)
    repository/  what is committed. commit: the conditional put; catalog: history, and which checkpoint a restore takes; incarnation: one
                 start of a job; retention: which old checkpoints go; collector: deletes them; retaining: decides when it runs
    training/    the loop's object. checkpointer (face), saver, restorer, fence, ending (notices, exceptions), schedule (when a save is
                 due), save_queue, final_save. State back into live objects: stateful, exact, filling and placement.
                 elastic_sampler: the data's position, for any number of ranks; sample_order, sample_steps; positions: counts steps in it
    upkeep/      a person with a repository: check/, repair, export, salvage/, analyze, mirror/, prefetch
    integrations/ plug-ins. dcp/: storage for torch.distributed.checkpoint, also called fastckpt.dcp
    api          save, load, save_async, open: torch's shapes
    cli/         one module for each command, with what it prints; output: tables, bars, exit statuses
    testing/     for other people's tests: the store contract, faults, a metadata server

docs/architecture.md says why, docs/format.md has the bytes, docs/guarantees.md the promises.
"""

from __future__ import annotations

import importlib as _importlib
import importlib.metadata as _metadata
import os as _os
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

if (
    _sys.byteorder != "little"
):  # the format's numbers are read where they lie; checked before numpy and torch are imported
    raise ImportError(f"fastckpt runs on little-endian machines only, and this one is {_sys.byteorder}-endian")

from fastckpt.host.cycle_collector import held_off as _held_off


def _is_command_line() -> bool:
    """Whether this process is `fastckpt …` or `python -m fastckpt …`: few of its commands need torch, which takes a second to import."""
    name = _os.path.basename(_sys.argv[0]) if _sys.argv else ""
    return name == "fastckpt" or (
        name == "-m" and "fastckpt" in _sys.orig_argv
    )  # -m: while Python looks for the module


if _TYPE_CHECKING or "_wanted" in globals() or not _is_command_line():
    with _held_off():  # a collection during this import would walk all of torch: 0.08 s of 0.14
        from fastckpt import errors, events
        from fastckpt._version import __version__
        from fastckpt.api import SaveHandle, get_unsafe_globals, load, open, release_memory, save, save_async
        from fastckpt.errors import (
            CheckpointError,
            CorruptCheckpointError,
            EmptyCheckpointError,
            NoCheckpointError,
            NotACheckpointError,
            ObjectNotFoundError,
            OutOfHostMemoryError,
            PartialRestoreError,
            RanksError,
            RefusedStateError,
            RepositoryError,
            RestoreError,
            SaveError,
            SnapshotStalledError,
            StoreAccessError,
            StoreError,
            StoreFullError,
            StoreUnavailableError,
            SupersededError,
            TooLargeError,
            TornSnapshotError,
            UnknownTensorError,
            UnreadableError,
            UnsupportedFormatError,
        )
        from fastckpt.options import Options
        from fastckpt.reading.tensor_reader import TensorReader
        from fastckpt.repository.retention import Keep
        from fastckpt.spot.notice import Notice
        from fastckpt.store.base import Store
        from fastckpt.training.checkpointer import EXIT_CODE_NOTICE, Checkpointer, Stats
        from fastckpt.training.elastic_sampler import ElasticSampler
        from fastckpt.training.rng import RNGState
        from fastckpt.training.save_queue import CommitHandle
        from fastckpt.training.schedule import Every

else:

    def __getattr__(name: str) -> object:
        """In a command, what others may ask for that it has imported: a pickle's classes, with --trust-pickle."""
        if name in ("errors", "events") or name not in globals().get("__all__", ()):
            raise AttributeError(f"module 'fastckpt' has no attribute {name!r}")  # a room: it is imported then
        globals()["_wanted"] = True
        _importlib.reload(_sys.modules[__name__])
        return globals()[name]


__all__ = [
    "EXIT_CODE_NOTICE",
    "CheckpointError",
    "Checkpointer",
    "CommitHandle",
    "CorruptCheckpointError",
    "ElasticSampler",
    "EmptyCheckpointError",
    "Every",
    "Keep",
    "NoCheckpointError",
    "NotACheckpointError",
    "Notice",
    "ObjectNotFoundError",
    "Options",
    "OutOfHostMemoryError",
    "PartialRestoreError",
    "RNGState",
    "RanksError",
    "RefusedStateError",
    "RepositoryError",
    "RestoreError",
    "SaveError",
    "SaveHandle",
    "SnapshotStalledError",
    "Stats",
    "Store",
    "StoreAccessError",
    "StoreError",
    "StoreFullError",
    "StoreUnavailableError",
    "SupersededError",
    "TensorReader",
    "TooLargeError",
    "TornSnapshotError",
    "UnknownTensorError",
    "UnreadableError",
    "UnsupportedFormatError",
    "__version__",
    "errors",
    "events",
    "get_unsafe_globals",
    "load",
    "open",
    "release_memory",
    "save",
    "save_async",
]


def _refuse_namesake() -> None:
    """Refuse another package of the same name: the distribution called fastckpt on PyPI is another project; ours is fastckpt-engine."""
    try:
        other = _metadata.version("fastckpt")
    except _metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the unrelated PyPI package `fastckpt` {other} is installed over this one, and their files mix in one folder. "
        "Mend it with: pip uninstall -y fastckpt fastckpt-engine && pip install fastckpt-engine"
    )


_refuse_namesake()
