"""What was found out about a store, and what follows from it. Sends no requests (docs/stores.md, "Probe")."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastckpt.errors import StoreError


class Create(enum.Enum):
    """Create-if-absent: of several creates of one key, exactly one may succeed."""

    ATOMIC = "atomic"
    RACY = "not atomic"
    """A second create is refused, but of several at once more than one succeeded."""
    IGNORED = "silently ignored"
    """The condition is ignored: a second create overwrites."""
    UNSUPPORTED = "unsupported"


class Replace(enum.Enum):
    """Replacement of the version that was read (`replace_if_match`)."""

    CONDITIONAL = "conditional"
    IGNORED = "silently ignored"
    UNSUPPORTED = "unsupported"


class Checksum(enum.Enum):
    """A body that differs from its checksum."""

    VERIFIED = "verified"
    IGNORED = "ignored"
    """It was stored."""
    REFUSED = "refused"
    """The server does not take the header, right or wrong."""
    UNKNOWN = "not known"


class Ranges(enum.Enum):
    """Reads of a part of an object."""

    HONOURED = "honoured"
    IGNORED = "ignored"
    """The whole object is sent."""
    WRONG = "wrong bytes"


class Listing(enum.Enum):
    """One thing about listings."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "not asked"


@dataclass(frozen=True)
class StoreFindings:
    """Everything that `fastckpt probe` asks."""

    create: Create
    ranges: Ranges
    strong: Listing
    """Whether a listing shows what was just written, and no longer what was just deleted."""
    ordered: Listing = Listing.UNKNOWN
    paged: Listing = Listing.UNKNOWN
    """Whether the pages of a long listing are complete together."""
    replace: Replace = Replace.UNSUPPORTED
    checksums: Mapping[str, Checksum] = field(default_factory=dict)
    """By name: crc64nvme, md5, sha256 (of the signature). Empty: the store sends none."""
    checksum_in_use: str | None = None
    """The name of the one that bodies go with. None: none."""
    create_error: StoreError | None = field(default=None, compare=False)
    """What the store raised at a create that it does not support."""


_CREATE = {
    Create.RACY: "of several creates of one key at once, more than one succeeded",
    Create.IGNORED: "this store overwrites where it was asked to create",
    Create.UNSUPPORTED: "this store has no create-if-absent",
}


def refusals(found: StoreFindings) -> list[str]:
    """Why no repository can be held here; [] if one can. Objects of `save` and `load` need less: see `losses`."""
    why = []
    if found.create in _CREATE:
        why.append(f"{_CREATE[found.create]}: two processes could destroy each other's checkpoints")
    if found.ranges is Ranges.WRONG:
        why.append("a part of an object is not what was written there")
    if found.strong is Listing.NO:
        why.append("a listing does not show what was just written, or still shows what was deleted")
    if found.ordered is Listing.NO:
        why.append("listings are not in the order of keys")
    if found.paged is Listing.NO:
        why.append("the pages of a long listing are not complete")
    return why


def losses(found: StoreFindings) -> list[str]:
    """What is missing, and what fastckpt does instead."""
    words = []
    if found.ranges is Ranges.IGNORED:
        words.append(
            "ranges are ignored: each read of a part gets the whole object, and objects of over 64 MiB are not read in parts"
        )
    if found.replace is not Replace.CONDITIONAL:
        words.append("a tombstone overwrites a record without the condition that it is the one that was read")
    used = found.checksum_in_use
    if used is not None and found.checksums.get(used) is Checksum.REFUSED:
        words.append(f"the {used} of a body is refused: bodies go with Content-MD5 (1.5 s of CPU per GiB)")
    if used is not None and found.checksums.get(used) is Checksum.IGNORED:
        signed = found.checksums.get("sha256") is Checksum.VERIFIED and used != "sha256"
        instead = (
            '; checksum="sha256" has it verify the signature of each body (0.8 s of CPU per GiB)' if signed else ""
        )
        words.append(
            f"the {used} of a body is ignored: only TLS protects it on its way, and the digests of the format find damage{instead}"
        )
    return words
