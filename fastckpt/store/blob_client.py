"""obstore's clients for Google Cloud Storage and Azure Blob, kept for the process: by everything that decides them.

obstore finds credentials by its own chain (environment, a file of Google's, Azure's managed identity, …) and renews them itself.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from fastckpt.errors import StoreError
from fastckpt.host.threads import start
from fastckpt.store.blob_errors import ACCESS_STEP, first_words

T = TypeVar("T")

_USUAL_BYTES = 64 << 20
_MOST_KEPT = 16
_ALLOW_HTTP = {"gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}
"""obstore reads these itself only where it is given no settings of HTTP."""
_ENVIRONMENT = ("AZURE_", "GOOGLE_", "GCLOUD_", "IDENTITY_", "MSI_", "HTTP", "http", "ALL_PROXY", "NO_PROXY", "SSL_")


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket or container, and how it is reached."""

    scheme: str
    """"gs" or "az"."""
    bucket: str
    config: Mapping[str, Any] = field(repr=False)
    """obstore's settings of the store; may hold keys."""
    client_options: Mapping[str, Any] = field(repr=False)
    """obstore's settings of HTTP."""
    credential_provider: Any = field(repr=False)
    connect_timeout_s: float
    timeout_s: float
    slowest_bytes_per_s: int
    connections: int

    @property
    def url(self) -> str:
        """Without a prefix."""
        return f"{self.scheme}://{self.bucket}"


_lock = threading.Lock()
kept_clients: dict[bytes, Any] = {}
"""By a digest of what decides them; least recently asked for first. Under `_lock`."""
_first_pid: int | None = None
"""The process whose threads do obstore's work."""


def client_of(place: Place, n_bytes: int) -> Any:
    """obstore's store for a request that moves so many bytes. Its time-out is one for whole requests, so large objects get another client.

    Any thread. StoreError: without obstore, with settings that it does not take, or in a process that was forked.
    """
    global _first_pid  # noqa: PLW0603 - obstore's threads are one thing for the whole process
    if _first_pid is None:
        _first_pid = os.getpid()
    if _first_pid != os.getpid():  # it would wait for ever: threads do not survive a fork
        raise StoreError(
            f"{place.url}: this process was forked from one that has used gs:// or az://, whose client does not survive a fork. Start "
            "workers with multiprocessing's spawn or forkserver"
        )
    doublings = max(0, (n_bytes - 1).bit_length() - (_USUAL_BYTES - 1).bit_length())
    key = _key(place, doublings)
    with _lock:
        found = kept_clients.pop(key, None) or _make(place, doublings)
        kept_clients[key] = found
        while len(kept_clients) > _MOST_KEPT:
            del kept_clients[next(iter(kept_clients))]
    return found


def interruptible(call: Callable[[], T]) -> T:
    """Run a call of obstore, which does not notice Ctrl-C. On the main thread, where Ctrl-C arrives, another thread runs it, and the wait
    for that can be interrupted. The request then goes on until it is answered or its time is over; nobody takes its result.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    if not start(threading.Thread(target=run, name="fastckpt-blob", daemon=True)):
        return call()  # the interpreter is ending, and starts no more threads
    return done.result()


def _key(place: Place, doublings: int) -> bytes:
    """A digest, so that keys in the environment are not stored twice. The client that is kept keeps a credential provider alive, so its
    address names it.
    """
    names = sorted(name for name in os.environ if name.startswith(_ENVIRONMENT))
    parts = [repr(place), repr(sorted(place.config.items())), repr(sorted(place.client_options.items()))]
    parts += [repr(id(place.credential_provider)), repr(doublings), *(f"{name}={os.environ[name]}" for name in names)]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()


def _make(place: Place, doublings: int) -> Any:
    try:
        import obstore.store
    except ImportError as error:
        raise StoreError(f"{place.url} needs obstore: pip install 'fastckpt-engine[clouds]' ({error})") from error
    timeout = timedelta(seconds=place.timeout_s + (_USUAL_BYTES << doublings) / place.slowest_bytes_per_s)
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=place.connect_timeout_s),
        "timeout": timeout,
        "pool_max_idle_per_host": str(place.connections),
        "allow_http": os.environ.get(_ALLOW_HTTP[place.scheme], "").lower() in ("1", "true", "yes"),
        **place.client_options,
    }
    given = {} if place.credential_provider is None else {"credential_provider": place.credential_provider}
    kind: Any = obstore.store.GCSStore if place.scheme == "gs" else obstore.store.AzureStore
    try:
        return kind(
            place.bucket,
            config=dict(place.config),
            client_options=options,
            retry_config={"max_retries": 0, "retry_timeout": timeout},
            **given,
        )
    except Exception as error:  # its text may hold a secret
        words = first_words(str(error))
    raise StoreError(f"{place.url} cannot be opened: {words}. {ACCESS_STEP}")


def _in_forked_child() -> None:
    global _lock  # noqa: PLW0603 - a thread of the parent may have held it
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
