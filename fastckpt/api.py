"""save, load, save_async, open: the same arguments as torch.save and torch.load. The work is done in other modules."""

from __future__ import annotations

import pickle
import struct
import time
from contextlib import closing
from typing import Any

import torch

from fastckpt.errors import CorruptCheckpointError, Damage, NotACheckpointError
from fastckpt.host.sink import abandoning
from fastckpt.host.torch_names import check_can_write, check_dill
from fastckpt.options import Options
from fastckpt.reading import foreign
from fastckpt.reading.contents import OfContainer
from fastckpt.reading.object_loader import load_object
from fastckpt.reading.opening import for_torch, is_ours, leave_behind, open_reader, open_source
from fastckpt.reading.sources import PathSource
from fastckpt.reading.tensor_reader import TensorReader
from fastckpt.reading.whole_contents import contents_of
from fastckpt.reading.whole_objects import load_checkpoint
from fastckpt.repository.locate import locate
from fastckpt.repository.newest import read_checkpoint
from fastckpt.snapshot.kept import kept, stage
from fastckpt.state import capture, unsafe_globals
from fastckpt.state.chunks import LiveChunks
from fastckpt.state.rebuild import resolve_weights_only
from fastckpt.state.sealing import seal
from fastckpt.store.base import Store
from fastckpt.store.location import describe
from fastckpt.writing.background import write_behind, write_now
from fastckpt.writing.handles import SaveHandle
from fastckpt.writing.legacy import save_legacy
from fastckpt.writing.target import open_target


def save(
    obj: object,
    f: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
    _use_new_zipfile_serialization: bool = True,
    _disable_byteorder_record: bool = False,
) -> None:
    """Save an object as one self-describing container. The arguments are those of torch.save.

    Saves to one target take effect in the order of their calls (docs/guarantees.md, §6): this waits for an earlier `save_async` to it in
    this process, for `Options.max_order_wait_s` at most.

    Threads: blocks until the save is done; the state must not change meanwhile. May be called from any thread.

    Args:
        obj: any object that torch.save accepts: tensors, modules' state dicts, containers of them, everything that `pickle_module` can
            pickle.
        f: the target. A path: when this returns, the file is whole and on stable storage; if it raises or the process dies, either the old
            file or the new one is there, whole (the new one only if the very last step failed, the fsync of the directory). A target that
            cannot be replaced (a device, a pipe, the name of a descriptor, an empty file that somebody holds open) is written like a file
            object. A URL, "s3://bucket/key": when this returns, the object is whole and durable; if it raises, see docs/guarantees.md, S4.
            A file object with `write` and `flush`: it stays open; its owner has to make it durable.
        pickle_module: as for torch.save.
        pickle_protocol: as for torch.save.
        _use_new_zipfile_serialization: False writes torch's legacy format instead of a container.
        _disable_byteorder_record: has no effect.

    Threads, compression and memory are those of `Options.from_env()`.

    Raises:
        OSError: an error of the target, if that is a path or a file object.
        SaveError: the target cannot be written. TargetBusyError: an earlier save to it does not end. OvertakenError: a signal handler
            interrupted this save, and saved to the same target.
        StoreError: an error of the store, if the target is a URL.
        Exception: the error that torch.save raises for the object.
    """
    check_dill(pickle_module)
    check_can_write(f)
    options = Options.from_env()
    if not _use_new_zipfile_serialization:
        save_legacy(obj, f, pickle_module, pickle_protocol, options)
        return
    started = time.perf_counter()
    captured = capture(obj, pickle_module, pickle_protocol)
    skeleton_s = time.perf_counter() - started
    sink = open_target(f, "save", options)
    with abandoning(sink):
        sink.expect(captured.n_bytes)
        write_now(seal(captured), sink, describe(f), options, skeleton_s)


def save_async(
    obj: object, f: Any, *, pickle_module: Any = pickle, pickle_protocol: int = 2, options: Options | None = None
) -> SaveHandle:
    """Copy the state to host memory, return, and write it in the background.

    Within a process, saves to one target (a file under any of its names, a URL, a file object) take effect in the order of their calls. An
    older save is not dropped for a newer one: its bytes are at the target, whole, before the newer ones replace them. A failed save delays
    nobody; if a save does not end, newer ones fail with TargetBusyError after `options.max_order_wait_s`. `load` reads the present target
    without waiting, and other functions (os.remove, torch.save) do not take part in the order: wait for the handle before you use them.

    Threads: may be called from any thread; a background thread writes.

    Args:
        obj: as for `save`. It may change as soon as this has returned.
        f: as for `save`. A file object must be left alone until `handle.durable` is done.
        pickle_module: as for torch.save.
        pickle_protocol: as for torch.save.
        options: None: `Options.from_env()`.

    Returns:
        The handle of the save; its `staged` is done. If the copy does not fit `options.host_budget_bytes`, or the interpreter is ending and
        allows no threads, the file is written before this returns, and `durable` is done, too.

    Raises:
        Exception: an error that can be seen at once, as in `save` (an object that cannot be pickled, a directory that does not exist).
            Later errors are in `handle.durable` and in the log.
    """
    check_can_write(f)
    options = options or Options.from_env()
    started = time.perf_counter()
    captured = capture(obj, pickle_module, pickle_protocol)
    handle = SaveHandle(describe(f))
    source = stage(captured, handle.target, options)
    skeleton_s = time.perf_counter() - started
    try:
        sealed, private = seal(captured, source), not isinstance(source, LiveChunks)
    except BaseException:
        source.close()
        raise
    write_behind(sealed, lambda: open_target(f, "save_async", options), handle, options, skeleton_s, private=private)
    return handle


def release_memory() -> int:
    """Give back the memory that `save_async` keeps for its next call.

    `save_async` copies a state into memory that it allocates once: as much as simultaneous saves need, within `host_budget_bytes`. The
    process keeps it, so that the next call need not wait for fresh pages. Saves under way keep their memory. A `Checkpointer` has memory of
    its own, and frees it when it is closed.

    Threads: may be called from any thread.

    Returns:
        The number of bytes that were freed.
    """
    return kept.release()


def load(
    f: Any,
    map_location: Any = None,
    pickle_module: Any = None,
    *,
    weights_only: bool | None = None,
    mmap: bool | None = None,
    **pickle_load_args: Any,
) -> Any:
    """Load what fastckpt.save, torch.save or safetensors wrote. The arguments are those of torch.load.

    Every byte of fastckpt's own files is verified.

    Threads: may be called from any thread; several background threads read and decode.

    Args:
        f: a path, a URL, or a file object that can seek; afterwards its position is behind the loaded object. The path or URL of a
            repository means its newest checkpoint; a job may write there meanwhile (`Checkpointer(read_only=True)` restores into objects).
            If an object has the same name, it is loaded instead. Of a checkpoint of many ranks, the objects of rank 0 are loaded, every
            DTensor as one plain tensor, whole (docs/how-to/many-ranks.md); a warning names what each rank had for itself.
        map_location: as for torch.load. "meta" reads no tensor data.
        pickle_module: as for torch.load.
        weights_only: as for torch.load. None and True run no foreign code.
        mmap: True is accepted for paths, and gives ordinary private memory.
        **pickle_load_args: as for torch.load.

    Returns:
        The saved object. Its tensors have the same dtypes, shapes and strides, and are where `map_location` puts them.

    Raises:
        CorruptCheckpointError: it lists all damage.
        UnsupportedFormatError: written by a newer fastckpt.
        NotACheckpointError: the file has no known format.
        TooLargeError: larger than `Options.max_load_bytes`.
        NoCheckpointError: the repository has no checkpoint.
        RestoreError: a tensor that was spread over ranks is not whole, or is in an object where it cannot be replaced.
        pickle.UnpicklingError: `weights_only` refuses something; the text is torch's.
        OSError: the path cannot be read. StoreError: the URL cannot be read.
    """
    with closing(locate(f)) as found:
        if not isinstance(found, Store) and not is_ours(found):
            return foreign.load(
                for_torch(f, found, Options.from_env().max_load_bytes),
                found,
                map_location,
                pickle_module,
                weights_only=weights_only,
                mmap=mmap,
                **pickle_load_args,
            )
        how = _how_to_load(map_location, pickle_module, weights_only, pickle_load_args)
        if mmap and not isinstance(found, PathSource):
            raise ValueError("f must be a file path in order to use the mmap argument")
        options = Options.from_env()
        if isinstance(found, Store):
            return read_checkpoint(found, "latest", lambda ranks, where: load_checkpoint(ranks, where, options, **how))
        reader = open_reader(found)
        result = load_object(reader, options, options.threads, **how)
        leave_behind(found, reader)
        return result


def _how_to_load(
    map_location: Any, pickle_module: Any, weights_only: bool | None, load_args: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of `load_object`, made from those of `load`, which are checked as torch.load does it."""
    restricted = resolve_weights_only(weights_only, pickle_module)
    check_dill(pickle_module)
    if load_args and restricted:
        foreign.warn_unused_arguments()
    return {
        "map_location": map_location,
        "pickle_module": pickle_module or pickle,
        "weights_only": restricted,
        "load_args": {"encoding": "utf-8", **load_args},
    }


def get_unsafe_globals(f: Any) -> list[str]:
    """List the functions and classes in a checkpoint that `weights_only` refuses. Reads no tensor data, runs nothing.

    Threads: may be called from any thread.

    Args:
        f: a path, a URL of a container, or a file object that can seek.

    Returns:
        Their names, "module.name", sorted; empty if `load` accepts the checkpoint as it is.

    Raises:
        CorruptCheckpointError: the pickle stream cannot be read.
        NotACheckpointError: the file has no known format.
        OSError: the path cannot be read. StoreError: the URL cannot be read.
    """
    with closing(open_source(f)) as source:
        if not is_ours(source):
            return sorted(
                torch.serialization.get_unsafe_globals_in_checkpoint(
                    for_torch(f, source, Options.from_env().max_load_bytes)
                )
            )
        reader = open_reader(source)
        try:
            return unsafe_globals(reader.skeleton, reader.holds_arrays)
        except (EOFError, LookupError, ValueError, AssertionError, struct.error) as error:
            damage = Damage("skeleton", "pickle stream", "one that torch can read", repr(error))
            raise CorruptCheckpointError(source.name, [damage]) from error


def open(f: Any, *, step: int | None = None, rank: int | None = None) -> TensorReader:
    """Open a checkpoint to inspect names, shapes and dtypes, and to read single tensors. No pickle is read.

    Threads: may be called from any thread; each reader must be used by one thread.

    Args:
        f: as for `load`; files of torch.save and safetensors are refused.
        step: for a repository: the step of the checkpoint; None: the newest.
        rank: for a repository: read what this rank had, of DTensors its parts. None: every DTensor is one tensor, whole, and what each rank
            had for itself cannot be read (`TensorReader.of_each_rank` lists it).

    Returns:
        A reader. Use it as a context manager, or call its `close`. Of a checkpoint of many ranks the lists of tensors have been read, two
        ranges of each rank's index; the rest is read when it is needed, at the latest when all names are asked for.

    Raises:
        NotACheckpointError: `f` is no container; or a `step` or `rank` is given, and `f` is no repository.
        NoCheckpointError: the repository has no such checkpoint, or the checkpoint no such rank.
        Exception: other errors, as for `load`.
    """
    source = locate(f, repository=step is not None or rank is not None)
    if isinstance(source, Store):
        store, options = source, Options.from_env()
        try:
            contents = read_checkpoint(
                store,
                "latest" if step is None else step,
                lambda ranks, where: contents_of(ranks, where, rank, options),
            )
            return TensorReader(contents, store.close)
        except BaseException:
            store.close()
            raise
    if step is not None or rank is not None:
        source.close()
        what = " and ".join(
            [*([f"step {step}"] if step is not None else []), *([f"rank {rank}"] if rank is not None else [])]
        )
        raise NotACheckpointError(
            f"{describe(f)} is no repository, so it has no checkpoint of {what}. Leave step and rank out for a file"
        )
    try:
        if not is_ours(source):
            raise NotACheckpointError(
                f"{source.name} is no fastckpt container: fastckpt.load reads files of torch.save and safetensors"
            )
        return TensorReader(OfContainer(open_reader(source), Options.from_env()))
    except BaseException:
        source.close()
        raise


__all__ = ["SaveHandle", "get_unsafe_globals", "load", "open", "release_memory", "save", "save_async"]
