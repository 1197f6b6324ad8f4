"""The command line: fastckpt ls | show | check. Data to stdout, talk to stderr; `--json` is a contract (docs/cli.md).

exit status
  0    done; nothing wrong
  1    check found damage, or something that it cannot vouch for
  2    wrong usage
  3    not a checkpoint, or damaged so that it cannot be shown, or of another version
  4    the operating system said no: no such file, permission denied, read error
  130  interrupted
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastckpt import check as checking
from fastckpt._version import __version__
from fastckpt.errors import CheckpointError, NotACheckpointError
from fastckpt.format.container import MAGIC
from fastckpt.format.records import transform_of
from fastckpt.format.tensor_names import dotted, to_json
from fastckpt.reader import Reader, storage_bytes, summary
from fastckpt.sources import PathSource

OK, FOUND_DAMAGE, USAGE, BAD_CHECKPOINT, OS_ERROR, INTERRUPTED = 0, 1, 2, 3, 4, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except CheckpointError as error:
        return _fail(arguments, BAD_CHECKPOINT, error)
    except BrokenPipeError:  # `fastckpt show x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        return _fail(arguments, OS_ERROR, error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastckpt",
        description="Look at and check fastckpt checkpoints.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastckpt {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def verb(name: str, run: Callable[[argparse.Namespace], int], words: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=words, description=words)
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout, for machines")
        sub.set_defaults(run=run)
        return sub

    ls = verb("ls", _ls, "list the checkpoints in folders, or the given files")
    ls.add_argument("paths", nargs="*", default=["."], metavar="PATH")
    show = verb("show", _show, "list the tensors of a checkpoint; reads its index only")
    show.add_argument("path", metavar="FILE")
    check = verb("check", _check, "read and verify every byte of checkpoints; names everything that is damaged")
    check.add_argument("paths", nargs="+", metavar="FILE")
    return parser


def _fail(arguments: argparse.Namespace, status: int, error: BaseException) -> int:
    if arguments.json:
        _print_json("error", {"error": type(error).__name__, "message": str(error), "exit": status})
    print(f"fastckpt: {error}", file=sys.stderr)
    return status


def _print_json(name: str, value: dict[str, Any]) -> None:
    print(json.dumps({"schema": f"fastckpt.{name}/1", **value}, ensure_ascii=False))


def human(n_bytes: float) -> str:
    """1536 → 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError("unreachable")


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(cells).rstrip())


def _is_container(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _ls(arguments: argparse.Namespace) -> int:
    found: list[dict[str, Any]] = []
    for text in arguments.paths:
        path = Path(text)
        paths = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for item in paths:
            if not _is_container(item):
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
    if arguments.json:
        _print_json("ls", {"checkpoints": found})
    elif found:
        rows = [["file", "size", "state", "tensors", ""]]
        for one in found:
            if one["error"] is None:
                sizes = [human(one["container_bytes"]), human(one["raw_bytes"]), str(one["tensors"]), ""]
            else:
                sizes = ["", "", "", "damaged or unsupported: see fastckpt check"]
            rows.append([one["path"], *sizes])
        _table(rows, right=(1, 2, 3))
    else:
        print("no checkpoints here", file=sys.stderr)
    return OK


def _show(arguments: argparse.Namespace) -> int:
    source = PathSource(arguments.path)
    try:
        reader = _open(source)
    finally:
        source.close()
    groups = _transforms(reader)
    if arguments.json:
        tensors = [{**dataclasses.asdict(t), "name": to_json(t.name)} for t in reader.directory.tensors]
        for tensor in tensors:
            tensor["global"] = tensor.pop("place")
        value = {"path": arguments.path, "writer": reader.directory.writer, "step": reader.directory.step}
        _print_json("show", {**value, **summary(reader), "transforms": groups, "tensors": tensors})
        return OK
    if reader.directory.tensors:
        rows = [["tensor", "type", "shape", "kind"]]
        rows += [[dotted(t.name), t.dtype, str(list(t.shape)), t.kind] for t in reader.directory.tensors]
        _table(rows)
        print()
    rows = [["stored as", "chunks", "state", "in the file", "ratio"]]
    for group in groups:
        ratio = f"{group['stored_bytes'] / group['raw_bytes']:.3f}"
        sizes = [str(group["chunks"]), human(group["raw_bytes"]), human(group["stored_bytes"]), ratio]
        rows.append([str(group["transform"]), *sizes])
    if groups:
        _table(rows, right=(1, 2, 3, 4))
    total = summary(reader)
    writer = " ".join(f"{key} {value}" for key, value in reader.directory.writer.items() if key != "name")
    print(f"{arguments.path}: {human(total['container_bytes'])} for {human(storage_bytes(reader))} of state ({writer})")
    return OK


def _open(source: PathSource) -> Reader:
    head = bytearray(min(len(MAGIC), source.n_bytes))
    source.read_into(0, head)
    if bytes(head) != MAGIC:
        raise NotACheckpointError(
            f"{source.name} is no fastckpt container: it starts with {bytes(head)!r}, not {MAGIC!r}"
        )
    return Reader.open(source, alone=True)


def _transforms(reader: Reader) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, int]] = defaultdict(lambda: {"chunks": 0, "raw_bytes": 0, "stored_bytes": 0})
    seen: set[int] = set()
    for record in reader.records:
        offset, stored = int(record["offset"]), int(record["stored_bytes"])
        shared = stored > 0 and offset in seen
        seen.add(offset)
        group = groups["equal to another" if shared else transform_of(record)]
        group["chunks"] += 1
        group["raw_bytes"] += int(record["raw_bytes"])
        group["stored_bytes"] += 0 if shared else stored
    return [{"transform": name, **group} for name, group in sorted(groups.items())]


def _progress(path: str) -> Callable[[int, int], None]:
    """A bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        return lambda done, total: None

    def draw(done: int, total: int) -> None:
        if done == total:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        elif done % 8 == 0:
            filled = 30 * done // total
            print(f"\r{path} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}", end="", file=sys.stderr, flush=True)

    return draw


def _check(arguments: argparse.Namespace) -> int:
    reports, errors = [], []
    for path in arguments.paths:
        source = PathSource(path)
        try:
            reports.append(checking.check(source, _progress(path)))
        except CheckpointError as error:  # the others are still worth checking
            errors.append((path, error))
        finally:
            source.close()
    if arguments.json:
        checked = [
            {
                "path": report.source,
                "ok": report.ok,
                "chunks": report.chunks,
                "raw_bytes": report.raw_bytes,
                "damage": [dataclasses.asdict(item) for item in report.damage],
                "not_checked": report.not_checked,
                "tensors_lost": report.tensors,
            }
            for report in reports
        ]
        failed = [{"path": path, "error": type(e).__name__, "message": str(e)} for path, e in errors]
        _print_json("check", {"checked": checked, "failed": failed})
    else:
        for report in reports:
            if report.ok:
                print(f"{report.source}: ok, {report.chunks} chunks, {human(report.raw_bytes)} verified")
            for item in report.damage:
                print(f"{report.source}: DAMAGED: {item}")
            for words in report.not_checked:
                print(f"{report.source}: NOT CHECKED: {words}")
            if report.tensors:
                print(f"{report.source}: {len(report.tensors)} tensors cannot be restored: {', '.join(report.tensors)}")
        for _, failure in errors:
            print(f"fastckpt: {failure}", file=sys.stderr)
    if errors:
        return BAD_CHECKPOINT
    return OK if all(report.ok for report in reports) else FOUND_DAMAGE


if __name__ == "__main__":
    sys.exit(main())
