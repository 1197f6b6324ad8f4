"""Sealed JSON: small objects that people can read, and in which any damage is noticed (docs/format.md, section 11.1)."""

from __future__ import annotations

import json
import re
from typing import Any

from fastckpt.errors import CorruptCheckpointError, Damage, UnsupportedFormatError
from fastckpt.format.digest import digest
from fastckpt.format.json_text import load_json

FORMAT = 1
MAX_SEALED_BYTES = 64 << 20

_SEAL = re.compile(rb',\n"digest": "([0-9a-f]{32})"\n}\n')
_SEAL_BYTES = 2 + len('"digest": ""') + 32 + 3


def seal(kind: str, members: dict[str, Any]) -> bytes:
    """The bytes of an object. The same content gives the same bytes. ValueError for NaN and for values that JSON cannot hold."""
    content = {"fastckpt": kind, "format": FORMAT, **members}
    lines = [f"{_text(key)}: {_text(content[key])}" for key in sorted(content)]
    body = ("{\n" + ",\n".join(lines)).encode()
    return body + f',\n"digest": "{digest(body).hex()}"\n}}\n'.encode()


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ": "), ensure_ascii=False, allow_nan=False)


def seal_of(data: bytes) -> str:
    """The digest inside a sealed object, which identifies its content. `data` comes from `seal` or has passed `unseal`."""
    return data[-_SEAL_BYTES:].decode().split('"')[3]


def unseal(data: bytes, kind: str | tuple[str, ...], source: str) -> dict[str, Any]:
    """Check and read a sealed object of one of these kinds. CorruptCheckpointError or UnsupportedFormatError; source: a name for their
    texts.

    The result holds `digest`, and `fastckpt` with the kind. The caller checks the other members.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    expected = " or ".join(kinds)
    found = _SEAL.fullmatch(data[-_SEAL_BYTES:])
    if found is None:
        raise _damaged(source, expected, "end", "a seal", repr(data[-_SEAL_BYTES:])[:120])
    actual = digest(data[:-_SEAL_BYTES]).hex()
    if actual != found[1].decode():
        raise _damaged(source, expected, "digest", found[1].decode(), actual)
    value = load_json(data, expected, source)
    if not isinstance(value, dict) or value.get("fastckpt") not in kinds:
        what = value.get("fastckpt") if isinstance(value, dict) else value
        raise _damaged(source, expected, "fastckpt", expected, repr(what)[:80])
    if value.get("format") != FORMAT:
        raise UnsupportedFormatError(
            f"{source} needs a newer fastckpt: it has format {value.get('format')!r:.40} (known: {FORMAT}). "
            "Upgrade with `pip install -U fastckpt-engine`"
        )
    return value


def _damaged(source: str, kind: str, place: str, expected: str, found: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(source, [Damage(kind, place, expected, found)])
