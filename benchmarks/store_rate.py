"""Requests per second of a real TCPStore on this machine: one server process, clients in processes of their own."""

from __future__ import annotations

import multiprocessing as mp
import time
from typing import Any

KINDS = ("check", "get", "set", "add")


def _client(port: int, number: int, seconds: float, kind: str, begin: Any, found: Any) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=False)
    store.set(f"there/{number}", b"x" * 100)
    calls = {
        "check": lambda: store.check([f"nothing/{number}"]),
        "get": lambda: store.multi_get([f"there/{number}"]),
        "set": lambda: store.set(f"there/{number}", b"x" * 100),
        "add": lambda: store.add("counter", 1),
    }
    call = calls[kind]
    begin.wait()
    end_s, n = time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        for _ in range(50):
            call()
        n += 50
    found.put(n / seconds)


def rate(n_clients: int, kind: str, seconds: float = 1.0) -> float:
    """Requests a second of all clients together, each of which waits for an answer before it asks again."""
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("spawn")
    begin, found = context.Barrier(n_clients), context.Queue()
    clients = [
        context.Process(target=_client, args=(server.port, number, seconds, kind, begin, found))
        for number in range(n_clients)
    ]
    for client in clients:
        client.start()
    total = sum(found.get(timeout=120) for _ in clients)
    for client in clients:
        client.join()
    return float(total)


def measure(clients: tuple[int, ...] = (1, 8)) -> dict[str, dict[str, float]]:
    """Number of clients → kind of request → requests a second."""
    return {str(n): {kind: round(rate(n, kind)) for kind in KINDS} for n in clients}


if __name__ == "__main__":
    print(measure())
