"""Interprets an argument: a file, a folder of files, or a repository; and finds the chosen checkpoint of a repository."""

from __future__ import annotations

import argparse
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastckpt.cli.output import WrongUsageError, note
from fastckpt.errors import (
    CorruptCheckpointError,
    NoCheckpointError,
    NotACheckpointError,
    ObjectNotFoundError,
    RepositoryError,
    StoreError,
)
from fastckpt.format import keys
from fastckpt.format.container import MAGIC
from fastckpt.format.keys import CheckpointId
from fastckpt.kernels import kernels
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import is_container
from fastckpt.reading.object_source import ObjectSource
from fastckpt.reading.sources import PathSource, Source
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.newest import is_repository
from fastckpt.repository.repository import Repository
from fastckpt.store.base import Store
from fastckpt.store.blob import parse_blob_url
from fastckpt.store.cloud_connection import parse_s3_url
from fastckpt.store.location import is_url, location
from fastckpt.store.open import BLOB_SCHEMES, open_store


def options() -> Options:
    """The options that environment variables set. WrongUsageError lists every bad variable."""
    try:
        return Options.from_env()
    except ValueError as error:
        raise WrongUsageError(str(error)) from None


def require_environment() -> None:
    """Refuse bad variables before the work begins, even if the command uses them late or not at all. WrongUsageError."""
    options()
    try:
        kernels(0)  # 0 bytes, so that numba is not imported just for this check
    except (ValueError, ImportError) as error:
        raise WrongUsageError(str(error)) from None


def require_endpoint(url: str | None) -> None:
    """Refuse an --endpoint-url that is not an HTTP address. WrongUsageError."""
    if url is None:
        return
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, or half an IPv6 address
        good = False
    if not good:
        raise WrongUsageError(
            f"--endpoint-url is {url!r}: expected http:// or https:// and a host, as in https://minio.example.org:9000"
        )


def local_path(text: str) -> Path | None:
    """The path that a path or file:// URL names; None for other URLs. WrongUsageError."""
    try:
        found = location(text)
    except StoreError as error:
        raise WrongUsageError(str(error)) from None
    return None if is_url(found) else Path(os.path.expanduser(found))


def open_any_store(text: str, endpoint_url: str | None, *, connections: int) -> Store:
    """The store at a path or URL, whatever is there. connections: to keep open, where that can be set. StoreError, WrongUsageError."""
    path = local_path(text)
    return _store(str(path) if path is not None else text, endpoint_url, connections=connections)


def _store(url: str, endpoint_url: str | None, *, single_object: bool = False, connections: int | None = None) -> Store:
    """Open a store. WrongUsageError: the URL is invalid; StoreError: the store cannot be used."""
    settings: dict[str, Any] = {}
    try:
        scheme = location(url).partition("://")[0]
        if scheme == "s3" and endpoint_url is not None:
            settings["endpoint_url"] = endpoint_url
        if scheme in ("s3", *BLOB_SCHEMES):
            settings |= {"any_names": True} if single_object else {}
            settings |= {"connections": connections} if connections is not None else {}
        return open_store(url, **settings)
    except StoreError as error:
        if _names_a_place(url):
            raise
        raise WrongUsageError(str(error)) from None


def _names_a_place(url: str) -> bool:
    url = location(url)
    scheme = url.partition("://")[0]
    if scheme not in ("s3", *BLOB_SCHEMES):
        return not is_url(url) or scheme == "memory"
    try:
        if scheme == "s3":
            parse_s3_url(url)
        else:
            parse_blob_url(url)
    except StoreError:
        return False
    return True


@contextmanager
def maybe_repository(text: str, endpoint_url: str | None) -> Iterator[Repository | None]:
    """The repository at a path or URL; None if there is something else, or nothing. StoreError."""
    path = local_path(text)
    if path is not None and not path.is_dir():
        yield None
        return
    with _store(str(path) if path is not None else text, endpoint_url) as store:
        yield Repository(store) if is_repository(store) else None


@contextmanager
def open_repository(text: str, endpoint_url: str | None) -> Iterator[Repository]:
    """The repository at a path or URL; it must exist. A missing or damaged marker only causes a message.

    FileNotFoundError, RepositoryError, StoreError.
    """
    path = local_path(text)
    if path is not None:
        os.stat(path)  # so that the error is "no such file", not "no repository"
    with maybe_repository(text, endpoint_url) as repository:
        if repository is None:
            raise RepositoryError(
                f"{text} is no fastckpt repository: there is no {keys.MARKER}. Check the URL; `fastckpt show` and `check` take single files"
            )
        try:
            if repository.marker() is None:
                note(f"fastckpt: {repository.url}/{keys.MARKER} is missing: see fastckpt check")
        except CorruptCheckpointError:
            note(f"fastckpt: {repository.url}/{keys.MARKER} is damaged: see fastckpt check")
        yield repository


@contextmanager
def open_store_at(text: str, endpoint_url: str | None) -> Iterator[Store]:
    """The store at a path or URL; nothing need be there. WrongUsageError, StoreError."""
    path = local_path(text)
    with _store(str(path) if path is not None else text, endpoint_url) as store:
        yield store


@contextmanager
def open_target_object(text: str, endpoint_url: str | None, *, force: bool) -> Iterator[tuple[Store, str]]:
    """Store and key of an object that will be written. WrongUsageError if there is one, unless `force`; StoreError."""
    url = location(text)
    root, _, key = url.rpartition("/")
    if not key or root.endswith(("/", ":")):
        raise WrongUsageError(f"{text!r} names no object: expected scheme://place/…/name")
    with _store(root, endpoint_url, single_object=True) as store:
        if not force:
            with suppress(ObjectNotFoundError):
                store.head(key)
                raise WrongUsageError(f"{text} exists already: --force replaces it")
        yield store, key


def open_source(text: str, endpoint_url: str | None) -> Source:
    """A container: a file, or an object of a store."""
    path = local_path(text)
    if path is not None:
        return PathSource(str(path))
    url = location(text)
    root, _, key = url.rpartition("/")
    if not key or root.endswith(("/", ":")):
        raise WrongUsageError(f"{text!r} names neither a repository nor an object: expected scheme://place/…/name")
    store = _store(root, endpoint_url, single_object=True)
    try:
        return ObjectSource(store, key, owns_store=True)
    except BaseException:
        store.close()
        raise


@contextmanager
def open_container(text: str, endpoint_url: str | None) -> Iterator[Source]:
    """A file, or an object of a store, that is a container, or was one before it was damaged. NotACheckpointError: it never was one."""
    source = open_source(text, endpoint_url)
    try:
        if source.n_bytes == 0:
            raise NotACheckpointError(f"{source.name} is no fastckpt container: it is empty")
        if not is_container(source):
            head = bytearray(min(len(MAGIC), source.n_bytes))
            source.read_into(0, head)
            raise NotACheckpointError(
                f"{source.name} is no fastckpt container: it starts with {bytes(head)!r}, not {MAGIC!r} "
                "(of files of torch.save and safetensors this command knows nothing; fastckpt.load reads them)"
            )
        yield source
    finally:
        source.close()


def local_output(text: str) -> str:
    """The path that --out names. WrongUsageError for a URL."""
    path = local_path(text)
    if path is None:
        raise WrongUsageError(f"--out is {text!r}: expected a path of this machine; upload what is written there")
    return str(path)


def refuse_existing(paths: Iterable[str | Path], force: bool) -> None:
    """WrongUsageError if one of the files exists, unless --force was given."""
    for path in paths:
        if os.path.lexists(path) and not force:
            raise WrongUsageError(f"{path} exists already: --force replaces it")


def safe_history(catalog: Catalog) -> list[CheckpointId] | None:
    """The history, newest first; None where a damaged epoch record hides it."""
    try:
        return list(catalog.history())
    except CorruptCheckpointError as error:
        note(f"fastckpt: the history cannot be told: {error.damage[0]} ({error.source}). See fastckpt check")
        return None


def find(
    url: str, history: Sequence[CheckpointId] | None, known: Sequence[CheckpointId], step: int | None, epoch: int | None
) -> CheckpointId:
    """The checkpoint chosen by --step and --epoch. Pure. NoCheckpointError.

    If several checkpoints have this step, the one in the history is taken, then the one of the highest epoch. history: newest first; None
    if it cannot be known. known: all existing checkpoints.
    """
    inside = list(history or ())
    rest = sorted(set(known) - set(inside), reverse=True)
    for checkpoint in [*inside, *rest] if step is not None or epoch is not None or history is None else inside:
        if step in (None, checkpoint.step) and epoch in (None, checkpoint.epoch):
            return checkpoint
    wanted = " of ".join(
        [*([f"step {step}"] if step is not None else []), *([f"epoch {epoch}"] if epoch is not None else [])]
    )
    newest = ", ".join(str(c.step) for c in inside[:5]) or "none"
    raise NoCheckpointError(
        f"{url} has no checkpoint{f' ({wanted})' if wanted else ''}; newest steps: {newest}. `fastckpt ls` lists all"
    )


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    """Add --endpoint-url, for every command that takes a URL."""
    parser.add_argument(
        "--endpoint-url", metavar="URL", help="where s3:// is, if not at AWS (before AWS_ENDPOINT_URL_S3)"
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --step and --epoch."""
    parser.add_argument(
        "--step", type=int, metavar="N", help="the checkpoint of this step; otherwise the newest of the history"
    )
    add_epoch(parser)


def add_epoch(parser: argparse.ArgumentParser) -> None:
    """Add --epoch."""
    parser.add_argument("--epoch", type=int, metavar="E", help="the one of this epoch, where several have the step")
