"""What obstore and botocore raise, said in this project's words: one of StoreError's subclasses, with bucket, key, status and next step.

Neither library has a field for the HTTP status or S3's error code, so they are read from obstore's text. Text that is not understood counts
as "no answer": another try is bounded, a save given up for nothing is not.

No secret leaves this module: S3's answer to a wrong signature repeats the request with its session token, and its answer to an expired
token repeats the token. So S3's text is never passed on whole; only its code, its first sentence and the request id are, and the cause
that is kept has the secrets cut out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fastckpt.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
)

_MAX_MESSAGE = 300
_CUT = "***"

CREDENTIAL_CODES = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
    }
)
"""Refusals that other credentials would cure."""

_AGAIN_CODES = frozenset(
    {
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottlingException",
    }
)
_DAMAGED_CODES = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"})
_AGAIN_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_REFUSED_STATUSES = frozenset(
    {408, 409, 425, 429, 503}
)  # 500, 502, 504: something behind the one who answers may have done it
_NEXT_STEPS = {
    "AccessDenied": "Check the policies of user, bucket and KMS key (docs/stores.md has minimal ones)",
    "AllAccessDisabled": "The bucket's owner has closed it",
    "EntityTooLarge": "One PUT carries at most 5 GiB",
    "NotImplemented": "This server lacks the operation; fastckpt needs PUT with If-None-Match",
    "QuotaExceeded": "Free space or raise the quota",
    "RequestTimeTooSkewed": "Set this machine's clock",
}


class BeyondEndError(StoreError):
    """A range that starts at or after the object's end (HTTP 416). Stays inside the store."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What could be read from the text of an exception. Empty fields were not there."""

    status: int = 0
    code: str = ""
    message: str = ""
    request_id: str = ""
    region: str = ""
    host: str = ""
    redirected: bool = False
    timed_out: bool = False
    never_sent: bool = False
    refused_certificate: bool = False
    not_s3: bool = False

    @property
    def elsewhere(self) -> bool:
        """Does it say that the bucket is in another region?"""
        return (
            self.redirected
            or self.status in (301, 307)
            or self.code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
        )

    def __str__(self) -> str:
        parts = [f"HTTP {self.status}" if self.status else "", self.code, self.message]
        text = " ".join(part for part in parts if part)
        return f"{text} (request {self.request_id})" if self.request_id else text


def _tag(name: str, text: str) -> str:
    found = re.search(f"<{name}>([^<]*)</{name}>", text)
    return " ".join(found.group(1).split())[:_MAX_MESSAGE] if found else ""


def read_answer(error: BaseException) -> Answer:
    """The facts in an obstore exception's text."""
    text, _, debug = str(error).partition("\n\nDebug source:")
    status = re.search(r"status code: (\d{3})", text)
    host = re.search(r"https?://([^/\s]+)", text)
    return Answer(
        status=int(status.group(1)) if status else 0,
        code=_tag("Code", text),
        message=_tag("Message", text),
        request_id=_tag("RequestId", text),
        region=_tag("Region", text),
        host=host.group(1) if host else "",
        redirected="redirect without LOCATION" in text,
        never_sent="kind: Connect," in debug,
        timed_out="kind: Timeout" in debug or "TimedOut" in debug,
        refused_certificate=re.search("InvalidCertificate|invalid peer certificate|UnknownIssuer", debug) is not None,
        not_s3="Header missing from response" in text,
    )


def cut_secrets(text: str, secrets: Iterable[str]) -> str:
    """The text with every secret replaced by ***."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, _CUT)
    # What a server repeats of a request may be an older token than those known here.
    return re.sub(r"(?is)(x-amz-security-token['\"]?\s*[:=]\s*|<Token-?\d*>)[^\s<&\"']+", rf"\1{_CUT}", text)


def harmless(error: BaseException, secrets: Iterable[str]) -> BaseException:
    """The same kind of exception, without a trace and without secrets: to be kept as the cause."""
    text = cut_secrets(str(error), secrets)
    try:
        return type(error)(text)
    except Exception:  # a type with a constructor of its own: its name and text are what matters
        return RuntimeError(f"{type(error).__name__}: {text}")


def translate(
    error: BaseException, answer: Answer, doing: str, where: str, secrets: Iterable[str], region: str
) -> StoreError:
    """The StoreError for an exception of obstore that ended `doing` ("get", "put", …) at the URL `where`.

    `answer`: what was read from it. `region`: the one that was signed for; named when S3 says that the bucket is elsewhere.
    """
    kind, text = _classify(error, answer, region)
    found = kind(cut_secrets(f"{doing} {where}: {text}", secrets))
    if isinstance(found, StoreUnavailableError):
        found.refused = answer.never_sent or answer.status in _REFUSED_STATUSES or answer.code in _DAMAGED_CODES
    return found


def _classify(error: BaseException, answer: Answer, region: str) -> tuple[type[StoreError], str]:
    status, code = answer.status, answer.code
    if answer.elsewhere:
        there = f"it is in {answer.region}" if answer.region else "it is in another one"
        return StoreAccessError, (
            f"the bucket is not in region {region or '(none)'}: {there}. Set AWS_REGION or the profile's region "
            f"({answer or 'redirected'})"
        )
    if status == 412 or (type(error).__name__ == "AlreadyExistsError" and status != 409):
        return ObjectExistsError, "the object exists already"
    if code == "NoSuchBucket":
        return (
            StoreError,
            f"the bucket does not exist. Create it, or check the name and the endpoint {answer.host} ({answer})",
        )
    if status == 404:
        return ObjectNotFoundError, f"no such object ({answer})"
    if status == 416:
        return BeyondEndError, f"the object ends before the range ({answer})"
    if code in _DAMAGED_CODES:
        return StoreUnavailableError, f"the data was damaged on its way; the server did not take it ({answer})"
    if status in _AGAIN_STATUSES or code in _AGAIN_CODES:
        return StoreUnavailableError, f"the server asks for another try ({answer})"
    if status in (401, 403) or code in CREDENTIAL_CODES:
        step = _NEXT_STEPS.get(code, "Check the credentials and the policies of user and bucket")
        return StoreAccessError, f"not allowed ({answer}). {step}"
    if status:
        step = _NEXT_STEPS.get(code, "")
        return StoreError, f"refused ({answer})" + (f". {step}" if step else "")
    if answer.refused_certificate:
        return StoreError, (
            f"the certificate of {answer.host} is not trusted. Name the authority's certificate in AWS_CA_BUNDLE or in the "
            "profile's ca_bundle"
        )
    if isinstance(error, (ValueError, TypeError)) or type(error).__name__ in (
        "InvalidPathError",
        "NotSupportedError",
        "UnknownConfigurationKeyError",
    ):
        return StoreError, str(error).partition("\n\n")[0][:_MAX_MESSAGE]
    if answer.timed_out:
        return StoreUnavailableError, f"no answer from {answer.host or 'the server'} in time"
    if answer.not_s3:
        return StoreUnavailableError, "the answer is not one of S3 (it has no ETag): a proxy may have spoken"
    first = str(error).partition("\n\n")[0]
    return StoreUnavailableError, f"no complete answer: {first[:_MAX_MESSAGE]}"
