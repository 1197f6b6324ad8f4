"""The HTTP clients of this process: one for each server, set of time-outs and proxy, shared by all stores.

A store that is opened, used for one object and closed would otherwise pay for a connection, and over https for a handshake, at every
call. Each request is signed for itself, so a connection belongs to no credentials: stores of different accounts may share it.
"""

from __future__ import annotations

import atexit
import os
import threading
from typing import Any

from fastckpt.store.cloud_http import HttpClient
from fastckpt.store.cloud_proxy import proxy_of
from fastckpt.store.cloud_socket import Server

_MOST_KEPT = 16
_lock = threading.Lock()
shared_clients: dict[Any, HttpClient] = {}
"""By server and proxy; least recently asked for first. Under `_lock`."""


def shared_client(server: Server) -> HttpClient:
    """The client of this process for a server. Any thread. StoreError for a proxy that cannot be used.

    Nobody closes it: idle connections end after some seconds, when another client takes the place of this one, or with the interpreter.
    """
    proxy = proxy_of(server.endpoint)  # read at each opening: the environment may name another one now
    key = server, proxy and (*proxy[:2], *sorted(proxy[2].items()))
    with _lock:
        found = shared_clients.pop(key, None) or HttpClient(server, proxy)
        shared_clients[key] = found
        dropped = [shared_clients.pop(next(iter(shared_clients))) for _ in range(len(shared_clients) - _MOST_KEPT)]
    for client in dropped:
        client.drop_idle()  # stores that still have it go on with new connections
    return found


def _end() -> None:
    """Close idle connections at the interpreter's end. A save that is still under way opens new ones."""
    for client in list(shared_clients.values()):
        client.drop_idle()


def _in_forked_child() -> None:
    global _lock  # noqa: PLW0603 - a thread of the parent may have held it
    _lock = threading.Lock()
    shared_clients.clear()


atexit.register(_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
