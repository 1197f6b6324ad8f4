"""One page of ListObjectsV2."""

from __future__ import annotations

import datetime
import urllib.parse
import xml.etree.ElementTree as Xml
from dataclasses import dataclass


class NotAListingError(ValueError):
    """The answer is something else: a login page, an error with status 200, incomplete XML."""


@dataclass(frozen=True, slots=True)
class Page:
    objects: list[tuple[str, int, float]]
    """Name, bytes, seconds since 1970."""
    next_token: str | None
    """Token of the next page. None: this is the last page."""


def read_page(data: bytes) -> Page:
    """NotAListingError."""
    try:
        root = Xml.fromstring(data)
    except (
        Xml.ParseError,
        LookupError,
        ValueError,
    ) as error:  # the latter two: the XML names an encoding that nobody knows
        raise NotAListingError(f"it is no XML ({error})") from None
    # Servers differ in the namespace, or send none.
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    if root.tag != "ListBucketResult":
        code = root.findtext("Code", "")
        raise NotAListingError(f"it is <{root.tag}> {code}".rstrip())
    quoted = root.findtext("EncodingType") == "url"
    try:
        objects = [_object(entry, quoted) for entry in root.iterfind("Contents")]
    except (ValueError, TypeError) as error:
        raise NotAListingError(f"an entry of it cannot be read ({error})") from None
    more = root.findtext("IsTruncated", "false") == "true"
    token = root.findtext("NextContinuationToken")
    if more and not token:
        raise NotAListingError("it says that there is more, and not where")
    if any(n_bytes < 0 for _, n_bytes, _ in objects):
        raise NotAListingError("an entry of it has less than no bytes")
    return Page(objects, token if more else None)


def _object(entry: Xml.Element, quoted: bool) -> tuple[str, int, float]:
    name = entry.findtext("Key", "")
    # Whole seconds, as in the answer to a HEAD: an object must have only one time.
    text = entry.findtext("LastModified", "")
    if text[10:11] != "T":
        raise ValueError(f"LastModified is {text!r}")
    at = datetime.datetime.fromisoformat(text[:19])  # strptime would take longer than everything else here
    return (
        urllib.parse.unquote_plus(name) if quoted else name,
        int(entry.findtext("Size", "")),
        at.replace(tzinfo=datetime.timezone.utc).timestamp(),
    )
