"""Reference decoder of the fastckpt format, version 1: docs/format.md in NumPy and zstandard, no code of fastckpt.

It favours being short over being fast and holds everything in memory. Digests are verified when `xxhash` is installed.
Run `python reference_decoder.py FILE` to print the name, element type, shape and SHA-256 of each tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from reference_crc import crc64nvme

try:
    from xxhash import xxh3_128_digest
except ImportError:  # then no digest is verified
    xxh3_128_digest = None  # type: ignore[assignment]

MAGIC = b"FASTCKPT"
SELF_CONTAINED, SHARED = 1, 4
MAX_DEPTH = 128  # of the JSON parts: far beyond any real directory, far below any parser's recursion limit
STRIPE = 131072
MIB = 1 << 20
CAPS = {"directory": 256 * MIB, "file table": 64 * MIB, "records": 4096 * MIB, "skeleton": 2048 * MIB}
RAW, CONST, ROT, ROTU, SUB, SUBPACK, CAST, REF = range(1, 9)
FRAMED, BASED, MAX_CHAIN = (ROT, ROTU, SUB, SUBPACK), (SUB, SUBPACK, CAST, REF), 64
KINDS = ("tensor", "parameter", "array", "quantized", "part")
DTYPES = {"bool": "|b1", "int8": "|i1", "bfloat16": "<u2", "complex64": "<c8", "complex128": "<c16"}
DTYPES |= {f"{kind}{bits}": f"<{kind[0]}{bits // 8}" for kind in ("uint", "int") for bits in (16, 32, 64)}
DTYPES |= {f"float{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)}
DTYPES |= dict.fromkeys(["uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"], "|u1")


class FormatError(Exception):
    """The bytes break a *must* of format.md; `part` names the part of the container that does."""

    def __init__(self, part: str, words: str) -> None:
        super().__init__(f"{part}: {words}")
        self.part = part


class UnsupportedError(FormatError):
    """The file may be right, but needs more than version 1 of the format."""


class Repr(NamedTuple):
    """A key of a name that is neither a string nor an integer."""

    text: str


class Record(NamedTuple):
    """The 64 bytes that describe a chunk, field by field."""

    transform: int
    lane: int
    pack: int
    zero: int
    file: int
    offset: int
    stored: int
    raw: int
    digest: bytes
    crc: int
    parameter: bytes
    zeros: bytes


Key = str | int | Repr


@dataclass
class Container:
    """Everything a container holds. `tensors` lacks what has no data and what NumPy has no element type for."""

    version: int
    digest_algorithm: int
    read_features: int
    write_features: int
    check_features: int
    directory: dict[str, Any]
    file_table: list[Any]
    records: list[Record]
    skeleton: bytes
    storages: list[bytes | None]
    tensors: dict[tuple[Key, ...], NDArray[Any]]


def need(condition: bool, part: str, words: str) -> None:
    """Refuse the file unless `condition` holds."""
    if not condition:
        raise FormatError(part, words)


def _check_digest(part: str, what: str, data: bytes, digest: bytes) -> None:
    need(xxh3_128_digest is None or xxh3_128_digest(data) == digest, part, f"the digest of {what} is wrong")


def _json(part: str, data: bytes) -> Any:
    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(pairs)) == len(pairs), part, "an object has the same member twice")
        return dict(pairs)

    def constant(text: str) -> None:
        raise FormatError(part, f"{text} is not JSON")

    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)):
        depth += 1 if bracket in b"[{" else -1
        need(depth <= MAX_DEPTH, part, f"nested deeper than {MAX_DEPTH}")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=members, parse_constant=constant)
    except ValueError as error:  # also invalid UTF-8, and integers of more digits than Python converts
        raise FormatError(part, f"not JSON: {error}") from None


def _integer(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:  # `type`: a bool is no integer
        raise FormatError("directory", f"{what} must be an integer ≥ 0 and < 2^63")
    return value


def _integers(value: object, what: str) -> list[int]:
    if not isinstance(value, list):
        raise FormatError("directory", f"{what} must be an array")
    return [_integer(item, what) for item in value]


def _member(value: object, name: str, kind: type, what: str) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(name), kind):
        raise FormatError("directory", f"{what} must be an object with a member {name} of type {kind.__name__}")
    return value[name]


def _name(value: list[Any], what: str) -> tuple[Key, ...]:
    def key(item: object) -> Key:
        if isinstance(item, dict) and list(item) == ["repr"] and isinstance(item["repr"], str):
            return Repr(item["repr"])
        if type(item) is int or isinstance(item, str):
            return item
        raise FormatError("directory", f"{what}: a key is neither a string, an integer nor a repr")

    return tuple(key(item) for item in value)


def _numpy_type(dtype: str, what: str) -> np.dtype[Any] | None:
    """The NumPy type that shows the bytes of element type `dtype`; None where there is none, and sizes are unknown."""
    if not dtype.startswith("numpy:"):
        return np.dtype(DTYPES[dtype]) if dtype in DTYPES else None
    try:
        found = np.dtype(dtype[6:])
    except (TypeError, ValueError, SyntaxError):
        raise FormatError("directory", f"{what}: {dtype} is not an element type of NumPy") from None
    need(found.str == dtype[6:] and not found.hasobject, "directory", f"{what}: {dtype} is not a plain element type")
    return found


def _check_record(what: str, r: Record, payload_end: int) -> None:
    need(r.transform != 0, "records", f"{what}: transform 0")
    if r.transform > REF:
        raise UnsupportedError("records", f"{what}: transform {r.transform}; known: 1 to {REF}")
    lanes = {RAW: (1,), CONST: (1, 2, 4, 8), CAST: (2,), REF: (1, 2, 4, 8)}.get(r.transform, (2, 4, 8))
    need(r.lane in lanes, "records", f"{what}: lanes of {r.lane} bytes")
    need(r.pack in ((1, 2, 4, 8) if r.transform == SUBPACK else (0,)), "records", f"{what}: pack bits of {r.pack}")
    need(r.zero == 0 and not any(r.zeros), "records", f"{what}: reserved bytes are not zero")
    need(1 <= r.raw <= 4 * MIB and r.raw % r.lane == 0, "records", f"{what}: {r.raw} raw bytes, lanes of {r.lane}")
    need(r.file == 0, "records", f"{what}: names file {r.file} in a self-contained container")
    used = r.lane if r.transform == CONST else 8 if r.transform in BASED else 0
    need(not any(r.parameter[used:]), "records", f"{what}: parameter is not zero")
    if r.transform in (CONST, CAST, REF):
        need(r.offset == r.stored == r.crc == 0, "records", f"{what}: its transform stores no bytes")
        return
    limit = r.raw if r.transform == RAW else 2 * r.raw + 1024
    need(1 <= r.stored <= limit, "records", f"{what}: {r.stored} stored bytes for {r.raw} raw")
    need(r.transform != RAW or r.stored == r.raw, "records", f"{what}: RAW, but stored bytes differ from raw")
    need(64 <= r.offset <= payload_end - r.stored, "records", f"{what}: its stored bytes are not in the payload")


def _base_of(r: Record) -> tuple[int, int, int]:
    """Record, byte and length of a record's base."""
    first, element = int.from_bytes(r.parameter[:4], "little"), int.from_bytes(r.parameter[4:], "little")
    return first, element * (4 if r.transform == CAST else r.lane), r.raw * (2 if r.transform == CAST else 1)


def check_bases(records: list[Record]) -> None:
    """Bases come before what needs them, go no further than the next record, and end after MAX_CHAIN of them."""
    depth = [0] * len(records)
    for i, r in enumerate(records):
        if r.transform not in BASED:
            continue
        first, start, size = _base_of(r)
        need(first < i and start < records[first].raw, "records", f"record {i}: its base is no earlier record")
        depth[i] = 1 + depth[first]
        if start + size > records[first].raw:
            two = first + 1 < i and start + size <= records[first].raw + records[first + 1].raw
            need(two, "records", f"record {i}: its base runs past two records")
            depth[i] = max(depth[i], 1 + depth[first + 1])
        need(depth[i] <= MAX_CHAIN, "records", f"record {i}: a chain of {depth[i]} bases")


def _check_tiling(records: list[Record], payload_end: int) -> None:
    stretches: dict[tuple[int, int], Record] = {}
    for i, r in enumerate(records):
        if r.stored:
            same = stretches.setdefault((r.offset, r.stored), r) == r
            need(same, "records", f"record {i} shares its stored bytes with a different record")
    end = 64
    for offset, stored in sorted(stretches):
        need(offset == end, "records", f"stored bytes at {offset}, but those before end at {end}")
        end += stored
    need(end == payload_end, "records", f"stored bytes end at {end}, the payload at {payload_end}")


def _unframe(what: str, frame: bytes, size: int) -> bytes:
    """The `size` bytes of content of exactly one frame."""
    need(frame[:4] == b"\x28\xb5\x2f\xfd", "payload", f"{what}: no zstd frame")
    try:
        head = zstandard.get_frame_parameters(frame)
        need(head.content_size == size, "payload", f"{what}: frame content is not the stream's {size} bytes")
        need(head.window_size <= 8 * MIB, "payload", f"{what}: frame needs a window of {head.window_size} bytes")
        need(head.dict_id == 0, "payload", f"{what}: frame needs a dictionary")
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError("payload", f"{what}: {error}") from None
    need(len(content) == size, "payload", f"{what}: frame holds {len(content)} bytes instead of {size}")
    return content


def _unrotate(stream: bytes, w: int) -> bytes:
    y = np.empty((len(stream) // w, w), "u1")
    for start in range(0, len(y), STRIPE):
        lanes = min(STRIPE, len(y) - start)
        planes = np.frombuffer(stream, "u1", lanes * w, start * w).reshape(w, lanes)
        y[start : start + lanes] = planes[::-1].T
    lane = y.view(f"<u{w}")
    return ((lane >> 1) | (lane << (8 * w - 1))).tobytes()


def _bits(packed: bytes, count: int, width: int) -> NDArray[np.uint8]:
    """`count` values of `width` bits, least significant first."""
    bits = np.unpackbits(np.frombuffer(packed, "u1"), bitorder="little")
    need(not bits[count * width :].any(), "payload", "unused bits are not zero")
    return np.packbits(bits[: count * width].reshape(count, width), axis=1, bitorder="little")[:, 0]


def _unrotate_positive(stream: bytes, w: int, lanes: int) -> bytes:
    """ROTU: the ROT stream, but for its lowest planes, of which each byte has lost its lowest bit."""
    whole, at = b"", 0
    for start in range(0, lanes, STRIPE):
        n = min(STRIPE, lanes - start)
        low = (7 * n + 7) // 8
        whole += stream[at : at + n * (w - 1)]
        at += n * (w - 1)
        whole += (_bits(stream[at : at + low], n, 7) << 1).astype("u1").tobytes()
        at += low
    return _unrotate(whole, w)


def _add(z: NDArray[Any], base: bytes) -> bytes:
    """The inverse of SUB."""
    w = z.dtype.itemsize
    b = np.frombuffer(base, z.dtype)
    top, one, zero = z.dtype.type(1 << (8 * w - 1)), z.dtype.type(1), z.dtype.type(0)
    d = (z >> one) ^ (zero - (z & one))
    m = d + np.where(b & top, ~b, b | top)
    return np.where(m & top, m ^ top, ~m).astype(z.dtype).tobytes()


def _unplanes(planes: bytes, w: int, n: int) -> NDArray[Any]:
    """Lanes of byte planes, highest first, without stripes."""
    return np.frombuffer(planes, "u1").reshape(w, n)[::-1].T.copy().view(f"<u{w}").reshape(n)


def _unpack(what: str, r: Record, frame: bytes) -> NDArray[Any]:
    """z of a SUBPACK stream."""
    lanes, packed_size = r.raw // r.lane, (r.raw // r.lane * r.pack + 7) // 8
    try:
        size = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise FormatError("payload", f"{what}: {error}") from None
    need(4 + packed_size <= size <= 2 * r.raw + 64, "payload", f"{what}: a stream of {size} bytes")
    stream = _unframe(what, frame, size)
    escapes = int.from_bytes(stream[:4], "little")
    need(size == 4 + packed_size + escapes * r.lane, "payload", f"{what}: {escapes} escapes in {size} bytes")
    z = _bits(stream[4 : 4 + packed_size], lanes, r.pack).astype(f"<u{r.lane}")
    far = z == (1 << r.pack) - 1
    need(int(far.sum()) == escapes, "payload", f"{what}: {escapes} escapes, {int(far.sum())} marked")
    z[far] += _unplanes(stream[4 + packed_size :], r.lane, escapes)
    return z


def _round(base: bytes) -> bytes:
    """CAST: float32 to bfloat16, to nearest, ties to even."""
    u = np.frombuffer(base, "<u4").astype("<u8")
    nan = (u & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, u >> 16 | 0x40, (u + 0x7FFF + (u >> 16 & 1) & 0xFFFFFFFF) >> 16).astype("<u2").tobytes()


def _chunk(what: str, r: Record, data: bytes, verify_crc: bool, base: bytes = b"") -> bytes:
    """The raw bytes of one record. base: those that its parameter names."""
    stored = data[r.offset : r.offset + r.stored]
    if r.stored:
        need(not verify_crc or crc64nvme(stored) == r.crc, "payload", f"{what}: the crc of its stored bytes is wrong")
    lanes = r.raw // r.lane
    if r.transform == RAW:
        raw = stored
    elif r.transform == CONST:
        raw = r.parameter[: r.lane] * lanes
    elif r.transform == ROT:
        raw = _unrotate(_unframe(what, stored, r.raw), r.lane)
    elif r.transform == ROTU:
        size = sum(
            n * (r.lane - 1) + (7 * n + 7) // 8 for n in (min(STRIPE, lanes - s) for s in range(0, lanes, STRIPE))
        )
        raw = _unrotate_positive(_unframe(what, stored, size), r.lane, lanes)
    elif r.transform == SUB:
        stream = _unframe(what, stored, r.raw)
        w, parts = r.lane, []
        for start in range(0, lanes, STRIPE):
            n = min(STRIPE, lanes - start)
            parts.append(_unplanes(stream[start * w : (start + n) * w], w, n))
        raw = _add(np.concatenate(parts), base)
    elif r.transform == SUBPACK:
        raw = _add(_unpack(what, r, stored), base)
    else:
        raw = _round(base) if r.transform == CAST else base
    _check_digest("payload", what, raw, r.digest)
    return raw


def chunks(records: list[Record], data_of: Callable[[Record], bytes], verify_crc: bool) -> bytes:
    """The raw bytes of all records, one after another. data_of: the file that a record's stored bytes are in."""
    starts = list(accumulate((r.raw for r in records), initial=0))
    raw = bytearray()
    for i, r in enumerate(records):
        base = b""
        if r.transform in BASED:
            first, start, size = _base_of(r)
            base = bytes(raw[starts[first] + start : starts[first] + start + size])
        raw += _chunk(f"record {i}", r, data_of(r), verify_crc, base)
    return bytes(raw)


def _check_members(directory: dict[str, Any]) -> None:
    """All members of the directory but `storages` and `tensors`."""
    order = _member(directory, "byteorder", str, "the directory")
    if order != "little":
        raise UnsupportedError("directory", f"byteorder {order!r}; known: 'little'")
    for name, kind in (("writer", dict), ("meta", dict), ("storages", list), ("tensors", list)):
        _member(directory, name, kind, "the directory")
    step = directory.get("step", "missing")
    need(step is None or type(step) is int, "directory", "step must be an integer or null")
    rank = _integer(directory.get("rank"), "rank")
    need(rank < _integer(directory.get("world"), "world"), "directory", "rank must be below world")


def check_storage(what: str, storage: Any, records: list[Record], starts: list[int], own: int | None = None) -> None:
    _member(storage, "dtype", str, what)
    location = _member(storage, "location", str, what)
    size, left = _integer(storage.get("bytes"), f"{what}: bytes"), 0
    if storage.get("extents", "missing") is None:
        need(location == "meta", "directory", f"{what}: no data, but not on meta")
        return
    for extent in _member(storage, "extents", list, what):
        place = _integers(extent, f"{what}: an extent")
        need(len(place) == 3 and place[2] >= 1, "directory", f"{what}: an extent is not [record, offset, bytes ≥ 1]")
        need(place[0] < len(records), "directory", f"{what}: there is no record {place[0]}")
        need(place[1] < records[place[0]].raw, "directory", f"{what}: an extent starts past its record")
        ends = starts[place[0]] + place[1] + place[2] <= starts[-1]
        need(ends, "directory", f"{what}: an extent runs past the last record")
        left += place[2]
    need(left == (size if own is None else own), "directory", f"{what}: {left} bytes of extents, {size} long")


def _storage(storage: Any, starts: list[int], raw: bytes) -> bytes | None:
    if storage["extents"] is None:
        return None
    begins = ((starts[record] + offset, size) for record, offset, size in storage["extents"])
    return b"".join(raw[begin : begin + size] for begin, size in begins)


def _tensor(what: str, tensor: Any, directory: dict[str, Any], storages: list[bytes | None]) -> NDArray[Any] | None:
    """Check one tensor's description; its array if it has data that NumPy can show."""
    kind, dtype = _member(tensor, "kind", str, what), _member(tensor, "dtype", str, what)
    need(kind in KINDS, "directory", f"{what}: unknown kind {kind!r}")
    _member(tensor, "requires_grad", bool, what)
    shape, stride = (_integers(tensor.get(name), f"{what}: {name}") for name in ("shape", "stride"))
    need(len(shape) == len(stride) <= 64, "directory", f"{what}: shape and stride must be equally long, at most 64")
    offset, number = (_integer(tensor.get(name), f"{what}: {name}") for name in ("offset", "storage"))
    need(number < len(storages), "directory", f"{what}: there is no storage {number}")
    if "global" in tensor:
        for name in ("shape", "offset"):
            _integers(_member(tensor["global"], name, list, what), f"{what}: global")
    numpy_type, data = _numpy_type(dtype, what), storages[number]
    if kind == "quantized" or numpy_type is None:
        return None
    if 0 not in shape:
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        fits = (last + 1) * numpy_type.itemsize <= directory["storages"][number]["bytes"]
        need(fits, "directory", f"{what}: reaches past the end of storage {number}")
    try:
        if 0 in shape or data is None:
            return None if data is None else np.empty(shape, numpy_type)
        steps = [step * numpy_type.itemsize if n > 1 else 0 for n, step in zip(shape, stride, strict=True)]
        return np.ndarray(shape, numpy_type, data, offset * numpy_type.itemsize, steps)
    except (ValueError, OverflowError) as error:
        if len(shape) > 32:  # NumPy 1 has no more dimensions
            return None
        raise FormatError("directory", f"{what}: {error}") from None


def read(source: str | PathLike[str] | bytes, *, verify_crc: bool = True, limit: int = 4096 * MIB) -> Container:
    """Read and verify a container whole; refuse it if its chunks and storages take more than `limit` bytes."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    need(len(data) > 0, "header", "the file is empty")
    need(data[:8] == MAGIC, "header", "no magic: not a fastckpt container")
    need(len(data) >= 320, "footer", f"{len(data)} bytes, but a container has at least 320")
    version, algorithm, read_features, write_features, check_features = struct.unpack("<IIQQQ", data[8:40])
    header_crc, footer_crc = int.from_bytes(data[56:64], "little"), int.from_bytes(data[-16:-8], "little")
    need(not verify_crc or crc64nvme(data[:56]) == header_crc, "header", "its crc is wrong")
    for what, found in (("version", version), ("digest algorithm", algorithm)):
        if found != 1:
            raise UnsupportedError("header", f"{what} {found}; known: 1")
    if read_features & ~(SELF_CONTAINED | SHARED):
        raise UnsupportedError("header", f"read features {read_features:#x}; known: {SELF_CONTAINED | SHARED:#x}")
    need(read_features != SELF_CONTAINED | SHARED, "header", "both SELF_CONTAINED and SHARED")
    if not read_features & SELF_CONTAINED:
        raise UnsupportedError("header", "not self-contained: its chunks are in other files")
    need(not any(data[40:56]), "header", "reserved bytes are not zero")

    need(data[-8:] == MAGIC, "footer", "no magic at the end: cut short, or followed by other bytes")
    need(not verify_crc or crc64nvme(data[-256:-16]) == footer_crc, "footer", "its crc is wrong")
    need(data[-96:-32] == data[:64], "footer", "its copy of the header differs from the header")
    need(not any(data[-104:-96]) and not any(data[-32:-16]), "footer", "reserved bytes are not zero")
    payload_offset, payload_length, length = struct.unpack("<QQQ", data[-128:-104])
    need(length == len(data), "footer", f"the container has {length} bytes, the file {len(data)}")
    need(payload_offset == 64 and payload_length <= length, "footer", "the payload is not at 64 or too long")
    end = payload_end = 64 + payload_length
    parts = {}
    for i, (part, cap) in enumerate(CAPS.items()):
        start, size, digest = struct.unpack_from("<QQ16s", data, len(data) - 256 + 32 * i)
        need(size <= min(cap, length), "footer", f"{part} of {size} bytes")
        need(start == end, "footer", f"{part} at {start}, but the part before it ends at {end}")
        end += size
        parts[part] = data[start:end]
        _check_digest(part, "the part", parts[part], digest)
    need(end + 256 == length, "footer", f"the skeleton ends at {end}, the footer starts at {length - 256}")

    directory, file_table = _json("directory", parts["directory"]), _json("file table", parts["file table"])
    need(isinstance(directory, dict), "directory", "not an object")
    need(file_table == [], "file table", "not empty in a self-contained container")
    _check_members(directory)
    need(len(parts["records"]) % 64 == 0, "records", f"{len(parts['records'])} bytes are no multiple of 64")
    records = [Record(*fields) for fields in struct.iter_unpack("<BBBBIQII16sQ8s8s", parts["records"])]
    for i, r in enumerate(records):
        _check_record(f"record {i}", r, payload_end)
    check_bases(records)
    _check_tiling(records, payload_end)
    starts = list(accumulate((r.raw for r in records), initial=0))
    for i, storage in enumerate(directory["storages"]):
        check_storage(f"storage {i}", storage, records, starts)
        need("shares" not in storage, "header", f"storage {i} has shares, but SHARED is not set")
    total = starts[-1] + sum(storage["bytes"] for storage in directory["storages"] if storage["extents"] is not None)
    need(total <= limit, "directory", f"{total} bytes of chunks and storages, more than the limit of {limit}")

    raw = chunks(records, lambda r: data, verify_crc)
    storages = [_storage(storage, starts, raw) for storage in directory["storages"]]
    tensors: dict[tuple[Key, ...], NDArray[Any]] = {}
    for i, tensor in enumerate(directory["tensors"]):
        name = _name(_member(tensor, "name", list, f"tensor {i}"), f"tensor {i}")
        array = _tensor(f"tensor {i}", tensor, directory, storages)
        if array is not None:
            tensors.setdefault(name, array)
    header = (version, algorithm, read_features, write_features, check_features)
    return Container(*header, directory, file_table, records, parts["skeleton"], storages, tensors)


def main() -> None:
    for name, array in read(sys.argv[1]).tensors.items():
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        keys = [{"repr": key.text} if isinstance(key, Repr) else key for key in name]
        print(json.dumps(keys), array.dtype, array.shape, digest)


if __name__ == "__main__":
    main()
