"""Translates obstore's exceptions into StoreError's subclasses.

Their text repeats URLs and whole answers, which may hold a signature or a token. So only the status, the server's code and the first
words are passed on, without any URL.
"""

from __future__ import annotations

import re

from fastckpt.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    UnsupportedVerbError,
)

_MOST_WORDS = 200
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")
_URL = re.compile(r"\b[a-z]+://[^\s\"'<>)]*")
_SECRET = re.compile(r"(?i)\b((?:sig|signature|token|key|secret|password)=|bearer )[^\s&\"'<>]+")
_NO_PLACE = frozenset(
    {"ContainerNotFound", "ContainerBeingDeleted", "NoSuchBucket", "FilesystemNotFound", "ResourceNotFound"}
)
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_REFUSED = frozenset({408, 409, 425, 429, 503})
ACCESS_STEP = (
    "Check the credentials (az://: AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, a SAS token or an identity; gs://: "
    "GOOGLE_APPLICATION_CREDENTIALS or the machine's service account) and their rights on this place"
)


class BlobRangeError(StoreError):
    """A range that starts at or after the object's end (HTTP 416). Stays inside the store."""


def translate(error: Exception, doing: str, where: str) -> StoreError:
    """The StoreError for an exception of obstore that ended `doing` at the URL `where`. Pure."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).partition("Debug source")[0]
    found = _STATUS.search(text)
    status, code = int(found[1]) if found else 0, (_CODE.search(text) or [None, ""])[1]
    said = " ".join(part for part in (f"HTTP {status}" if status else "", code or "") if part) or first_words(text)
    what = f"{doing} {where}: "
    if code in _NO_PLACE:
        return StoreError(f"{what}the bucket or container does not exist. Create it, or check its name ({said})")
    if names & {"AlreadyExistsError", "PreconditionError"} or status in (304, 412):
        return ObjectExistsError(f"{what}the object exists already, or is another version ({said})")
    if names & {"NotFoundError", "FileNotFoundError"} or status == 404:
        return ObjectNotFoundError(f"{what}no such object ({said})")
    if names & {"PermissionDeniedError", "UnauthenticatedError", "PermissionError"} or status in (401, 403):
        return StoreAccessError(f"{what}not allowed ({said}). {ACCESS_STEP}")
    if "NotSupportedError" in names or "NotImplementedError" in names or status == 501:
        return UnsupportedVerbError(f"{what}this is not supported there ({said})")
    if status == 416 or "Wanted range starting at" in text:
        return BlobRangeError(f"{what}the object ends before the range ({said})")
    if status == 507:
        return StoreFullError(f"{what}there is no room for the object ({said})")
    if "token request" in text or "redential" in text:
        return StoreAccessError(f"{what}credentials could not be had ({said}). {ACCESS_STEP}")
    if "builder error" in text:  # obstore's words for an address that it may not speak to
        return StoreError(
            f"{what}the endpoint cannot be used ({said}). If it is http://, allow that: AZURE_ALLOW_HTTP=true or GOOGLE_ALLOW_HTTP=true"
        )
    if "certificate" in text:
        return StoreError(
            f"{what}the server's certificate is not trusted ({said}). Name the authority's in SSL_CERT_FILE"
        )
    if "UnknownConfigurationKeyError" in names or not (
        names & {"BaseError", "OSError"}
    ):  # settings that obstore does not take, a bug
        return StoreError(f"{what}{type(error).__name__}: {first_words(text)}")
    if not status or status in _AGAIN or status >= 520:
        again = StoreUnavailableError(f"{what}no answer, or the server asks for another try ({said})")
        again.refused = status in _REFUSED
        return again
    return StoreError(f"{what}refused ({said})")


def first_words(text: str) -> str:
    """The first words of obstore's text, without URLs and whatever looks like a secret."""
    text = text.partition("Debug source")[0]
    line = " ".join(_SECRET.sub(r"\1***", _URL.sub("…", text)).split())
    return line[:_MOST_WORDS]
