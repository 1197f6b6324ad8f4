"""Translates S3's answers into StoreError's subclasses, with bucket, key, status and next step.

An answer that is not understood counts as "no answer": the number of tries is limited, but a save that is given up without need is lost.

No secret leaves this module: S3's answer to a wrong signature repeats the request with its session token, and its answer to an expired
token repeats the token. So S3's text is never passed on as a whole, only its code, its first sentence and the request id.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastckpt.errors import (
    ObjectExistsError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    UnsupportedVerbError,
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
"""Refusals that other credentials would avoid."""

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
_FULL_CODES = frozenset({"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
"""Codes for "full": Ceph's for quotas of users and buckets; MinIO's for its disks and quotas."""
_FULL_STEP = (
    "Free some space or raise the quota, or keep fewer checkpoints (keep=) and retired ones for a shorter time (grace_s=): these stay "
    "until their grace is over"
)
_AGAIN_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_OWN_STATUSES = 520
"""From here on, proxies use numbers of their own: Cloudflare's for a server that does not answer."""
_REFUSED_STATUSES = frozenset(
    {408, 409, 425, 429, 503}
)  # 500, 502, 504: a server behind the answering one may have done it
_NEXT_STEPS = {
    "AccessDenied": "Check the policies of user, bucket and KMS key (docs/stores.md has minimal ones); where the reader pays "
    "(Requester Pays), set AWS_REQUEST_PAYER=requester or request_payer=True",
    "AllAccessDisabled": "The bucket's owner has closed it",
    "EntityTooLarge": "One PUT carries at most 5 GiB",
    "ExpiredToken": "The session token has expired: log in anew, or put new keys where these came from",
    "InvalidObjectState": "The object lies in an archive: restore it there first, and take the prefix out of the rule that moves it",
    "NotImplemented": "This server lacks something that the request asked for. fastckpt needs PUT with If-None-Match: *; checksums in "
    "headers it can do without (AWS_REQUEST_CHECKSUM_CALCULATION=when_required)",
    "RequestTimeTooSkewed": "Set this machine's clock, and keep it right (chrony, systemd-timesyncd)",
    "SlowDown": "It is asked too often. S3 raises the limit of a prefix within minutes; fewer connections or ranks at once ask less",
}
_RIGHTS = {
    "put": "s3:PutObject",
    "put_if_absent": "s3:PutObject",
    "replace": "s3:PutObject",
    "get": "s3:GetObject; and s3:ListBucket, without which a missing object is refused, too",
    "head": "s3:GetObject; and s3:ListBucket, without which a missing object is refused, too",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
}
"""The action that a policy has to allow, by what was done."""


_ELSEWHERE_CODES = frozenset(
    {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)


class BeyondEndError(StoreError):
    """A range that starts at or after the object's end (HTTP 416). Stays inside the store."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The facts that could be read from the text of an exception. Missing ones are empty."""

    status: int = 0
    code: str = ""
    message: str = ""
    request_id: str = ""
    region: str = ""
    location: str = ""
    """Target of a redirect."""
    date: str = ""
    """The server's time, as HTTP writes it."""

    @property
    def elsewhere(self) -> bool:
        """Whether the answer says that the bucket is in another region."""
        return self.code in _ELSEWHERE_CODES or (self.status in (301, 307) and (bool(self.region) or not self.location))

    def __str__(self) -> str:
        parts = [f"HTTP {self.status}" if self.status else "", self.code, self.message]
        text = " ".join(part for part in parts if part)
        return f"{text} (request {self.request_id})" if self.request_id else text


def _tag(name: str, text: str) -> str:
    found = re.search(f"<{name}>([^<]*)</{name}>", text)
    return " ".join(found.group(1).split())[:_MAX_MESSAGE] if found else ""


def read_answer(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    """Read the facts from an answer that is not a success."""
    text = body.decode("utf-8", "replace")
    return Answer(
        status=status,
        code=_tag("Code", text),
        message=_tag("Message", text),
        request_id=_tag("RequestId", text) or headers.get("x-amz-request-id", ""),
        region=_tag("Region", text) or headers.get("x-amz-bucket-region", ""),
        location=headers.get("location", ""),
        date=headers.get("date", ""),
    )


def cut_secrets(text: str, secrets: Iterable[str]) -> str:
    """The text with every secret replaced by ***."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, _CUT)
    # A server may repeat an older token than those known here.
    return re.sub(r"(?is)(x-amz-security-token['\"]?\s*[:=]\s*|<Token-?\d*>)[^\s<&\"']+", rf"\1{_CUT}", text)


def harmless(error: BaseException, secrets: Iterable[str]) -> BaseException:
    """An exception of the same type without traceback and secrets, to be kept as the cause."""
    text = cut_secrets(str(error), secrets)
    try:
        return type(error)(text)
    except Exception:  # a type with its own constructor: its name and text are enough
        return RuntimeError(f"{type(error).__name__}: {text}")


def translate(
    answer: Answer, doing: str, where: str, secrets: Iterable[str], region: str, now_s: float | None = None
) -> StoreError:
    """The StoreError for an answer that ended `doing` ("get", "put", …) at the URL `where`.

    `region`: the signed region; named in the error if S3 says that the bucket is in another one. `now_s`: this machine's time in seconds
    since 1970, to be compared with the server's if that finds it wrong.
    """
    kind, text = _classify(answer, region)
    if answer.code == "AccessDenied" and doing in _RIGHTS:
        text += f". This request needs {_RIGHTS[doing]}"
    if answer.code == "RequestTimeTooSkewed" and now_s is not None:
        text += _skew(answer.date, now_s)
    found = kind(cut_secrets(f"{doing} {where}: {text}", secrets))
    if isinstance(found, StoreUnavailableError):
        found.refused = answer.status in _REFUSED_STATUSES or answer.code in _DAMAGED_CODES
    return found


def refuses_checksum(answer: Answer) -> bool:
    """Whether the server refuses the header with the body's checksum. R2 answers 501, Backblaze B2 400; both name the header."""
    return answer.status in (400, 501) and _names(answer, "x-amz-checksum")


def wants_checksum(answer: Answer) -> bool:
    """Whether the server requires a checksum. S3 does in buckets with Object Lock, and names the header that all servers know."""
    return answer.status == 400 and _names(answer, "content-md5")


def _names(answer: Answer, header: str) -> bool:
    """Whether the answer is about a header, and does not say that the body differs from it: then the same body is sent again."""
    return answer.code not in _DAMAGED_CODES and header in answer.message.lower()


def _skew(date: str, now_s: float) -> str:
    """How far this machine's clock is from the server's, in words; "" if the server has not told its time."""
    try:
        ahead_s = now_s - email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return ""
    return f": it is {abs(ahead_s) / 60:.0f} minutes {'ahead of' if ahead_s > 0 else 'behind'} the server's"


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:  # half an IPv6 address
        return ""


def _classify(answer: Answer, region: str) -> tuple[type[StoreError], str]:
    status, code = answer.status, answer.code
    if answer.elsewhere:
        there = f"it is in {answer.region}" if answer.region else "it is in another one"
        return StoreAccessError, (
            f"the bucket is not in region {region or '(none)'}: {there}. Set AWS_REGION or the profile's region "
            f"({answer or 'redirected'})"
        )
    if 300 <= status < 400:
        return StoreError, (
            f"the server redirects to {_host_of(answer.location) or 'another place'} ({answer}), which is not followed: a PUT would "
            "become a GET, and a signature is for one host. Name the server itself as the endpoint (https://, if it redirects from http://)"
        )
    if status == 412:
        return ObjectExistsError, "the object exists already"
    if code == "NoSuchBucket":
        return StoreError, f"the bucket does not exist. Create it, or check the name and the endpoint ({answer})"
    if status == 404:
        return ObjectNotFoundError, f"no such object ({answer})"
    if status == 416:
        return BeyondEndError, f"the object ends before the range ({answer})"
    if code in _FULL_CODES or status == 507:
        return StoreFullError, f"there is no room for the object ({answer}). {_FULL_STEP}"
    if code in _DAMAGED_CODES:
        return StoreUnavailableError, f"the data was damaged on its way; the server did not take it ({answer})"
    if status in _AGAIN_STATUSES or status >= _OWN_STATUSES or code in _AGAIN_CODES:
        step = _NEXT_STEPS.get(code, "")
        return StoreUnavailableError, f"the server asks for another try ({answer})" + (f". {step}" if step else "")
    if status in (401, 403) or code in CREDENTIAL_CODES:
        step = _NEXT_STEPS.get(code, "Check the credentials and the policies of user and bucket")
        return StoreAccessError, f"not allowed ({answer}). {step}"
    step = _NEXT_STEPS.get(code, "")
    kind = UnsupportedVerbError if status == 501 else StoreError
    return kind, f"refused ({answer})" + (f". {step}" if step else "")
