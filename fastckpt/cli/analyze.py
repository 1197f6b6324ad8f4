"""analyze: measures how much compression and deltas would gain on a user's own state."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastckpt import api
from fastckpt.cli.output import OK, WrongUsageError, bar, human, note, print_json, say, table
from fastckpt.cli.target import add_endpoint, local_path, maybe_repository, open_source, options
from fastckpt.errors import CheckpointError, NoCheckpointError, NotACheckpointError
from fastckpt.format.element_types import element_type
from fastckpt.format.repository_records import Commit
from fastckpt.kernels import kernels
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_loader import load_object
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.rank_reader import open_rank
from fastckpt.repository.repository import Repository
from fastckpt.state import Captured, capture
from fastckpt.upkeep.analyze import Base, CodingResult, TensorGroup, analyze
from fastckpt.upkeep.dry_saves import RowOfSaves, for_dry_saves, row_of_saves
from fastckpt.upkeep.stored_base import stored_base

HELP = "what compression and deltas would gain on this state; writes nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt analyze`."""
    add_endpoint(parser)
    parser.add_argument(
        "path", metavar="FILE|URL", help="of fastckpt, torch.save or safetensors; of a repository the newest checkpoint"
    )
    parser.add_argument("--against", metavar="OLDER", help="an older state, to see what a delta would gain")
    parser.add_argument(
        "--saves",
        type=int,
        metavar="N",
        help="with --against FILE: also N saves in a row, each as far from the one before",
    )
    parser.add_argument(
        "--trust-pickle", action="store_true", help="load files that weights_only refuses: runs their code"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a row for each group of tensors. WrongUsageError, CheckpointError, StoreError, OSError."""
    if arguments.saves is not None and (arguments.saves < 1 or arguments.against is None):
        raise WrongUsageError(f"--saves is {arguments.saves}: expected a number ≥ 1, and --against")
    captured, row = _state(arguments.path, arguments), None
    with _older(arguments) as older:
        if arguments.saves is not None and not isinstance(older, Captured):
            raise WrongUsageError(
                f"--saves needs a state to go back to: {arguments.against} is a repository; name a file"
            )
        groups = analyze(captured, older, bar(arguments.path), options())
        if arguments.saves is not None and isinstance(older, Captured):
            row = row_of_saves(captured, older, arguments.saves, options(), bar(f"{arguments.saves} saves"))
    if arguments.json:
        sums: dict[str, Any] = {
            "raw_bytes": _sum(groups, "raw_bytes"),
            "full_bytes": _full(groups),
            "next_bytes": _next(groups),
        }
        sums |= {"saves": None if row is None else _row_to_json(row)}
        value = {"path": arguments.path, "against": arguments.against, "kernels": kernels().name}
        value |= {"effort": for_dry_saves(options()).effort, **sums}
        print_json("analyze", {**value, "groups": [_to_json(group) for group in groups]})
        return OK
    if not groups:
        note("no tensors here")
        return OK
    _print(groups, older is not None)
    if row is not None:
        _print_row(row, _full(groups))
    return OK


def _row_to_json(row: RowOfSaves) -> dict[str, Any]:
    return {
        "stored_bytes": row.stored_bytes,
        "read_amplification": [round(one.amplification, 4) for one in row.stored],
        "longest_chain": max(one.longest_chain for one in row.stored),
    }


def _print_row(row: RowOfSaves, full_bytes: int) -> None:
    mean, most = sum(row.stored_bytes) / len(row.stored_bytes), max(row.stored_bytes)
    read = max(one.amplification for one in row.stored)
    say(
        f"{len(row.stored_bytes)} saves in a row: {human(mean)} on average ({mean / max(full_bytes, 1):.3f} of a full one), {human(most)} "
        f"at most; a restore reads {read:.2f} times a full one at most"
    )


@contextmanager
def _older(arguments: argparse.Namespace) -> Iterator[Captured | Base | None]:
    """What --against names: a state, or the newest checkpoint of a repository with all that it refers to (rank 0)."""
    if arguments.against is None:
        yield None
        return
    with maybe_repository(arguments.against, arguments.endpoint_url) as repository:
        if repository is not None:
            commit = _newest(repository)
            with stored_base(open_rank(repository.store, commit, 0), commit, options()) as base:
                yield base
            return
    yield _state(arguments.against, arguments)


def _newest(repository: Repository) -> Commit:
    choice = Catalog(repository).choose()
    if choice is None:
        raise NoCheckpointError(f"{repository.url} has no checkpoint yet")
    return choice.commit


def _state(text: str, arguments: argparse.Namespace) -> Captured:
    """Load and capture the tensors of a file of fastckpt, torch.save or safetensors, or of a repository's newest checkpoint (rank 0)."""
    with maybe_repository(text, arguments.endpoint_url) as repository:
        if repository is not None:
            reader = open_rank(repository.store, _newest(repository), 0)
            return _capture(text, lambda: _load(reader, arguments), arguments)
    path = local_path(text)
    if path is not None:
        trusted = arguments.trust_pickle
        return _capture(text, lambda: api.load(path, map_location="cpu", weights_only=not trusted), arguments)
    source = open_source(text, arguments.endpoint_url)
    try:
        return _capture(text, lambda: _load(Reader.open(source, alone=True), arguments), arguments)
    finally:
        source.close()


def _capture(text: str, load: Callable[[], Any], arguments: argparse.Namespace) -> Captured:
    """Capture the loaded state. WrongUsageError: --trust-pickle would load it; NotACheckpointError: no option would."""
    try:
        return capture(load(), pickle, 2)
    except (CheckpointError, OSError, MemoryError):
        raise
    except Exception as error:  # damage, or code in the file, can make torch's unpickler raise anything
        lines = str(error).splitlines() or [""]
        # From torch's page of advice, the line that names the global.
        reason = next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
        reason = f"{type(error).__name__}: {reason}"
        if isinstance(error, pickle.UnpicklingError) and not arguments.trust_pickle:
            raise WrongUsageError(
                f"{text} is not read by a restricted load, which runs no code of the file. If you trust whoever made it, "
                f"--trust-pickle loads it and runs its code. {reason}"
            ) from error
        raise NotACheckpointError(f"{text} cannot be analyzed: {reason}") from error


def _load(reader: Reader, arguments: argparse.Namespace) -> Any:
    found = options()
    return load_object(
        reader,
        found,
        max(found.threads, found.connections),
        map_location="cpu",
        pickle_module=pickle,
        weights_only=not arguments.trust_pickle,
        load_args={"encoding": "utf-8"},
    )


def _print(groups: list[TensorGroup], with_delta: bool) -> None:
    rows = [["group", "tensors", "size", "bits", "entropy", "full", "ratio", "GB/s", "as"]]
    if with_delta:
        rows[0] += ["known", "unchanged", "next", "ratio", "GB/s", "as"]
    for group in groups:
        elements = f"{group.dtype} {group.role}".strip()
        bits = 8 * _width(group)
        row = [elements, str(group.tensors), human(group.raw_bytes), f"{bits:.0f}" if bits else "", ""]
        row[4] = f"{group.entropy_bytes / group.raw_bytes * bits:.2f}" if bits else ""
        row += _side(group.alone, group.raw_bytes)
        if group.delta is not None:
            row += [
                _share(group.based_bytes, group),
                _share(group.same_bytes, group),
                *_side(group.delta, group.raw_bytes),
            ]
        rows.append(row)
    table(rows, right=tuple(range(1, 8)) + tuple(range(9, 14)))
    raw, full = _sum(groups, "raw_bytes"), _full(groups)
    words = f"all: {human(raw)} → {human(full)} in full ({full / max(raw, 1):.4f})"
    found = _next(groups)
    if found is not None:
        words += f"; the next checkpoint against the older state {human(found)} ({found / max(raw, 1):.4f})"
    say(f"{words}, and its index; effort {for_dry_saves(options()).effort}")
    if kernels().name != "native":
        note(f"the speeds are of the {kernels().name} kernels: the native ones are not installed")


def _sum(groups: list[TensorGroup], name: str) -> int:
    return sum(getattr(group, name) for group in groups)


def _full(groups: list[TensorGroup]) -> int:
    """Bytes of packs that a full save would put."""
    return sum(group.alone.stored_bytes for group in groups)


def _next(groups: list[TensorGroup]) -> int | None:
    """Bytes of packs that a save against the older state would put; None: there is none."""
    return sum(group.delta.stored_bytes for group in groups if group.delta) if any(g.delta for g in groups) else None


def _width(group: TensorGroup) -> int:
    element = element_type(group.dtype)
    return 0 if element is None else element.n_bytes


def _share(n_bytes: int, group: TensorGroup) -> str:
    return f"{100 * n_bytes / group.raw_bytes:.0f} %"


def _side(result: CodingResult, raw_bytes: int) -> list[str]:
    names = sorted(result.transforms.items(), key=lambda item: -item[1])
    shares = [f"{name} {100 * n / raw_bytes:.0f} %" if len(names) > 1 else name for name, n in names]
    speed = f"{raw_bytes / result.seconds / 1e9:.1f}" if result.seconds else ""
    return [human(result.stored_bytes), f"{result.stored_bytes / raw_bytes:.4f}", speed, ", ".join(shares)]


def _to_json(group: TensorGroup) -> dict[str, Any]:
    def side(one: CodingResult) -> dict[str, Any]:
        return {"stored_bytes": one.stored_bytes, "seconds": one.seconds, "transforms": dict(one.transforms)}

    return {
        "dtype": group.dtype,
        "role": group.role,
        "tensors": group.tensors,
        "raw_bytes": group.raw_bytes,
        "entropy_bytes": group.entropy_bytes,
        "alone": side(group.alone),
        "delta": None if group.delta is None else side(group.delta),
        "based_bytes": group.based_bytes,
        "same_bytes": group.same_bytes,
    }
