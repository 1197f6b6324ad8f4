"""Header and footer, and the order of the parts of a container (docs/format.md, sections 2 and 3)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastckpt.errors import CorruptCheckpointError, Damage, UnsupportedFormatError
from fastckpt.format.digest import ALGORITHM_XXH3_128, crc64nvme
from fastckpt.format.records import MAX_RECORDS, RECORD_BYTES

MAGIC = b"FASTCKPT"
VERSION = 1
HEADER_BYTES = 64
FOOTER_BYTES = 256
MIN_BYTES = HEADER_BYTES + FOOTER_BYTES

READ_SELF_CONTAINED = 1 << 0
READ_MAPPABLE = 1 << 1
READ_SHARED = 1 << 2
_KNOWN_READ_FEATURES = READ_SELF_CONTAINED | READ_SHARED
_KNOWN_CHECK_FEATURES = 0

INDEX_PARTS = ("directory", "file table", "records", "skeleton")
MAX_PART_BYTES = {
    "directory": 256 << 20,
    "file table": 64 << 20,
    "records": MAX_RECORDS * RECORD_BYTES,
    "skeleton": 2 << 30,
}

_HEADER = struct.Struct("<8sIIQQQ16sQ")
_ENTRY = struct.Struct("<QQ16s")
_FOOTER = struct.Struct("<128sQQQ8s64s16sQ8s")
assert _HEADER.size == HEADER_BYTES
assert _FOOTER.size == FOOTER_BYTES


class PartEntry(NamedTuple):
    """The place of an index part, counted from the container's first byte, and the digest of its bytes."""

    offset: int
    n_bytes: int
    digest: bytes


@dataclass(frozen=True)
class Header:
    """The fields of a header that passed its checksum."""

    version: int
    read_features: int
    write_features: int
    check_features: int

    @property
    def unknown_check_features(self) -> int:
        """Unknown feature bits that forbid `check` to vouch for the whole container; loading ignores them."""
        return self.check_features & ~_KNOWN_CHECK_FEATURES


@dataclass(frozen=True)
class Footer:
    """The fields of a footer that passed its checksum and whose parts cover the container without gaps."""

    parts: dict[str, PartEntry]
    payload_bytes: int
    container_bytes: int
    header: Header
    header_bytes: bytes

    @property
    def payload_end(self) -> int:
        """Offset of the first byte after the payload."""
        return HEADER_BYTES + self.payload_bytes


def build_header(read_features: int = READ_SELF_CONTAINED) -> bytes:
    """The first 64 bytes."""
    body = _HEADER.pack(MAGIC, VERSION, ALGORITHM_XXH3_128, read_features, 0, 0, bytes(16), 0)[:56]
    return body + crc64nvme(body).to_bytes(8, "little")


def build_footer(parts: Sequence[PartEntry], payload_bytes: int, header: bytes) -> bytes:
    """The last 256 bytes. parts: in the order of INDEX_PARTS."""
    total = parts[-1].offset + parts[-1].n_bytes + FOOTER_BYTES
    entries = b"".join(_ENTRY.pack(*part) for part in parts)
    fields = (entries, HEADER_BYTES, payload_bytes, total, bytes(8), header, bytes(16), 0, MAGIC)
    body = _FOOTER.pack(*fields)[:240]
    return body + crc64nvme(body).to_bytes(8, "little") + MAGIC


def parse_header(data: bytes, source: str) -> Header:
    """Check and read a header. CorruptCheckpointError or UnsupportedFormatError."""
    magic, version, algorithm, read, write, check, zeros, crc = _HEADER.unpack(data)
    damage = []
    if magic != MAGIC:
        damage.append(Damage("header", "magic, bytes 0–8", repr(MAGIC), repr(magic)))
    actual = crc64nvme(data[:56])
    if crc != actual:
        damage.append(Damage("header", "crc64nvme, bytes 56–64", f"{actual:016x}", f"{crc:016x}"))
    if damage:
        raise CorruptCheckpointError(source, damage)
    problems = []
    if version != VERSION:
        problems.append(f"format version {version} (known: {VERSION})")
    if algorithm != ALGORITHM_XXH3_128:
        problems.append(f"digest algorithm {algorithm} (known: {ALGORITHM_XXH3_128})")
    if read & ~_KNOWN_READ_FEATURES:
        problems.append(f"read features {read:#x} (known: {_KNOWN_READ_FEATURES:#x})")
    if problems:
        raise UnsupportedFormatError(
            f"{source} needs a newer fastckpt: it has {', '.join(problems)}. Upgrade with `pip install -U fastckpt-engine`"
        )
    if zeros != bytes(16):
        raise CorruptCheckpointError(source, [Damage("header", "reserved, bytes 40–56", "zeros", zeros.hex())])
    if read & READ_SHARED and read & READ_SELF_CONTAINED:
        damage.append(Damage("header", "read features", "not both SELF_CONTAINED and SHARED", f"{read:#x}"))
        raise CorruptCheckpointError(source, damage)
    return Header(version, read, write, check)


def parse_footer(data: bytes, available_bytes: int, source: str) -> Footer:
    """Check and read a footer.

    available_bytes: number of bytes up to and including the footer. No size in the result can exceed it, so the caller may allocate by it.
    """
    entries, payload_offset, payload_bytes, total, zeros, header, more_zeros, crc, magic = _FOOTER.unpack(data)
    damage = []
    if magic != MAGIC:
        damage.append(Damage("footer", "magic, the last 8 bytes", repr(MAGIC), repr(magic)))
    actual = crc64nvme(data[:240])
    if crc != actual:
        damage.append(Damage("footer", "crc64nvme, bytes 240–248", f"{actual:016x}", f"{crc:016x}"))
    if damage:
        raise CorruptCheckpointError(source, damage)
    parsed_header = parse_header(header, source)  # first, because another version may lay out the rest differently
    if any(zeros) or any(more_zeros):
        damage.append(Damage("footer", "reserved, bytes 152–160 and 224–240", "zeros", (zeros + more_zeros).hex()))
    if total > available_bytes:
        damage.append(Damage("footer", "container length", f"at most {available_bytes}", str(total)))
    if payload_offset != HEADER_BYTES:
        damage.append(Damage("footer", "payload offset", str(HEADER_BYTES), str(payload_offset)))
    parts = {name: PartEntry(*_ENTRY.unpack_from(entries, 32 * i)) for i, name in enumerate(INDEX_PARTS)}
    position = HEADER_BYTES + payload_bytes
    for name, part in parts.items():
        if part.offset != position:
            damage.append(Damage("footer", f"{name}, offset", str(position), str(part.offset)))
        if part.n_bytes > MAX_PART_BYTES[name]:
            damage.append(Damage("footer", f"{name}, length", f"at most {MAX_PART_BYTES[name]}", str(part.n_bytes)))
        position = part.offset + part.n_bytes
    if position + FOOTER_BYTES != total:
        damage.append(Damage("footer", "container length", str(position + FOOTER_BYTES), str(total)))
    if parts["records"].n_bytes % RECORD_BYTES:
        what = f"a multiple of {RECORD_BYTES}"
        damage.append(Damage("footer", "records, length", what, str(parts["records"].n_bytes)))
    if damage:
        raise CorruptCheckpointError(source, damage)
    return Footer(parts, payload_bytes, total, parsed_header, header)
