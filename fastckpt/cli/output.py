"""Output of the commands: statuses, tables, JSON, bars, questions. Text from a checkpoint never reaches the terminal unescaped."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

OK, FOUND_DAMAGE, USAGE, BAD_CHECKPOINT, OS_ERROR, INTERRUPTED = 0, 1, 2, 3, 4, 130

# C0, DEL, C1; characters that change the direction of text or are invisible; line separators; halves of surrogate pairs.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


class WrongUsageError(Exception):
    """The arguments do not make sense."""


def clean(text: object, *, keep_lines: bool = False) -> str:
    """Escape all characters that control a terminal. keep_lines: leave line ends, for our own messages of several lines."""

    def escape(found: re.Match[str]) -> str:
        code = ord(found[0])
        if code == 10 and keep_lines:
            return "\n"
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 1 << 16 else f"\\U{code:08x}"

    return _UNSAFE.sub(escape, str(text))


def say(text: object = "") -> None:
    """Print one line of data to stdout."""
    print(clean(text))


def note(text: object) -> None:
    """Print a message for people to stderr."""
    print(clean(text, keep_lines=True), file=sys.stderr)


def print_json(name: str, value: dict[str, Any]) -> None:
    """Print one object to stdout. Characters that JSON allows but that control terminals are escaped in JSON's way."""

    def escape(found: re.Match[str]) -> str:
        return json.dumps(found[0])[1:-1].replace("\x7f", "\\u007f")

    print(_UNSAFE.sub(escape, json.dumps({"schema": f"fastckpt.{name}/1", **value}, ensure_ascii=False)))


def human(n_bytes: float) -> str:
    """A size for people: 1536 → 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError("unreachable")


def table(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> None:
    """Print columns to stdout. right: numbers of the right-aligned columns."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        print("  ".join(padded).rstrip())


def bar(label: str, *, always: bool = False) -> Callable[[int, int], None]:
    """Make a progress callback that draws a bar on stderr, if that is a terminal. Its arguments are the amount done and the total.

    always: draw it elsewhere, too.
    """
    if not always and not sys.stderr.isatty():
        return lambda done, total: None
    shown = -1

    def draw(done: int, total: int) -> None:
        nonlocal shown
        if done >= total:
            shown = -1
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            return
        percent = 100 * done // total
        if percent != shown:
            shown = percent
            filled = 30 * done // total
            text = f"\r{clean(label)} [{'#' * filled}{'.' * (30 - filled)}] {percent:2} %"
            print(text, end="", file=sys.stderr, flush=True)

    return draw


def confirm(question: str, *, yes: bool, json_only: bool) -> bool | None:
    """Ask whether to go on: True for --yes, or for "y" typed at a terminal. None: nobody can be asked; then the status is USAGE."""
    if yes:
        return True
    if json_only or not sys.stdin.isatty():
        note("fastckpt: nothing was changed: pass --yes to do this without being asked")
        return None
    print(f"{clean(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    note("nothing was changed")
    return False
