"""Interprets a caller's text or path object: a path of this machine, or a URL.

pathlib joins slashes: `Path("s3://bucket/run")` is `s3:/bucket/run`. As a path, that would be a directory "s3:" on the local disk, and its
checkpoints would be lost with the machine. So the URL schemes of stores are accepted with one slash, too.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from typing import Any

from fastckpt.errors import StoreError

_SCHEMES = "s3|s3a|gs|gcs|az|abfs|abfss|azure|memory|file|http|https|hdfs|hf"
_COLLAPSED = re.compile(rf"({_SCHEMES}):(?:/(?!/)(.+))?", re.DOTALL)
_MISTYPED = re.compile(r"(s3|s3a|s3n|gs|gcs|az|abfs|abfss|hdfs)(//|:(?!/))(.+)", re.DOTALL)
"""A URL without its colon or its slashes."""
_INSIDE = re.compile(rf"(.*/)({_SCHEMES}):/+(?=.)", re.DOTALL)


def location(target: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> str:
    """The path or URL of `target`, as text; for a file URL its path.

    A path object whose text is a URL counts as that URL, even if pathlib has left only one slash. StoreError for a file URL without an
    absolute path, and for a URL that was made absolute as if it were a path (`Path("s3://bucket/run").resolve()`), unless a directory of
    that odd name is there already.
    """
    text = os.fsdecode(os.fspath(target))
    collapsed = _COLLAPSED.fullmatch(text)
    if collapsed:
        # "file:/dir" gets back its third slash, "s3:/bucket" its second.
        slash = "/" if collapsed[1] == "file" and collapsed[2] else ""
        text = f"{collapsed[1]}://{slash}{collapsed[2] or ''}"
    scheme, separator, rest = text.partition("://")
    if not separator or "/" in scheme:
        _refuse_mistyped(text)
        _refuse_inside(text)
        return text
    return _path_of_file_url(text, rest) if scheme == "file" else text


def describe(target: Any) -> str:
    """The name of a caller's target in messages: a path or URL by its own text, a file object by its name or type."""
    if isinstance(target, (str, os.PathLike)):
        return os.fsdecode(os.fspath(target))
    return str(getattr(target, "name", None) or f"<{type(target).__name__}>")


def is_url(text: str) -> bool:
    """Whether a result of `location` is a URL."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and "/" not in scheme


def _path_of_file_url(url: str, rest: str) -> str:
    host, slash, path = rest.partition("/")
    path = urllib.parse.unquote(path)
    if host.lower() not in ("", "localhost") or not slash or "\0" in path or path.lstrip("/").startswith("~"):
        raise StoreError(
            f"{url!r} is no file URL: expected file:///absolute/path; a ~ stands for a home directory only in paths"
        )
    return "/" + path.lstrip("/")


def _refuse_mistyped(path: str) -> None:
    found = _MISTYPED.fullmatch(path)
    first = path.partition("/")[0]
    if found and not os.path.lexists(first):
        raise StoreError(
            f"{path!r} would become a directory {first!r} on this machine. Is {found[1] + '://' + found[3]!r} meant? For a "
            "directory that is really called so, write ./ before it"
        )


def _refuse_inside(path: str) -> None:
    found = _INSIDE.match(path)
    if found and not os.path.isdir(f"{found[1]}{found[2]}:"):
        url = f"{found[2]}://{path[found.end() :]}"
        raise StoreError(
            f"{path!r} is a URL that was taken for a path: it would become a directory {found[2] + ':'!r} on this machine. Give {url!r} as "
            f"a string; for a directory that is really called so, make {found[1] + found[2] + ':'!r} first"
        )
