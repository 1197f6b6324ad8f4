"""Measures a store: how long one small request takes, and how many bytes a second go up and down over some connections at once."""

from __future__ import annotations

import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastckpt.errors import StoreUnavailableError
from fastckpt.store.base import Store
from fastckpt.store.probe import at_once, cleaned, new_place

_SMALL_REQUESTS = 10
OBJECT_BYTES = 4 << 20


@dataclass(frozen=True)
class Latency:
    """Medians of small requests over a warm connection, in seconds."""

    put_s: float
    get_s: float
    head_s: float


@dataclass(frozen=True)
class Goodput:
    """What some connections at once have moved."""

    connections: int
    up_bytes_s: float
    down_bytes_s: float
    put_off: int
    """How often the store asked for another try (SlowDown, 503), or did not answer."""


def measure_latency(store: Store) -> Latency:
    """StoreError."""
    key = f"{new_place()}small"
    with cleaned(store, [key]):
        put_s = _median_s(lambda: store.put(key, b"x"))
        return Latency(put_s, _median_s(lambda: store.get(key)), _median_s(lambda: store.head(key)))


def _median_s(call: Callable[[], object]) -> float:
    taken_s = []
    for _ in range(_SMALL_REQUESTS):
        began_s = time.perf_counter()
        call()
        taken_s.append(time.perf_counter() - began_s)
    return statistics.median(taken_s)


def measure_goodput(
    store: Store, connections: Iterable[int], seconds: float, object_bytes: int = OBJECT_BYTES
) -> Iterable[Goodput]:
    """Objects of random bytes are put and read for `seconds` each, by each of these numbers of threads; every thread has one object, which
    is deleted at the end. StoreError.
    """
    data, place = secrets.token_bytes(object_bytes), new_place()
    for n in connections:
        keys = [f"{place}{number}" for number in range(n)]
        buffers = [bytearray(object_bytes) for _ in keys]
        with cleaned(store, keys):
            up_s, up_off = _moved(keys, seconds, lambda number, keys=keys: store.put(keys[number], data))  # type: ignore[misc]
            down_s, down_off = _moved(
                keys,
                seconds,
                lambda number, keys=keys, buffers=buffers: store.get_into(keys[number], 0, buffers[number]),  # type: ignore[misc]
            )
        yield Goodput(n, up_s * object_bytes, down_s * object_bytes, up_off + down_off)


def _moved(keys: list[str], seconds: float, move: Callable[[int], object]) -> tuple[float, int]:
    """Objects moved a second, and how often the store asked for another try. Every thread moves its object at least once."""
    done, put_off = [0] * len(keys), [0] * len(keys)
    errors: list[BaseException] = []
    began_s = time.perf_counter()
    stop = threading.Event()

    def work(number: int) -> None:
        while not stop.is_set() and (not done[number] or time.perf_counter() - began_s < seconds):
            try:
                move(number)
                done[number] += 1
            except StoreUnavailableError as error:
                put_off[number] += 1
                if put_off[number] > _SMALL_REQUESTS and not done[number]:
                    errors.append(error)
                    stop.set()
            except BaseException as error:
                errors.append(error)
                stop.set()

    at_once([lambda number=number: work(number) for number in range(len(keys))])  # type: ignore[misc]
    if errors:
        raise errors[0]
    return sum(done) / (time.perf_counter() - began_s), sum(put_off)
