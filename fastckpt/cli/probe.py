"""probe: what a store can do, and how fast it is. Writes below one prefix only, asks before, and deletes what it wrote."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastckpt.cli.output import (
    FOUND_DAMAGE,
    OK,
    USAGE,
    WrongUsageError,
    bar,
    confirm,
    human,
    note,
    print_json,
    say,
    table,
)
from fastckpt.cli.target import add_endpoint, open_any_store
from fastckpt.store.base import Store
from fastckpt.store.findings import StoreFindings, losses, refusals
from fastckpt.store.goodput import OBJECT_BYTES, Goodput, Latency, measure_goodput, measure_latency
from fastckpt.store.probe import PREFIX, look_closely
from fastckpt.store.wrap import Wrapper

HELP = "ask a store what it can do, and measure it; deletes what it writes"

_CONNECTIONS = (1, 4, 16, 64)
_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt probe`."""
    add_endpoint(parser)
    parser.add_argument(
        "url", metavar="URL", help="where a repository is, or is to be: a directory or the URL of a store"
    )
    parser.add_argument(
        "--connections",
        default=",".join(map(str, _CONNECTIONS)),
        metavar="N,N,…",
        help="measure with so many connections at once (default 1,4,16,64); 0: measure nothing",
    )
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, metavar="S", help="measure each so long, up and down (default 3)"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(arguments: argparse.Namespace) -> int:
    """Ask, probe, print. Status 1: no repository can be held there. StoreError, WrongUsageError."""
    connections = _numbers(arguments.connections)
    if not 0 < arguments.seconds <= 600:
        raise WrongUsageError(f"--seconds is {arguments.seconds:g}: expected more than 0 and at most 600")
    most = max(connections, default=0)
    with open_any_store(arguments.url, arguments.endpoint_url, connections=max(most, 1)) as store:
        question = (
            f"This writes {human(OBJECT_BYTES * max(most, 1))} below {store.url}/{PREFIX}, and deletes it again. Go on?"
        )
        answer = confirm(question, yes=arguments.yes, json_only=arguments.json)
        if not answer:
            return USAGE if answer is None else OK
        found = _look(store)
        why = refusals(found)
        latency = measure_latency(store)
        draw = bar("measuring")
        speeds: list[Goodput] = []
        for one in measure_goodput(_once(store), connections, arguments.seconds):
            speeds.append(one)
            draw(len(speeds), len(connections))
    if arguments.json:
        print_json("probe", _as_json(store.url, found, why, latency, speeds))
    else:
        _print(store.url, found, why, latency, speeds)
    return FOUND_DAMAGE if why else OK


def _numbers(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [-1]
    if any(not 0 <= one <= 1024 for one in found):
        raise WrongUsageError(f"--connections is {text!r}: expected numbers from 1 to 1024, such as 1,4,16, or 0")
    return [one for one in found if one]


def _once(store: Store) -> Store:
    """The store without its retries, so that what it turns away is counted."""
    while isinstance(store, Wrapper):
        store = store.inner
    return store


def _look(store: Store) -> StoreFindings:
    found, bare = look_closely(store), _once(store)
    if not store.url.startswith("s3://"):
        return found
    from fastckpt.store.cloud import S3Store
    from fastckpt.store.cloud_probe import look_at_server

    return look_at_server(bare, found) if isinstance(bare, S3Store) else found


def _words(found: StoreFindings) -> dict[str, Any]:
    """The findings by name, as words."""
    return {
        "create_if_absent": found.create.value,
        "replace_if_match": found.replace.value,
        "checksums": {name: one.value for name, one in found.checksums.items()},
        "checksum_in_use": found.checksum_in_use,
        "ranges": found.ranges.value,
        "listing": {"strong": found.strong.value, "ordered": found.ordered.value, "paged": found.paged.value},
    }


def _as_json(url: str, found: StoreFindings, why: list[str], latency: Latency, speeds: list[Goodput]) -> dict[str, Any]:
    return {
        "url": url,
        "repository": not why,
        **_words(found),
        "refusals": why,
        "losses": losses(found),
        "latency": asdict(latency),
        "goodput": [asdict(one) for one in speeds],
    }


def _print(url: str, found: StoreFindings, why: list[str], latency: Latency, speeds: list[Goodput]) -> None:
    say(url)
    rows = []
    for name, value in _words(found).items():
        if isinstance(value, Mapping):
            rows += [[f"  {name}.{part}", words] for part, words in value.items()]
        elif value is not None:
            rows.append([f"  {name}", value])
    table(rows)
    small = asdict(latency)
    say(f"  small requests: {', '.join(f'{name[:-2]} {1000 * value:.1f} ms' for name, value in small.items())}")
    if speeds:
        head = ["  connections", "up MB/s", "down MB/s", "turned away"]
        moved = [
            [f"  {s.connections}", f"{s.up_bytes_s / 1e6:.1f}", f"{s.down_bytes_s / 1e6:.1f}", s.put_off]
            for s in speeds
        ]
        table([head, *moved], right=(0, 1, 2, 3))
    for words in losses(found):
        note(f"{words}.")
    for words in why:
        note(f"no repository can be held here: {words}.")
    if not why:
        note("a repository can be held here.")
