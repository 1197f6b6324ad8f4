"""A benchmark's result: one JSON file with all samples, and beside it what is made from it to be read."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import CACHE, RESULTS

Result = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that `publish` reads, besides --quick."""
    parser.add_argument("--out", help="where the results go (default: benchmarks/results; --quick: benchmarks/.cache)")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")


def head(benchmark: str, machine: dict[str, Any]) -> Result:
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"benchmark": benchmark, "date": now.isoformat(timespec="seconds"), "machine": machine}


def save(result: Result, out: Path, name: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result['date'][:10]}-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def publish(result: Result, args: argparse.Namespace, write: Callable[[Path], list[Path]], cache: Path = CACHE) -> None:
    """`write` makes the files beside the JSON, the table first; cache: for quick runs, which are no results."""
    out = Path(args.out) if args.out else cache if args.quick else RESULTS
    path = save(result, out, result["benchmark"] + ("-quick" if args.quick else ""))
    made = write(path)
    print(json.dumps(result) if args.json else made[0].read_text())
    print(f"written: {path} and {', '.join(file.suffix for file in made)} beside it", file=sys.stderr)


def publish_table(result: Result, args: argparse.Namespace, markdown: Callable[[Result], str]) -> None:
    """As `publish`, of a result that has a table and no plot."""

    def write(path: Path) -> list[Path]:
        text = path.with_suffix(".md")
        text.write_text(markdown(result))
        return [text]

    publish(result, args, write)


def write_beside(
    path: Path, markdown: Callable[[Result, str], str], plot: Callable[[Result, Path], None]
) -> list[Path]:
    """Writes the table and the plot beside the JSON."""
    result = json.loads(path.read_text())
    image, text = path.with_suffix(".png"), path.with_suffix(".md")
    plot(result, image)
    text.write_text(markdown(result, image.name))
    return [text, image]


def exit_code(failures: list[str]) -> int:
    for line in failures:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failures else 0
