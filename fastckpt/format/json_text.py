"""Parses untrusted JSON: strict, bounded, with our own errors (docs/format.md, section 5)."""

from __future__ import annotations

import json
import re
from typing import Any

from fastckpt.errors import CorruptCheckpointError, Damage

_MAX_DIGITS = 19
_MANY_DIGITS = re.compile(rb"[0-9]{20}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a member occurs twice in one object")
    return result


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def load_json(data: bytes, part: str, source: str) -> Any:
    """Parse strictly: UTF-8, no lone surrogates, no duplicate members, no NaN, no huge integers.

    CorruptCheckpointError names part and source.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_int=_integer if _MANY_DIGITS.search(data) else None,  # costs a Python call for each integer
            parse_constant=_constant,
        )
        if (
            b"\\u" in data
        ):  # an escape can be half of a surrogate pair, which no text may hold: UnicodeEncodeError, a subclass of ValueError
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        damage = Damage(part, "as a whole", "JSON", f"{type(error).__name__}: {error!s:.200}")
        raise CorruptCheckpointError(source, [damage]) from error
