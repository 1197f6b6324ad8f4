"""save, load, save_async, open: torch.save's and torch.load's shapes. What they do is elsewhere."""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import closing, contextmanager
from typing import IO, Any, cast

import torch

from fastckpt import events
from fastckpt.errors import (
    CorruptCheckpointError,
    Damage,
    EmptyCheckpointError,
    NotACheckpointError,
    ObjectNotFoundError,
    SaveError,
    StoreAccessError,
    StoreError,
    TooLargeError,
)
from fastckpt.host.deadline import bounded
from fastckpt.host.files import FileObject, Sink, make_directories, open_sink
from fastckpt.host.interrupts import deferred_interrupt
from fastckpt.host.threads import start_thread
from fastckpt.host.torch_names import check_can_seek, check_can_write, check_dill
from fastckpt.options import Options
from fastckpt.reading import foreign
from fastckpt.reading.chunk_reader import Reader, is_container
from fastckpt.reading.object_loader import load_object
from fastckpt.reading.object_source import ObjectSource
from fastckpt.reading.sources import FileObjectSource, PathSource, Source
from fastckpt.reading.tensor_reader import TensorReader
from fastckpt.repository.newest import is_repository, read_checkpoint
from fastckpt.snapshot import DoesNotFit, Snapshot, kept
from fastckpt.state import Captured, capture, unsafe_globals
from fastckpt.state.chunks import LiveChunks, cuts_of
from fastckpt.state.rebuild import resolve_weights_only
from fastckpt.store.base import Store
from fastckpt.store.location import is_url, location
from fastckpt.store.open import open_object, open_store
from fastckpt.writing import turns
from fastckpt.writing.container import start_workers, write
from fastckpt.writing.object_sink import ObjectSink
from fastckpt.writing.ordered_sink import OrderedSink, keys_of_object, keys_of_path


def _describe(f: Any) -> str:
    if isinstance(f, (str, os.PathLike)):
        return os.fsdecode(os.fspath(f))
    return str(getattr(f, "name", None) or f"<{type(f).__name__}>")


def save(
    obj: object,
    f: Any,
    pickle_module: Any = pickle,
    pickle_protocol: int = 2,
    _use_new_zipfile_serialization: bool = True,
    _disable_byteorder_record: bool = False,
) -> None:
    """Save an object to a path, a URL or a writable file object: torch.save's arguments, one self-describing container.

    A path: when this returns, the file is whole and on stable storage. If it raises or the process dies, the old file or
    the new one is at the path, whole: the old one, unless the error came from the very last step, the fsync of the directory. What
    cannot be replaced (a device, a pipe, the name of a descriptor, an empty file that somebody holds open) is written like a file object.
    A URL ("s3://bucket/key"): when this returns, the object is there, whole and durable; if it raises, see docs/guarantees.md, S4.
    A file object needs `write` and `flush`; it stays open, and making it durable is its owner's task.

    Saves to one target take effect in the order of their calls (docs/guarantees.md, §6): an earlier `save_async` to it, in this process, is
    waited for, `Options.max_order_wait_s` at most.

    Blocks until done; the state must not change meanwhile. Any thread. Uses `Options.from_env()`: threads, compression, memory.
    `_use_new_zipfile_serialization=False` writes torch's legacy format instead, `_disable_byteorder_record` has no effect.

    Raises what torch.save raises for the object; OSError for the target; SaveError (docs: fastckpt.errors), among them TargetBusyError for
    an earlier save that does not end, and OvertakenError if a signal handler interrupted this save with one of its own to the same target.
    """
    check_dill(pickle_module)
    check_can_write(f)
    options = Options.from_env()
    if not _use_new_zipfile_serialization:
        _save_legacy(obj, f, pickle_module, pickle_protocol, options)
        return
    started = time.perf_counter()
    captured = capture(obj, pickle_module, pickle_protocol)
    skeleton_s = time.perf_counter() - started
    sink, _ = _sink(f, "save", options)
    try:
        sink.expect(captured.n_bytes)
        pool = start_workers(captured, options)
        write(captured, sink, _describe(f), options, pool, skeleton_s)
    except BaseException:
        sink.abandon()
        raise


def _save_legacy(obj: object, f: Any, pickle_module: Any, pickle_protocol: int, options: Options) -> None:
    """torch's pre-1.6 format, but as atomic as ours."""
    sink, turn = _sink(f, "save", options)
    try:
        if isinstance(f, (str, os.PathLike)):
            foreign.torch_save(obj, cast(IO[bytes], _SinkFile(sink)), pickle_module, pickle_protocol, False)
            sink.commit()
        else:
            sink.wait()
            foreign.torch_save(obj, f, pickle_module, pickle_protocol, False)
            turn.end()
    except BaseException:
        sink.abandon()
        raise


class _SinkFile:
    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: Any) -> int:
        self._sink.write(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


class SaveHandle:
    """A save under way. Not waiting for it is allowed: the interpreter does at exit, and a failure is logged in any case."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.staged: Future[None] = Future()
        """Done when the state may change again. What can go wrong before that is raised by save_async itself."""
        self.durable: Future[int] = Future()
        """Done when the file is whole and on stable storage; the result is its bytes. Carries the error if anything failed."""

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self.durable.done()

    def wait(self, timeout_s: float | None = None) -> int:
        """Block until durable; returns the bytes of the file. Raises the save's error, or TimeoutError (the save goes on)."""
        try:
            return self.durable.result(None if timeout_s is None else bounded(timeout_s))
        except futures.TimeoutError:
            if self.durable.done():  # the save's own error
                raise
            # Before Python 3.11 it is not the built-in one that callers catch.
            raise TimeoutError(f"{self.target} is not durable after {timeout_s} s; the save goes on") from None


def save_async(
    obj: object, f: Any, *, pickle_module: Any = pickle, pickle_protocol: int = 2, options: Options | None = None
) -> SaveHandle:
    """Copy the state to host memory, return, and write it in the background.

    When this returns, `handle.staged` is done: the state may change again. If the copy does not fit `host_budget_bytes`, or the
    interpreter's end allows no threads, the file is written before this returns. A file object must be left alone
    until `handle.durable` is done.

    Saves to one target (a file by whatever name, a URL, a file object) take effect in the order of their calls, in a process. An older
    save is not dropped for a newer one: its bytes are at the target, whole, before the newer ones replace them. A failed one holds nobody
    up; one that does not end makes the newer fail with TargetBusyError after `options.max_order_wait_s`. `load` reads what is at the
    target and waits for nobody, and what others do there (os.remove, torch.save) has no place in the order: wait for the handle first.

    Raises at once what can be known at once (an object that cannot be pickled, a directory that does not exist); the rest reaches
    `handle.durable` and the log.
    """
    check_can_write(f)
    options = options or Options.from_env()
    started = time.perf_counter()
    captured = capture(obj, pickle_module, pickle_protocol)
    handle = SaveHandle(_describe(f))
    source = _snapshot(captured, handle.target, options)
    skeleton_s = time.perf_counter() - started

    def run() -> None:
        assert sink is not None
        try:
            handle.durable.set_result(write(captured, sink, handle.target, options, pool, skeleton_s, source))
        except BaseException as error:
            events.logger.error(
                "saving %s in the background failed: %s: %s", handle.target, type(error).__name__, error
            )
            handle.durable.set_exception(error)

    thread = sink = pool = None
    try:
        sink, turn = _sink(f, "save_async", options)
        sink.expect(captured.n_bytes)
        pool = start_workers(captured, options)
        if not isinstance(source, LiveChunks):
            with deferred_interrupt():  # all of it changes hands
                thread = start_thread(run, "fastckpt-save")
                if thread is not None:
                    turn.hand_over()
        if thread is None:
            handle.durable.set_result(write(captured, sink, handle.target, options, pool, skeleton_s, source))
        handle.staged.set_result(None)
    except BaseException:
        if thread is None:  # else it goes on, though nobody gets its handle
            if pool is not None:
                pool.close()
            if sink is not None:
                sink.abandon()
            source.close()
        raise
    return handle


def _snapshot(captured: Captured, target: str, options: Options) -> Snapshot | LiveChunks:
    """A copy of the state, if it fits the budget: it may change on return. Else the state itself."""
    try:
        snapshot = kept.begin(
            captured,
            cuts_of(captured),
            target,
            budget_bytes=options.host_budget_bytes - options.encoder_bytes,
            threads=options.threads,
            max_stall_s=options.max_stall_s,
        )
    except DoesNotFit:
        snapshot = None
    if snapshot is not None:
        return snapshot
    events.logger.warning(
        "the copy of %d bytes does not fit the budget of %d, or what earlier saves leave of it: %s is written before save_async returns",
        captured.n_bytes,
        options.host_budget_bytes,
        target,
    )
    return LiveChunks(captured)


def release_memory() -> int:
    """Give back the memory that `save_async` keeps for its next call; returns how many bytes that were.

    `save_async` copies a state into memory that it takes once: as much as the saves under way at once need, within `host_budget_bytes`. It
    stays with the process so that the next call need not wait for fresh pages. Saves under way keep theirs. Any thread. A `Checkpointer`
    has memory of its own and lets go of it when it is closed.
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
    """Load what fastckpt.save, torch.save or safetensors wrote: torch.load's arguments, every byte verified (fastckpt's own files).

    f: a path, a URL, or a file object that can seek; it is left behind the object. A repository's path or URL means its newest
    checkpoint, read beside whatever job writes there (`Checkpointer(read_only=True)` restores into objects); an object of the same name
    comes first. `mmap=True` is accepted for paths and gives ordinary
    private memory. `map_location="meta"` reads no tensor data.

    Raises CorruptCheckpointError (lists all damage), UnsupportedFormatError, NotACheckpointError, TooLargeError; pickle.UnpicklingError
    for what `weights_only` refuses, in torch's words; OSError for the path.
    """
    found = _found(f)
    if isinstance(found, Store):
        with found:
            return _load_newest(found, map_location, pickle_module, weights_only, mmap, pickle_load_args)
    with closing(found) as source:
        if not _is_ours(source):
            return foreign.load(
                _for_torch(f, source),
                source,
                map_location,
                pickle_module,
                weights_only=weights_only,
                mmap=mmap,
                **pickle_load_args,
            )
        weights_only = resolve_weights_only(weights_only, pickle_module)
        check_dill(pickle_module)
        if mmap and not isinstance(source, PathSource):
            raise ValueError("f must be a file path in order to use the mmap argument")
        if pickle_load_args and weights_only:
            foreign.warn_unused_arguments()
        pickle_load_args.setdefault("encoding", "utf-8")
        reader = Reader.open(source, alone=not isinstance(source, FileObjectSource))
        options = Options.from_env()
        result = load_object(
            reader,
            options,
            options.threads,
            map_location=map_location,
            pickle_module=pickle_module or pickle,
            weights_only=weights_only,
            load_args=pickle_load_args,
        )
        if isinstance(source, FileObjectSource):
            source.seek_to(reader.start + reader.footer.container_bytes)
        return result


def _load_newest(
    store: Store,
    map_location: Any,
    pickle_module: Any,
    weights_only: bool | None,
    mmap: bool | None,
    load_args: dict[str, Any],
) -> Any:
    weights_only = resolve_weights_only(weights_only, pickle_module)
    check_dill(pickle_module)
    if mmap:
        raise ValueError("f must be a file path in order to use the mmap argument")
    if load_args and weights_only:
        foreign.warn_unused_arguments()
    options = Options.from_env()
    return read_checkpoint(
        store,
        "latest",
        lambda reader: load_object(
            reader,
            options,
            max(options.threads, options.connections),
            map_location=map_location,
            pickle_module=pickle_module or pickle,
            weights_only=weights_only,
            load_args={"encoding": "utf-8", **load_args},
        ),
    )


def get_unsafe_globals(f: Any) -> list[str]:
    """Names of the functions and classes in a checkpoint that `weights_only` refuses. Reads no tensor data, runs nothing."""
    with _open_source(f) as source:
        if not _is_ours(source):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(_for_torch(f, source)))
        reader = Reader.open(source, alone=not isinstance(source, FileObjectSource))
        try:
            return unsafe_globals(reader.skeleton, reader.holds_arrays)
        except (EOFError, LookupError, ValueError, AssertionError, struct.error) as error:
            damage = Damage("skeleton", "pickle stream", "one that torch can read", repr(error))
            raise CorruptCheckpointError(source.name, [damage]) from error


def open(f: Any, *, step: int | None = None) -> TensorReader:
    """Open a checkpoint to look at names, shapes and dtypes and to fetch single tensors: no pickle is read.

    f: as for load. step: that of a repository's checkpoint; None: the newest.
    Use as a context manager, or call close(). Raises as load does; files of torch.save and safetensors are refused.
    """
    source = _found(f, repository=step is not None)
    if isinstance(source, Store):
        store, options = source, Options.from_env()
        try:
            return read_checkpoint(
                store, "latest" if step is None else step, lambda reader: TensorReader(reader, options, store.close)
            )
        except BaseException:
            store.close()
            raise
    if step is not None:
        source.close()
        raise NotACheckpointError(
            f"{_describe(f)} is no repository, so it has no checkpoint of step {step}. Leave step out for a file"
        )
    try:
        if not _is_ours(source):
            raise NotACheckpointError(
                f"{source.name} is no fastckpt container: fastckpt.load reads files of torch.save and safetensors"
            )
        return TensorReader(Reader.open(source, alone=not isinstance(source, FileObjectSource)), Options.from_env())
    except BaseException:
        source.close()
        raise


def _object(url: str) -> tuple[Store, str]:
    """The store and the key of one object. SaveError for a URL that names none."""
    try:
        return open_object(url)
    except StoreError as error:
        if not url.rpartition("/")[2]:
            raise SaveError(str(error)) from None
        raise


def _sink(f: Any, verb: str, options: Options) -> tuple[OrderedSink, turns.Turn]:
    """Where a save goes, and its place among the saves that go there. verb: "save" or "save_async", for messages."""
    name = f"{verb} to {_describe(f)}"
    if not isinstance(f, (str, os.PathLike)):
        keys = keys_of_object(f)
        opened: Callable[[], Sink] = functools.partial(FileObject, f)
    elif is_url(where := location(f)):
        store, key = _object(where)
        keys = (("url", store.url, key),)
        opened = functools.partial(ObjectSink, store, key)
    else:
        if _describe(f).startswith("file:"):
            make_directories(os.path.dirname(where))  # as a store does
        keys = keys_of_path(where)
        opened = functools.partial(open_sink, where)
    turn = turns.take(keys, name)
    try:
        return OrderedSink(opened(), turn, options.max_order_wait_s), turn
    except BaseException:
        turn.end()
        raise


def _found(f: Any, repository: bool = False) -> Source | Store:
    """A container, or the store of a repository, whichever `f` names. An object of that name comes first, unless `repository`."""
    where = location(f) if isinstance(f, (str, os.PathLike)) else None
    if where is None:
        return _source(f)
    if not is_url(where):
        return (_repository(where) if os.path.isdir(where) else None) or _source(f)
    if repository:
        return _repository(where) or _source(f)
    try:
        return _source(f)
    except (ObjectNotFoundError, StoreAccessError, SaveError, FileNotFoundError):
        # Rights to read a prefix do not include the object of its own name, and a whole bucket has no name of an object.
        store = _repository(where)
        if store is None:
            raise
        return store


def _repository(where: str) -> Store | None:
    """The store of a repository; None if there is none, as far as can be seen."""
    store = None
    try:
        store = open_store(where)
        if is_repository(store):
            return store
    except StoreError as error:  # what the caller meets otherwise says more
        events.logger.debug("looking for a repository at %s: %s", where, error)
    except BaseException:
        if store is not None:
            store.close()
        raise
    if store is not None:
        store.close()
    return None


def _source(f: Any) -> Source:
    if not isinstance(f, (str, os.PathLike)):
        check_can_seek(f)
        return FileObjectSource(f)
    where = location(f)
    if not is_url(where):
        return PathSource(where)
    store, key = _object(where)
    try:
        return ObjectSource(store, key, owns_store=True)
    except BaseException:
        store.close()
        raise


@contextmanager
def _open_source(f: Any) -> Iterator[Source]:
    source = _source(f)
    try:
        yield source
    finally:
        source.close()


def _for_torch(f: Any, source: Source) -> Any:
    """What torch can read: a path, or a file object. TooLargeError for an object of a store that memory is too small for."""
    if isinstance(source, PathSource):
        return source.name
    if isinstance(source, FileObjectSource):
        return f
    limit = Options.from_env().max_load_bytes
    if source.n_bytes > limit:
        raise TooLargeError(
            f"{source.name} has {source.n_bytes} bytes: more than max_load_bytes = {limit}. Download it first"
        )
    data = bytearray(source.n_bytes)
    source.read_into(0, data)
    return io.BytesIO(data)


def _is_ours(source: Source) -> bool:
    """Whether this is (or was) a fastckpt container. Leaves a file object where it stood."""
    if source.n_bytes == 0:
        raise EmptyCheckpointError(f"{source.name} is empty: not a checkpoint")
    found = is_container(source)
    if isinstance(source, FileObjectSource):
        source.seek_to(0)
    return found


__all__ = ["SaveHandle", "get_unsafe_globals", "load", "open", "release_memory", "save", "save_async"]
