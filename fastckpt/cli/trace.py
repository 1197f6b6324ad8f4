"""trace: a recording of events as a timeline for Perfetto, a picture and a table."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from fastckpt._version import __version__
from fastckpt.cli.output import OK, WrongUsageError, human, note, print_json, say, table
from fastckpt.cli.target import local_path, refuse_existing
from fastckpt.host.files import AtomicFile
from fastckpt.host.sink import committing
from fastckpt.trace import Recording, Summary, draw, read, summarize, to_chrome
from fastckpt.trace.stages import ENCODE, STAGE, STALL, UPLOAD
from fastckpt.trace.summary import Save, to_json

HELP = "show where the time of recorded saves went: a timeline, a picture, a table"

_BATCH = 5000
_WORDS = {"equal": "equal", "difference": "differences", "cast": "cast", "full": "in full"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fastckpt trace`. It reads no store, so it takes no --endpoint-url."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="what FASTCKPT_TRACE or events.record wrote; several are merged"
    )
    parser.add_argument(
        "--out", metavar="DIR|FILE", help="where to write: a folder, or a name that ends in .json (default: beside RUN)"
    )
    parser.add_argument(
        "--png", action=argparse.BooleanOptionalAction, default=True, help="draw the picture too; needs matplotlib"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")


def run(arguments: argparse.Namespace) -> int:
    """Write the trace and the picture, print a row for each save. RecordingError, OSError."""
    paths = [_path(text) for text in arguments.runs]
    trace_path, png_path = _outputs(paths[0], arguments.out)
    refuse_existing([trace_path, *([png_path] if arguments.png else [])], arguments.force)
    folder = trace_path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} does not exist: make it first")
    recordings = [read(path) for path in paths]
    summary = summarize(recordings)
    _write_trace(trace_path, recordings)
    drawn = arguments.png and _write_png(png_path, summary, recordings)
    if arguments.json:
        written = {"trace": str(trace_path), "png": str(png_path) if drawn else None}
        print_json("trace", {**written, **to_json(recordings, summary)})
        return OK
    for recording in recordings:
        for sentence in recording.notes:
            note(f"fastckpt: {sentence}")
    _print(summary, len(recordings) > 1)
    note(f"{trace_path}: open it in https://ui.perfetto.dev or chrome://tracing")
    if drawn:
        note(f"{png_path}: the same as a picture")
    return OK


def _path(text: str) -> Path:
    path = local_path(text)
    if path is None:
        raise WrongUsageError(f"{text!r} is no file: a recording is read from disk; download it first")
    return path


def _outputs(first: Path, out: str | None) -> tuple[Path, Path]:
    """Path of the trace, and path of the picture."""
    stem = first.stem if first.suffix in (".jsonl", ".json") else first.name
    if out is not None and not os.path.isdir(out) and not out.endswith(os.sep):
        chosen = Path(out)
        if chosen.suffix != ".json":
            raise WrongUsageError(f"--out {out!r} is no folder, and a file to write must end in .json")
        name = chosen.name.removesuffix(".json").removesuffix(".trace")
        return chosen, chosen.with_name(f"{name}.png")
    folder = first.parent if out is None else Path(out)
    return folder / f"{stem}.trace.json", folder / f"{stem}.png"


def _write_trace(path: Path, recordings: Sequence[Recording]) -> None:
    with committing(AtomicFile(str(path))) as sink:
        other = {"fastckpt": __version__, "recordings": [recording.label for recording in recordings]}
        sink.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(other)},"traceEvents":[\n'.encode())
        batch: list[str] = []
        separator = ""
        for event in to_chrome(recordings):
            batch.append(separator + json.dumps(event, separators=(",", ":"), allow_nan=False))
            separator = ",\n"
            if len(batch) == _BATCH:
                sink.write("".join(batch).encode())
                batch = []
        sink.write(("".join(batch) + "\n]}\n").encode())


def _write_png(path: Path, summary: Summary, recordings: Sequence[Recording]) -> bool:
    """Draw the picture. If matplotlib is missing, print that and return False."""
    try:
        picture = draw(summary, ", ".join(recording.name for recording in recordings)[:120])
    except ImportError:
        note("fastckpt: no picture: matplotlib is not installed (pip install matplotlib); --no-png leaves it out")
        return False
    with committing(AtomicFile(str(path))) as sink:
        sink.write(picture)
    return True


def _print(summary: Summary, several: bool) -> None:
    if summary.saves:
        against = any(save.against or save.why_full for save in summary.saves)
        more = ["against the one before"] if against else []
        rows = [
            ["save", "size", "stored", "total s", "stage s", "encode s", "upload s", "stall s", *more, "bottleneck"]
        ]
        for save in summary.saves:
            name = f"step {save.step}" if save.step is not None else save.target
            rows.append(
                [
                    f"{name} ({save.process})" if several else name,
                    human(save.raw_bytes),
                    human(save.stored_bytes),
                    _seconds(save.seconds),
                    _seconds(save.wall_s(STAGE)),
                    _seconds(save.busy_s(ENCODE)),
                    _seconds(save.wall_s(UPLOAD)),
                    _seconds(save.busy_s(STALL)),
                    *([_against(save)] if against else []),
                    save.bottleneck if save.state != "failed" else f"failed: {save.error}",
                ]
            )
        table(rows, right=range(1, 8))
        say("encode: summed over threads; the others as time passed")
    else:
        note("no saves were recorded")
    for load in summary.loads:
        seconds = load.end_s - load.start_s
        speed = f", {load.raw_bytes / seconds / 1e9:.2f} GB/s" if seconds > 0 else ""
        say(f"load of {load.source}: {human(load.raw_bytes)} in {_seconds(seconds)} s{speed}")
    if summary.other_stall_s:
        say(f"training waited another {_seconds(summary.other_stall_s)} s outside of these saves")
    if summary.deferred:
        say(f"at {summary.deferred} steps a save was due and had to wait for earlier ones")


def _against(save: Save) -> str:
    """What became of its bytes, in words."""
    if save.why_full:
        return f"full: {save.why_full}"
    total = sum(save.against.values())
    return ", ".join(f"{100 * n / total:.0f} % {_WORDS[what]}" for what, n in save.against.items())


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}"
