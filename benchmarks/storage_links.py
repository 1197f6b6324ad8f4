"""Rows of links of a given rate and length: network namespaces of this machine, with this project's null server at the far end."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fastckpt
from benchmarks.storage_contenders import OURS
from benchmarks.storage_lab import Endpoint, Lab, null
from benchmarks.storage_rows import Row, errors, figures, in_seconds, middle, missing, row

LINKS = ((200e6, 0.05), (1e9, 0.02))
SMALL_LINK, SMALL = (200e6, 0.05), "2m"
SMALL_SAVES = 4
WHO = OURS[0]


def count(lab: Lab) -> int:
    return (2 + can_overlap()) * len(LINKS) * _rounds(lab) + _rounds(lab)


def _rounds(lab: Lab) -> int:
    """Bytes ÷ rate hardly varies, and takes long."""
    return min(lab.rounds, 2)


@contextmanager
def far(rate: float, trip_s: float) -> Iterator[tuple[Endpoint, Any]]:
    """A server that keeps everything, behind such a link."""
    from tests.support.shaped_link import shaped_link

    with shaped_link(bits_per_s=rate, round_trip_s=trip_s) as link, null(link=link, keep=True) as found:
        yield found


def why_not() -> str:
    from tests.support.shaped_link import why_not as reason

    return reason() or ""


def measure(lab: Lab) -> list[Row]:
    if why_not():
        return [missing("links", "saves and restores over links of a given rate", "", why_not())]
    found = []
    for rate, trip_s in LINKS:
        for _ in range(_rounds(lab)):
            with far(rate, trip_s) as (at, server):
                _save(lab, at, server, f"{_name(rate, trip_s)}, save")
                _restore(lab, at, server, f"{_name(rate, trip_s)}, restore")
                if can_overlap():
                    _restore(lab, at, server, f"{_name(rate, trip_s)}, overlap", overlap=True, check=True)
        found += [*link_rows(lab, rate, trip_s), overlap_row(lab, rate, trip_s)]
    for _ in range(_rounds(lab)):
        with far(*SMALL_LINK) as (at, server):
            _save(lab, at, server, "small", size=SMALL, repeats=SMALL_SAVES)
    return [*found, small_row(lab)]


def _name(rate: float, trip_s: float) -> str:
    return f"{rate / 1e6:.0f} Mbit/s, {1e3 * trip_s:.0f} ms"


def _save(lab: Lab, at: Endpoint, server: Any, into: str, **more: Any) -> None:
    """A measurement with the bytes of bodies that went over the link in it. Without a rehearsal, whose bytes would be among them."""
    server.reset()
    found = lab.run(WHO, "save", f"s3://{at.bucket}/link", at=at, into=into, rehearse=False, **more)
    counts = server.counts()
    found["link_bytes"] = counts["bytes_received"] / more.get("repeats", 1)
    found["requests"] = counts["requests"]


def _restore(lab: Lab, at: Endpoint, server: Any, into: str, **more: Any) -> None:
    server.reset()
    found = lab.run(WHO, "restore", f"s3://{at.bucket}/link", at=at, into=into, **more)
    found["requests"] = server.counts()["requests"]


def link_rows(lab: Lab, rate: float, trip_s: float) -> list[Row]:
    link = _name(rate, trip_s)
    saves, restores = (lab.of(f"{link}, {action}", WHO) for action in ("save", "restore"))
    n_bytes = middle(figures(saves, "link_bytes"))
    found = []
    for what, samples, key in (
        ("save", saves, "seconds"),
        ("restore()", restores, "called"),
        ("restore, with the making of the Checkpointer", restores, "seconds"),
    ):
        words, asked = f"{WHO}, {what}: {link} of round trip", "≤ 1.08 × (bytes ÷ rate) + 0.5 s"
        if n_bytes is None or not figures(samples, key):
            found.append(missing("links", words, asked, errors([*saves, *samples])))
            continue
        least = n_bytes * 8 / rate
        note = f"{n_bytes / 1e6:.0f} MB; processor time {middle(figures(samples, 'cpu')):.2f} s"
        found.append(row("links", words, asked, figures(samples, key), bar=1.08 * least + 0.5, floor=least, note=note))
    return found


def can_overlap() -> bool:
    return "overlap" in inspect.signature(fastckpt.Checkpointer.restore).parameters


def overlap_row(lab: Lab, rate: float, trip_s: float) -> Row:
    link = _name(rate, trip_s)
    words, asked = f"{WHO}.restore(overlap=True), until it returns: {link}", "≤ 0.40 × a plain restore"
    own, plain = lab.of(f"{link}, overlap", WHO), middle(figures(lab.of(f"{link}, restore", WHO), "called"))
    if plain is None or not figures(own, "called"):
        return missing("links", words, asked, errors(own) if can_overlap() else "this version has no overlap=")
    note = f"the first forward can start then; all is there after {in_seconds(own, 'settled')}, and a plain restore after {plain:.3f} s"
    return row(
        "links", words, asked, figures(own, "called"), bar=0.4 * plain, against={"plain restore": plain}, note=note
    )


def small_row(lab: Lab) -> Row:
    samples = lab.of("small", WHO)
    rate, trip_s = SMALL_LINK
    words = f"{WHO}, save of a state of 21 MB, warm connections: {_name(rate, trip_s)} of round trip"
    asked = "≤ 5 round trips + bytes ÷ rate + 0.2 s"
    n_bytes = middle(figures(samples, "link_bytes"))
    if n_bytes is None or not figures(samples):
        return missing("links", words, asked, errors(samples))
    least = n_bytes * 8 / rate
    seconds = [value for one in samples for value in one["all"]["seconds"][1:]]
    trips = ((middle(seconds) or 0.0) - least) / trip_s
    asked_for = ", ".join(f"{verb} {n / SMALL_SAVES:.1f}" for verb, n in samples[-1]["requests"].items())
    note = f"{n_bytes / 1e6:.1f} MB; {trips:.1f} round trips beyond bytes ÷ rate; requests of a save, opening included: {asked_for}"
    return row("links", words, asked, seconds, bar=5 * trip_s + least + 0.2, floor=least, note=note)
