"""Asks a store what it can do. Everything is written below one prefix, and deleted again.

`look` is what an opening for writing can afford: five requests, one after the other. `look_closely` is for `fastckpt probe`.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from fastckpt.errors import (
    ObjectChangedError,
    ObjectExistsError,
    StoreError,
    StoreUnavailableError,
    UnsupportedVerbError,
)
from fastckpt.store.base import Store
from fastckpt.store.findings import Create, Listing, Ranges, Replace, StoreFindings

PREFIX = "probe/"
_READS = 2
"""How often a part is read before the store is blamed: a bit may flip on the way."""
_RACES = 8
_RACERS = 8
_NAMES = ("a-b/c", "a.b", "a/a", "a/c", "a0")
"""In the order of keys. A walk of directories, or an order by length, gives another one."""


def new_place() -> str:
    """A prefix that nobody else uses."""
    return f"{PREFIX}{secrets.token_hex(8)}/"


@contextlib.contextmanager
def cleaned(store: Store, keys: list[str]) -> Iterator[None]:
    """Context at whose end the keys are deleted. Without the right to delete, some bytes stay: a writer does not need that right."""
    try:
        yield
    finally:
        for key in keys:
            with contextlib.suppress(StoreError):
                store.delete(key)


def look(store: Store) -> StoreFindings:
    """Whether a second create is refused, and a new object can be listed and read in part at once. StoreError."""
    place = new_place()
    key = f"{place}object"
    with cleaned(store, [key]):
        data = b"first " + key.encode()
        create, error = _create_twice(store, key, data)
        return StoreFindings(
            create=create, create_error=error, ranges=_part(store, key, data), strong=_is(key in _names(store, place))
        )


def look_closely(store: Store) -> StoreFindings:
    """As `look`, and: creates at once, listings, replacements. StoreError."""
    place = new_place()
    names = [f"{place}{name}" for name in _NAMES]
    raced = [f"{place}race/{number}" for number in range(_RACES)]
    found = look(store)
    with cleaned(store, [*names, *raced]):
        if found.create is Create.ATOMIC and not all(_one_wins(store, key) for key in raced):
            found = replace(found, create=Create.RACY)
        strong, ordered = found.strong is Listing.YES, True
        for name in reversed(names):
            store.put(name, b"x")
            listed = [one for one in _names(store, place) if one in names]
            strong, ordered = strong and name in listed, ordered and listed == sorted(listed)
        how = _replace(store, names[0])
        for name in names:
            store.delete(name)
            strong = strong and name not in _names(store, place)
    return replace(found, strong=_is(strong), ordered=_is(ordered), replace=how)


def _is(fact: bool) -> Listing:
    return Listing.YES if fact else Listing.NO


def _names(store: Store, place: str) -> list[str]:
    return [info.key for info in store.list(place)]


def _create_twice(store: Store, key: str, data: bytes) -> tuple[Create, StoreError | None]:
    try:
        store.put_if_absent(key, data)
    except ObjectExistsError:  # nobody else knows the key: it was our own request, whose reply was lost
        pass
    except StoreError as error:
        if type(error) not in (StoreError, UnsupportedVerbError):
            raise
        store.put(key, data)  # if this fails, too, it is not for the condition, and the error says for what
        return Create.UNSUPPORTED, error
    try:
        store.put_if_absent(key, b"second")
    except ObjectExistsError:
        return Create.ATOMIC, None
    store.put(key, data)
    return Create.IGNORED, None


def _part(store: Store, key: str, data: bytes) -> Ranges:
    for _ in range(_READS):
        out = bytearray(len(data) - 12)
        with contextlib.suppress(EOFError):
            store.get_into(key, 6, out)
            if bytes(out) == data[6:-6]:
                return Ranges.HONOURED
    return Ranges.WRONG


def _one_wins(store: Store, key: str) -> bool:
    """Whether exactly one of several creates at once succeeds, and its bytes are there. StoreError of the first that failed otherwise."""
    won: list[bytes] = []
    errors: list[StoreError] = []
    start = threading.Barrier(_RACERS)

    def create(data: bytes) -> None:
        start.wait()
        try:
            store.put_if_absent(key, data)
            won.append(data)
        except ObjectExistsError:
            pass
        except StoreError as error:
            errors.append(error)

    at_once([lambda data=b"racer %d" % number: create(data) for number in range(_RACERS)])  # type: ignore[misc]
    if errors:
        raise errors[0]
    return len(won) == 1 and store.get(key) == won[0]


def at_once(calls: list[Callable[[], object]]) -> None:
    """Run each call on a thread of its own, and wait for all."""
    threads = [threading.Thread(target=call, name="fastckpt-probe", daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _replace(store: Store, key: str) -> Replace:
    try:
        _, version = store.get_version(key)
        store.replace_if_match(key, b"second", version)
        store.replace_if_match(key, b"third", version)
    except UnsupportedVerbError:
        return Replace.UNSUPPORTED
    except ObjectChangedError:
        return Replace.CONDITIONAL
    except StoreUnavailableError:
        raise
    except StoreError as error:
        if type(error) is not StoreError:
            raise
        return Replace.UNSUPPORTED
    return Replace.IGNORED
