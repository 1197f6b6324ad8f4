"""ls, show and check of single containers."""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

from fastckpt.cli.output import BAD_CHECKPOINT, FOUND_DAMAGE, OK, bar, human, print_json, say, table
from fastckpt.cli.target import open_source
from fastckpt.errors import CheckpointError, NotACheckpointError
from fastckpt.format.container import MAGIC
from fastckpt.format.directory import TensorEntry
from fastckpt.format.records import transform_of
from fastckpt.format.tensor_names import dotted, to_json
from fastckpt.reading.chunk_reader import Reader, storage_bytes, summary
from fastckpt.reading.chunk_reader import is_container as is_ours
from fastckpt.reading.sources import PathSource, Source
from fastckpt.upkeep.check import container as checking


def is_container(path: Path) -> bool:
    source = PathSource(str(path))
    try:
        return is_ours(source)
    finally:
        source.close()


def list_files(text: str) -> list[dict[str, Any]]:
    """What `ls` says about a file, or about each container in a folder."""
    path = Path(text)
    paths = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    found: list[dict[str, Any]] = []
    for item in paths:
        if not is_container(item):
            if path.is_dir():
                continue
            raise NotACheckpointError(f"{item} is no fastckpt container")
        source = PathSource(str(item))
        try:
            found.append({"path": str(item), "error": None, **summary(Reader.open(source, alone=True))})
        except CheckpointError as error:
            found.append({"path": str(item), "error": str(error)})
        finally:
            source.close()
    return found


def print_files(found: list[dict[str, Any]]) -> None:
    rows = [["file", "size", "state", "tensors", ""]]
    for one in found:
        if one["error"] is None:
            sizes = [human(one["container_bytes"]), human(one["raw_bytes"]), str(one["tensors"]), ""]
        else:
            sizes = ["", "", "", "damaged or unsupported: see fastckpt check"]
        rows.append([one["path"], *sizes])
    table(rows, right=(1, 2, 3))


def tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    value = {**entry._asdict(), "name": to_json(entry.name)}
    place = value.pop("place")
    value["global"] = None if place is None else dataclasses.asdict(place)
    return value


def show(arguments: argparse.Namespace) -> int:
    source = open_source(arguments.path, arguments.endpoint_url)
    try:
        _require(source)
        reader = Reader.open(source, alone=True)
    finally:
        source.close()
    groups = transforms(reader)
    if arguments.json:
        tensors = [tensor_to_json(t) for t in reader.directory.tensors]
        value = {"path": arguments.path, "writer": reader.directory.writer, "step": reader.directory.step}
        print_json("show", {**value, **summary(reader), "transforms": groups, "tensors": tensors})
        return OK
    if reader.directory.tensors:
        rows = [["tensor", "type", "shape", "kind"]]
        rows += [[dotted(t.name), t.dtype, str(list(t.shape)), t.kind] for t in reader.directory.tensors]
        table(rows)
        say()
    rows = [["stored as", "chunks", "state", "in the file", "ratio"]]
    for group in groups:
        ratio = f"{group['stored_bytes'] / group['raw_bytes']:.3f}"
        sizes = [str(group["chunks"]), human(group["raw_bytes"]), human(group["stored_bytes"]), ratio]
        rows.append([str(group["transform"]), *sizes])
    if groups:
        table(rows, right=(1, 2, 3, 4))
    total = summary(reader)
    writer = " ".join(f"{key} {value}" for key, value in reader.directory.writer.items() if key != "name")
    say(f"{arguments.path}: {human(total['container_bytes'])} for {human(storage_bytes(reader))} of state ({writer})")
    return OK


def _require(source: Source) -> None:
    """NotACheckpointError for what never was a container: nothing of ours is damaged there."""
    if source.n_bytes == 0:
        raise NotACheckpointError(f"{source.name} is no fastckpt container: it is empty")
    if not is_ours(source):
        head = bytearray(min(len(MAGIC), source.n_bytes))
        source.read_into(0, head)
        raise NotACheckpointError(
            f"{source.name} is no fastckpt container: it starts with {bytes(head)!r}, not {MAGIC!r} "
            "(of files of torch.save and safetensors this command knows nothing; fastckpt.load reads them)"
        )


def transforms(reader: Reader) -> list[dict[str, Any]]:
    """How the chunks are stored: sums for each transform."""
    groups: dict[str, dict[str, int]] = defaultdict(lambda: {"chunks": 0, "raw_bytes": 0, "stored_bytes": 0})
    seen: set[tuple[int, int]] = set()
    for record in reader.records:
        place, stored = (int(record["file"]), int(record["offset"])), int(record["stored_bytes"])
        shared = stored > 0 and place in seen
        seen.add(place)
        group = groups["equal to another" if shared else transform_of(record)]
        group["chunks"] += 1
        group["raw_bytes"] += int(record["raw_bytes"])
        group["stored_bytes"] += 0 if shared else stored
    return [{"transform": name, **group} for name, group in sorted(groups.items())]


def check(path: str, endpoint_url: str | None) -> checking.Report:
    """Read every byte of one container. NotACheckpointError."""
    source = open_source(path, endpoint_url)
    try:
        _require(source)
        return checking.check(source, bar(path))
    finally:
        source.close()


def report_to_json(report: checking.Report) -> dict[str, Any]:
    return {
        "path": report.source,
        "ok": report.ok,
        "chunks": report.chunks,
        "raw_bytes": report.raw_bytes,
        "damage": [dataclasses.asdict(item) for item in report.damage],
        "not_checked": report.not_checked,
        "tensors_lost": report.tensors,
    }


def print_report(report: checking.Report) -> None:
    if report.ok:
        say(f"{report.source}: ok, {report.chunks} chunks, {human(report.raw_bytes)} verified")
    for item in report.damage:
        say(f"{report.source}: DAMAGED: {item}")
    for words in report.not_checked:
        say(f"{report.source}: NOT CHECKED: {words}")
    if report.tensors:
        say(f"{report.source}: {len(report.tensors)} tensors cannot be restored: {', '.join(report.tensors)}")


__all__ = ["BAD_CHECKPOINT", "FOUND_DAMAGE", "check", "list_files", "print_files", "print_report", "show"]
