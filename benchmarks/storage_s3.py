"""Rows of whole states and of one tensor in S3: this project and its rivals in front of one server, in turns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.storage_lab import Lab, moto, radosgw, together
from benchmarks.storage_rows import Row, against_best, errors, figures, in_seconds, middle, missing, row

SAVED = (
    ("Checkpointer", "obstore PUT"),  # the second moves what the first has stored
    ("fastckpt.save/load",),
    ("boto3 + torch.save",),
    ("tensorizer",),
    ("moonclip",),
    ("moonclip raw",),
    ("runai",),
)
RESTORED = (
    ("Checkpointer",),
    ("fastckpt.save/load",),
    ("boto3 + torch.save",),
    ("tensorizer",),
    ("moonclip",),
    ("moonclip raw",),
    ("runai",),
)
ONE = (("fastckpt.save/load",), ("Checkpointer",), ("tensorizer",), ("runai",))
ON_MOTO = (("Checkpointer",), ("s3torchconnector",), ("s3torchconnector dcp",))
RESTORE_RIVALS = ("boto3 + torch.save", "tensorizer", "moonclip", "moonclip raw", "runai")
SAVE_RIVALS = ("boto3 + torch.save", "tensorizer", "moonclip", "moonclip raw")
MEMORY_BAR = 256 << 20


def count(lab: Lab) -> int:
    return lab.rounds * sum(len(block) for names in (SAVED, RESTORED, ONE, ON_MOTO) for block in names)


def measure(lab: Lab) -> list[Row]:
    trouble = ""
    for number in range(lab.rounds):
        with radosgw() as at:
            if isinstance(at, str):
                trouble = at
                break
            for action, names in (("save", SAVED), ("restore", RESTORED), ("one", ONE)):
                for name in together(names, number):
                    _one(lab, at, name, action, number)
    for number in range(lab.rounds):
        with moto(lab.rivals) as at:
            if isinstance(at, str):
                break
            for name in together(ON_MOTO, number):
                root = f"s3://{at.bucket}/{_folder(name)}"
                lab.run(name, "save", root, at=at, into="save on moto", rehearse=True)
    return rows(lab, trouble)


def _folder(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _one(lab: Lab, at: object, name: str, action: str, number: int) -> None:
    root = f"s3://{at.bucket}/{_folder(name)}"  # type: ignore[attr-defined]
    source = f"s3://{at.bucket}/Checkpointer"  # type: ignore[attr-defined]
    lab.run(name, action, root, at=at, source=source, check=number == 0)  # type: ignore[arg-type]


def rows(lab: Lab, trouble: str = "") -> list[Row]:
    def rivals(what: str, names: Sequence[str]) -> dict[str, list[dict[str, object]]]:
        return {name: lab.of(what, name) for name in names}

    if trouble:
        return [missing("s3", "saves and restores at radosgw", "", trouble)]
    found = [
        against_best(
            "s3",
            f"restore, radosgw: {name}",
            "≤ 0.9 × the best rival",
            lab.of("restore", name),
            rivals("restore", RESTORE_RIVALS),
            0.9,
            key="called",
            note=f"each byte verified; rivals verify none; the making of it: {in_seconds(lab.of('restore', name), 'opened')}",
        )
        for name in ("Checkpointer", "fastckpt.save/load")
    ]
    found += save_rows(lab)
    found.append(
        against_best(
            "s3",
            "one tensor, S3, warm process",
            "≤ 0.8 × runai and tensorizer",
            lab.of("one", "fastckpt.save/load"),
            rivals("one", ("tensorizer", "runai")),
            0.8,
            note=f"of a Checkpointer's repository: {in_seconds(lab.of('one', 'Checkpointer'))}",
        )
    )
    memory = [value / 2**20 for value in figures(lab.of("restore", "Checkpointer"), "memory")]
    others = {
        name: (middle(figures(lab.of("restore", name), "memory")) or 0.0) / 2**20
        for name in RESTORE_RIVALS
        if figures(lab.of("restore", name), "memory")
    }
    found.append(
        row(
            "s3",
            "Checkpointer.restore, radosgw: peak memory over the live state",
            "≤ 256 MiB",
            memory,
            unit="MiB",
            bar=MEMORY_BAR / 2**20,
            against=others,
            note="others: with the state that they make",
        )
    )
    return found


def save_rows(lab: Lab) -> list[Row]:
    own, puts = lab.of("save", "Checkpointer"), lab.of("save", "obstore PUT")
    floor = middle(figures(puts))
    group, what = "s3", "durable save, radosgw: Checkpointer"
    found = []
    if floor is None or not figures(own):
        found.append(missing(group, f"{what}, against obstore's PUT", "≤ 1.15 ×", errors(own) or errors(puts)))
    else:
        note = f"{(middle(figures(puts, 'bytes')) or 0) / 1e6:.0f} MB are put"
        found.append(
            row(
                group,
                f"{what}, against obstore's PUT of the same bytes alone",
                "≤ 1.15 ×",
                figures(own),
                bar=1.15 * floor,
                floor=floor,
                note=note,
            )
        )
    found.append(
        against_best(
            group,
            what,
            "≤ 0.8 × the best rival",
            own,
            {name: lab.of("save", name) for name in SAVE_RIVALS},
            0.8,
            floor=floor,
        )
    )
    found.append(
        against_best(
            group,
            "durable save, moto: Checkpointer",
            "≤ 0.8 × the best of s3torchconnector's",
            lab.of("save on moto", "Checkpointer"),
            {name: lab.of("save on moto", name) for name in ("s3torchconnector", "s3torchconnector dcp")},
            0.8,
            note="moto is one Python process, and most of the time",
        )
    )
    return found
