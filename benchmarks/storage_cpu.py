"""Rows of processor time: what a save costs a client whose server costs nothing (this project's null server, a process of its own)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.storage_contenders import OURS
from benchmarks.storage_lab import Lab, null
from benchmarks.storage_rows import Row, errors, figures, middle, missing, row

SCHEMES = ("http", "https")
PROCESSES = (1, 2)
FLOOR, PUTS, WHOLE = "encode alone", "obstore PUT", "state to server"
SIGNED = "obstore PUT, signed"


def count(lab: Lab) -> int:
    return lab.rounds * (1 + len(SCHEMES) * (len(OURS) + 1) + 1 + len(PROCESSES))


def measure(lab: Lab) -> list[Row]:
    for number in range(lab.rounds):
        asked = {"state": str(lab.state()), "folder": str(lab.work), "encode_only": True}
        lab.keep("cpu", FLOOR, lab.process("benchmarks.storage_floor", FLOOR, asked))
        for scheme in SCHEMES[number % 2 :] + SCHEMES[: number % 2]:
            with null(tls=scheme == "https") as (at, _):
                for name in (*OURS, PUTS, *([SIGNED] if scheme == "http" else [])):
                    root = f"s3://{at.bucket}/{OURS.index(name) if name in OURS else 'puts'}"
                    lab.run(name, "save", root, at=at, into=f"cpu, {scheme}", source=f"s3://{at.bucket}/0", repeats=2)
        for n in PROCESSES:
            with null() as (at, _):
                place = {"root": f"s3://{at.bucket}/run", "size": lab.size, "endpoint": at.url}
                asked = {"place": place, "state": str(lab.state()), "processes": n}
                lab.keep(
                    f"{WHOLE}, {n}",
                    OURS[0],
                    lab.process("benchmarks.storage_processes", f"{n} processes", asked, at=at),
                )
    return rows(lab)


def rows(lab: Lab) -> list[Row]:
    floors = lab.of("cpu", FLOOR)
    encode, n_bytes = middle(figures(floors, "encode_cpu")), middle(figures(floors, "raw_bytes"))
    if encode is None or n_bytes is None:
        return [missing("cpu", "processor time of a save", "", errors(floors))]
    gib = n_bytes / 2**30
    found = []
    for scheme in SCHEMES:
        what = f"cpu, {scheme}"
        put = middle(figures(lab.of(what, PUTS), "cpu"))
        for name in OURS:
            words = f"client CPU per GiB of state, {name} → null server, {scheme}"
            asked = "≤ 1.3 × (obstore put alone + our encode alone)"
            used = per_gib(lab.of(what, name), gib)
            if put is None or not used:
                found.append(missing("cpu", words, asked, _why(lab, what, name)))
                continue
            parts = {"obstore put": put / gib, "encode": encode / gib}
            signed = middle(per_gib(lab.of(what, SIGNED), gib))
            parts |= {"obstore put, signed": signed} if signed is not None else {}
            bar, floor = 1.3 * (put + encode) / gib, (put + encode) / gib
            found.append(row("cpu", words, asked, used, unit="s/GiB", bar=bar, against=parts, floor=floor))
    put = middle(figures(lab.of("cpu, http", PUTS), "cpu"))
    floor = None if put is None else (put + encode) / gib
    return found + [_whole(lab, n, encode / gib, floor, gib) for n in PROCESSES]


def per_gib(samples: Sequence[dict[str, Any]], gib: float) -> list[float]:
    return [value / gib for value in figures(samples, "cpu")]


def _why(lab: Lab, *whats: str) -> str:
    what, name = whats
    samples = [*lab.of(what, name), *lab.of(what, PUTS)]
    return errors(samples)


def _whole(lab: Lab, n: int, encode: float, floor: float | None, gib: float) -> Row:
    samples = lab.of(f"{WHOLE}, {n}", OURS[0])
    words = f"state → snapshot → null server, http, {n} process{'es' if n > 1 else ''}: client CPU per GiB"
    asked = "≤ 1.4 × encode alone"
    if not figures(samples, "cpu"):
        return missing("cpu", words, asked, _why(lab, f"{WHOLE}, {n}", OURS[0]))
    rate = middle([n * gib * 2**30 / 1e9 / value for value in figures(samples)])
    note = f"{rate:.2f} GB/s of state, all processes together; floor: encode alone and obstore's put"
    return row("cpu", words, asked, per_gib(samples, gib), unit="s/GiB", bar=1.4 * encode, floor=floor, note=note)
