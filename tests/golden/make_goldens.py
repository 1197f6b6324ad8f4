"""Write the golden containers of must_read/ and must_reject/, built byte by byte from docs/format.md.

    python make_goldens.py          rewrite everything
    python make_goldens.py --check  make everything anew in a temporary folder and report what differs from here

Shares no code with fastckpt or the reference decoder, and needs no torch: the pickle streams are put together here.
README.md in this folder says what the files are for and what expected.json holds.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import shutil
import struct
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
import zstandard

MAGIC = b"FASTCKPT"
MIB = 1 << 20
STRIPE = 131072
RAW, CONST, ROT, ROTU, SUB, SUBPACK, CAST, REF = range(1, 9)
PARTS = ("directory", "file table", "records", "skeleton")

# Bytes of an element, and the storage class that torch's pickles name. Without a class, they use UntypedStorage.
ELEMENTS: dict[str, tuple[int, str | None]] = {
    "bool": (1, "BoolStorage"),
    "uint8": (1, "ByteStorage"),
    "int8": (1, "CharStorage"),
    "int16": (2, "ShortStorage"),
    "int32": (4, "IntStorage"),
    "int64": (8, "LongStorage"),
    "float16": (2, "HalfStorage"),
    "bfloat16": (2, "BFloat16Storage"),
    "float32": (4, "FloatStorage"),
    "float64": (8, "DoubleStorage"),
    "complex64": (8, "ComplexFloatStorage"),
    "complex128": (16, "ComplexDoubleStorage"),
    "quint8": (1, "QUInt8Storage"),
    "uint16": (2, None),
    "uint32": (4, None),
    "uint64": (8, None),
    "float8_e4m3fn": (1, None),
    "float8_e5m2": (1, None),
}


def element_size(dtype: str) -> int:
    """Bytes of one element; NumPy's plain names end in it."""
    return int(dtype[8:]) if dtype.startswith("numpy:") else ELEMENTS[dtype][0]


# --- Checksums -------------------------------------------------------------------------------------------------------


def digest(data: bytes) -> bytes:
    """XXH3, 128 bits."""
    return xxhash.xxh3_128(data).digest()


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ (0x9A6C9329AC4BC9B5 if value & 1 else 0) for value in table]
    return table


CRC_TABLE = _crc_table()


def crc(data: bytes) -> int:
    """CRC-64/NVME."""
    state = 0xFFFFFFFFFFFFFFFF
    for byte in data:
        state = CRC_TABLE[(state ^ byte) & 255] ^ state >> 8
    return state ^ 0xFFFFFFFFFFFFFFFF


def sha256(data: bytes) -> str:
    """What expected.json holds of bytes: a checksum that the format itself does not use."""
    return hashlib.sha256(data).hexdigest()


def u32(value: int) -> bytes:
    """Four bytes."""
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    """Eight bytes."""
    return struct.pack("<Q", value)


# --- Transforms and frames -------------------------------------------------------------------------------------------


def lanes_of(raw: bytes, w: int) -> list[int]:
    """The w-byte little-endian integers."""
    return [int.from_bytes(raw[i : i + w], "little") for i in range(0, len(raw), w)]


def planes(values: list[int], w: int) -> bytes:
    """Byte planes of the values, the highest first, stripe by stripe."""
    stripes = (values[i : i + 131072] for i in range(0, len(values), 131072))
    return b"".join(bytes(y >> 8 * k & 255 for y in stripe) for stripe in stripes for k in reversed(range(w)))


def rotate(raw: bytes, w: int) -> list[int]:
    """The lanes with their sign moved to the lowest bit."""
    bits = 8 * w
    return [(x << 1 | x >> (bits - 1)) & ((1 << bits) - 1) for x in lanes_of(raw, w)]


def rot_stream(raw: bytes, w: int) -> bytes:
    """The ROT stream."""
    return planes(rotate(raw, w), w)


def zstd(stream: bytes, *, checksum: bool = False) -> bytes:
    """A frame as the zstd library makes it; its bytes may change with the library's version."""
    return zstandard.ZstdCompressor(level=3, write_checksum=checksum, write_content_size=True).compress(stream)


def frame(
    content: bytes,
    *,
    size: int | None = -1,
    window: int | None = None,
    dictionary: int = 0,
    blocks: Iterable[tuple[int, int, bytes]] | None = None,
    closed: bool = True,
) -> bytes:
    """A frame made by hand, of uncompressed blocks: the same bytes whatever the version of the library.

    `size`: the content size to claim, None to leave it out. `window`: the descriptor byte, None for a single segment.
    `blocks`: (type, size field, bytes). `closed`: mark the last block as the last.
    """
    size = len(content) if size == -1 else size
    if size is None and window is None:
        window = 0
    flags = (0 if size is None else 2 << 6) | (1 << 5 if window is None else 0) | (3 if dictionary else 0)
    out = b"\x28\xb5\x2f\xfd" + bytes([flags]) + (b"" if window is None else bytes([window]))
    out += (u32(dictionary) if dictionary else b"") + (b"" if size is None else u32(size))
    all_blocks = [(0, len(content), content)] if blocks is None else list(blocks)
    for i, (kind, length, data) in enumerate(all_blocks):
        last = closed and i == len(all_blocks) - 1
        out += (int(last) | kind << 1 | length << 3).to_bytes(3, "little") + data
    return out


# --- Pickle ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Global:
    """A class or function, by module and name."""

    module: str
    name: str


@dataclass(eq=False)
class PersistentId:
    """A value whose meaning the reader is told apart from the pickle. `shown`: how expected.json describes it."""

    value: tuple[object, ...]
    shown: object = None


@dataclass(eq=False)
class Call:
    """The result of a function. `shown`: how expected.json describes it."""

    function: Global
    arguments: tuple[object, ...]
    shown: object = None


Stand = Call | PersistentId  # what stands for a tensor or an array in the skeleton


def no_hooks() -> Call:
    """The empty OrderedDict that stands for a tensor's hooks."""
    return Call(Global("collections", "OrderedDict"), ())


class Pickle:
    """A pickler of protocol 2 for the few types needed here. Calls are memoized, so that one object stays one."""

    def __init__(self, value: object) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[int, int] = {}
        self.put(value)
        self.out += b"."

    def put(self, value: object) -> None:
        """Append the opcodes that make `value`."""
        if value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            encoded = value.to_bytes(8, "little", signed=True)
            self.out += b"K" + bytes([value]) if 0 <= value < 256 else b"\x8a\x08" + encoded
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            encoded = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + u32(len(encoded)) + encoded
        elif isinstance(value, tuple):
            self.put_all(b"(", value, b"t")
        elif isinstance(value, list):
            self.put_all(b"](", value, b"e")
        elif isinstance(value, OrderedDict):
            self.put(no_hooks())
            self.put_all(b"(", itertools.chain(*value.items()), b"u")
        elif isinstance(value, dict):
            self.put_all(b"}(", itertools.chain(*value.items()), b"u")
        elif isinstance(value, Global):
            self.out += f"c{value.module}\n{value.name}\n".encode()
        elif isinstance(value, PersistentId):
            self.put(value.value)
            self.out += b"Q"
        elif not isinstance(value, Call):
            raise TypeError(f"no opcodes for {value!r}")
        elif id(value) in self.memo:
            self.out += b"h" + bytes([self.memo[id(value)]])
        else:
            self.put(value.function)
            self.put(value.arguments)
            number = len(self.memo)
            self.memo[id(value)] = number
            self.out += b"Rq" + bytes([number])

    def put_all(self, before: bytes, values: Iterable[object], after: bytes) -> None:
        """Append `values` between two opcodes."""
        self.out += before
        for value in values:
            self.put(value)
        self.out += after


def show(value: object) -> object:
    """What `load` must return, in JSON; README.md says how to read it."""
    if isinstance(value, Call | PersistentId):
        return value.shown
    if isinstance(value, OrderedDict | dict):
        kind = "OrderedDict" if isinstance(value, OrderedDict) else "dict"
        return {kind: [[show(key), show(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [show(item) for item in value]}
    return value


# --- Containers ------------------------------------------------------------------------------------------------------


def compact(value: object) -> bytes:
    """JSON as a writer may write it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


RECORD_FIELDS = ("transform", "lane", "pack", "zero", "file", "offset", "stored", "raw")


@dataclass
class Draft:
    """A container in the making: add chunks, storages and tensors, change what is to be wrong, then `build`."""

    root: object = field(default_factory=dict)
    payload: bytearray = field(default_factory=bytearray)
    records: list[dict[str, Any]] = field(default_factory=list)
    storages: list[dict[str, Any]] = field(default_factory=list)
    tensors: list[dict[str, Any]] = field(default_factory=list)
    data: list[bytes | None] = field(default_factory=list)
    members: dict[str, Any] = field(default_factory=dict)
    features: tuple[int, int, int] = (1, 0, 0)
    directory: bytes | None = None
    file_table: bytes = b"[]"
    skeleton: bytes | None = None
    records_tail: bytes = b""
    gap: bytes = b""
    flags: dict[str, Any] = field(default_factory=dict)

    def chunk(
        self, raw: bytes, transform: int = RAW, lane: int = 1, stored: bytes | None = None, **fields: object
    ) -> int:
        """Add a record and its stored bytes; `fields` overrides what follows from the rest."""
        if stored is None:
            stored = {RAW: raw, ROT: b""}.get(transform, b"")
            stored = zstd(rot_stream(raw, lane)) if transform == ROT else stored
        record = {
            "transform": transform,
            "lane": lane,
            "pack": 0,
            "zero": 0,
            "file": 0,
            "offset": 64 + len(self.payload) if stored else 0,
            "stored": len(stored),
            "raw": len(raw),
            "digest": digest(raw),
            "crc": crc(stored),
            "parameter": raw[:lane] if transform == CONST else b"",
            "zeros": b"",
        }
        self.payload += stored
        self.records.append(record | fields)
        return len(self.records) - 1

    def storage(
        self, dtype: str, data: bytes | None, extents: list[list[int]] | None, location: str = "cpu", size: int = 0
    ) -> int:
        """Add a storage; without data (and then `size` bytes long) it is a meta storage."""
        size = size if data is None else len(data)
        self.storages.append({"dtype": dtype, "bytes": size, "location": location, "extents": extents})
        self.data.append(data)
        return len(self.storages) - 1

    def stored_alone(self, dtype: str, data: bytes, transform: int = RAW, lane: int = 1, **more: Any) -> int:
        """Add a chunk and the storage that it is."""
        return self.storage(dtype, data, [[self.chunk(data, transform, lane, **more), 0, len(data)]])

    def tensor(
        self,
        name: list[Any],
        shape: list[int],
        storage: int,
        *,
        dtype: str | None = None,
        stride: list[int] | None = None,
        offset: int = 0,
        kind: str = "tensor",
        requires_grad: bool = False,
        order: str = "C",
        elements: int | None = None,
        key: str | None = None,
        metadata: dict[str, bool] | None = None,
        whole: dict[str, list[int]] | None = None,
    ) -> Stand:
        """Add a tensor of a storage and give what stands for it in the skeleton."""
        described = self.storages[storage]
        dtype = dtype or described["dtype"]
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))] if stride is None else stride
        entry = {"name": name, "dtype": dtype, "shape": shape, "stride": stride, "offset": offset, "storage": storage}
        entry |= {"kind": kind, "requires_grad": requires_grad} | ({"global": whole} if whole else {})
        self.tensors.append(entry)
        key, size = str(storage) if key is None else key, described["bytes"]
        untyped = Global("torch.storage", "UntypedStorage")
        if kind == "array":
            of_array = ("ndarray", dtype.removeprefix("numpy:"), tuple(shape), order)
            return PersistentId(("storage", untyped, key, "cpu", size, *of_array), {kind: name})
        class_name = ELEMENTS[described["dtype"]][1]
        storage_type = Global("torch", class_name) if class_name else untyped
        count = elements if elements is not None else size // (ELEMENTS[described["dtype"]][0] if class_name else 1)
        storage_id = PersistentId(("storage", storage_type, key, described["location"], count))
        view = (storage_id, offset, tuple(shape), tuple(stride))
        shown: dict[str, object] = {"tensor": name, **(metadata or {})}
        if class_name and dtype == described["dtype"]:
            arguments = (*view, requires_grad and kind != "parameter", no_hooks(), *([metadata] if metadata else []))
            made = Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments, shown)
        else:
            arguments = (*view, requires_grad, no_hooks(), Global("torch", dtype))
            made = Call(Global("torch._utils", "_rebuild_tensor_v3"), arguments, shown)
        if kind == "parameter":
            function = Global("torch._utils", "_rebuild_parameter")
            made = Call(function, (made, requires_grad, no_hooks()), {"parameter": name})
        return made

    def add(self, name: list[Any], dtype: str, data: bytes, transform: int = RAW, lane: int = 1, **more: Any) -> Stand:
        """Add a one-dimensional tensor with a storage and a chunk of its own."""
        storage = self.stored_alone(dtype, data, transform, lane)
        return self.tensor(name, [len(data) // element_size(dtype)], storage, **more)

    def directory_bytes(self) -> bytes:
        """The directory as JSON."""
        value = {
            "byteorder": "little",
            "writer": {"name": "fastckpt", "version": "1.0.0", "torch": "2.13.0"},
            "step": None,
            "rank": 0,
            "world": 1,
            "meta": {},
            "storages": self.storages,
            "tensors": self.tensors,
        }
        return compact(value | self.members)

    def record_bytes(self) -> bytes:
        """The records, and whatever is to follow them."""
        out = b""
        for r in self.records:
            out += struct.pack("<BBBBIQII", *(r[name] for name in RECORD_FIELDS))
            out += struct.pack("<16sQ8s8s", r["digest"], r["crc"], r["parameter"], r["zeros"])
        return out + self.records_tail

    def build(self) -> bytes:
        """The container, with every checksum right for what it covers."""
        header = MAGIC + struct.pack("<IIQQQ16x", 1, 1, *self.features)
        header += u64(crc(header))
        out, footer = header + self.payload, b""
        contents = [self.directory_bytes() if self.directory is None else self.directory, self.file_table]
        contents += [self.record_bytes(), bytes(Pickle(self.root).out) if self.skeleton is None else self.skeleton]
        for part, content in zip(PARTS, contents, strict=True):
            out += self.gap if part == "file table" else b""
            footer += u64(len(out)) + u64(len(content)) + digest(content)
            out += content
        footer += u64(64) + u64(len(self.payload)) + u64(len(out) + 256) + bytes(8) + header + bytes(16)
        return out + footer + u64(crc(footer)) + MAGIC

    def expected(self, about: str) -> dict[str, Any]:
        """What a reader must find, computed from the bytes that went in."""
        tensors = {json.dumps(t["name"], ensure_ascii=False): self.expected_tensor(t) for t in self.tensors}
        storages = [None if d is None else {"bytes": len(d), "sha256": sha256(d)} for d in self.data]
        load = {"absent": True} if self.skeleton == b"" else show(self.root)
        return {"about": about, "load": load, "storages": storages, "tensors": tensors} | self.flags

    def expected_tensor(self, tensor: dict[str, Any]) -> dict[str, Any]:
        """The tensor's description, and the digest of its elements in row-major order."""
        names = ("dtype", "shape", "kind", "requires_grad", "storage")
        out, data = {name: tensor[name] for name in names} | {"sha256": None}, self.data[tensor["storage"]]
        if data is not None and tensor["kind"] != "quantized":
            size = element_size(tensor["dtype"])
            whole = tensor["offset"] == 0 and tensor["stride"] == [1]
            content = data[: tensor["shape"][0] * size] if whole else elements_of(data, tensor, size)
            out["sha256"] = sha256(content)
        return out


def elements_of(data: bytes, tensor: dict[str, Any], size: int) -> bytes:
    """The elements of a view, one by one."""
    out = b""
    for index in itertools.product(*map(range, tensor["shape"])):
        at = tensor["offset"] + sum(i * step for i, step in zip(index, tensor["stride"], strict=True))
        out += data[at * size : (at + 1) * size]
    return out


# --- What must be read -----------------------------------------------------------------------------------------------


def numbers(count: int, w: int, exponent_bits: int) -> bytes:
    """Bit patterns like trained weights: any sign and mantissa, few exponents. The first ones are the odd ones."""
    bits, state, out = 8 * w, 1, []
    mantissa = bits - 1 - exponent_bits
    infinity = ((1 << exponent_bits) - 1) << mantissa
    top = 1 << (bits - 1)
    # 0, −0, denormals, infinities, NaNs with different payloads (quiet, signalling, negative)
    odd = [0, top, 1, top | 1, (1 << mantissa) - 1, infinity, top | infinity, infinity + 1]
    odd += [infinity | 3 << mantissa - 2, top | infinity | 5, (1 << bits) - 1]
    for _ in range(count - len(odd)):
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        exponent = (1 << (exponent_bits - 1)) - 4 - min((state >> 56 & 63).bit_length(), 5)
        out.append((state >> 63) << (bits - 1) | exponent << mantissa | (state >> 2) & ((1 << mantissa) - 1))
    return b"".join(value.to_bytes(w, "little") for value in odd + out)


def floats(*values: float) -> bytes:
    """Bytes of float32 numbers."""
    return struct.pack(f"<{len(values)}f", *values)


Golden = Callable[[], Draft]
MUST_READ: dict[str, tuple[str, Golden]] = {}


def must_read(make: Golden) -> Golden:
    """Register a container: its name is the function's, what it shows its docstring."""
    MUST_READ[make.__name__] = (str(make.__doc__), make)
    return make


# Four positive bfloat16 numbers, and the same a few steps on: their order is that of their bits, the differences are 0, 1, 0, −1.
BASE, NEAR = struct.pack("<4H", 0x3F80, 0x3F81, 0x4000, 0x4011), struct.pack("<4H", 0x3F80, 0x3F82, 0x4000, 0x4010)
NEAR_ZIGZAG = [0, 2, 0, 1]


def bits_packed(values: list[int], width: int) -> bytes:
    """Values of `width` bits, least significant first, the rest of the last byte zero."""
    whole = sum(value << width * i for i, value in enumerate(values))
    return whole.to_bytes((width * len(values) + 7) // 8, "little")


def ordered(x: int, w: int) -> int:
    """m of the format: floats in the order of integers."""
    top = 1 << (8 * w - 1)
    return x ^ (2 * top - 1) if x & top else x | top


def zigzag(raw: bytes, base: bytes, w: int) -> list[int]:
    """z of the format."""
    found = []
    for i in range(0, len(raw), w):
        x, b = int.from_bytes(raw[i : i + w], "little"), int.from_bytes(base[i : i + w], "little")
        d = (ordered(x, w) - ordered(b, w)) % (1 << 8 * w)
        found.append((d << 1) % (1 << 8 * w) ^ ((1 << 8 * w) - 1 if d >> (8 * w - 1) else 0))
    return found


def subpack_stream(z: list[int], pack: int, w: int) -> bytes:
    """The SUBPACK stream of these differences."""
    esc = (1 << pack) - 1
    far = [value - esc for value in z if value >= esc]
    return u32(len(far)) + bits_packed([min(value, esc) for value in z], pack) + planes(far, w)


@must_read
def rotu() -> Draft:
    """ROTU: positive numbers, the lowest plane in 7 bits each."""
    y = rotate(NEAR, 2)
    low = bits_packed([value >> 1 & 127 for value in y], 7)
    d = Draft()
    s = d.stored_alone("bfloat16", NEAR, ROTU, 2, stored=frame(bytes(value >> 8 for value in y) + low))
    d.root = {"a": d.tensor(["a"], [4], s)}
    return d


@must_read
def rotu_stripes() -> Draft:
    """ROTU of float32 over two stripes, the second one of 5 lanes."""
    raw = b"".join(struct.pack("<f", 1 + i % 251 / 7) for i in range(STRIPE + 5))
    y = rotate(raw, 4)
    stream = b""
    for some in (y[:STRIPE], y[STRIPE:]):
        stream += b"".join(bytes(value >> 8 * k & 255 for value in some) for k in (3, 2, 1))
        stream += bits_packed([value >> 1 & 127 for value in some], 7)
    d = Draft()
    s = d.stored_alone("float32", raw, ROTU, 4, stored=zstd(stream))
    d.root = {"a": d.tensor(["a"], [STRIPE + 5], s)}
    return d


@must_read
def sub() -> Draft:
    """SUB of another record, which no storage uses."""
    d = Draft()
    d.chunk(BASE)
    s = d.stored_alone("bfloat16", NEAR, SUB, 2, stored=frame(planes(NEAR_ZIGZAG, 2)))
    d.root = {"a": d.tensor(["a"], [4], s)}
    return d


@must_read
def sub_signs() -> Draft:
    """SUB of float32 and float64 across zero, NaN and infinity: each lane's difference wraps."""
    d = Draft()
    root = {}
    for name, w, code in (("float32", 4, "f"), ("float64", 8, "d")):
        a = struct.pack(f"<5{code}", 1.0, -1.0, 0.0, float("inf"), float("nan"))
        b = struct.pack(f"<5{code}", -1.0, 1.0, -0.0, float("-inf"), 0.0)
        base = d.chunk(b)
        s = d.stored_alone(name, a, SUB, w, stored=frame(planes(zigzag(a, b, w), w)), parameter=u32(base))
        root[name] = d.tensor([name], [5], s)
    d.root = root
    return d


@must_read
def subpack() -> Draft:
    """SUBPACK in 2 bits, without escapes."""
    d = Draft()
    d.chunk(BASE)
    s = d.stored_alone("bfloat16", NEAR, SUBPACK, 2, stored=frame(subpack_stream(NEAR_ZIGZAG, 2, 2)), pack=2)
    d.root = {"a": d.tensor(["a"], [4], s)}
    return d


@must_read
def subpack_escapes() -> Draft:
    """SUBPACK in 1, 2, 4 and 8 bits, 2, 4 and 8 bytes wide, with escapes, of lengths that leave bits unused."""
    d = Draft()
    root = {}
    for name, w in (("bfloat16", 2), ("float32", 4), ("float64", 8)):
        for pack in (1, 2, 4, 8):
            n = 21
            b = b"".join((1 + i * 977 % 30000).to_bytes(w, "little") for i in range(n))
            a = b"".join(
                (1 + i * 977 % 30000 + (i * i * 7 % 300 if i % 3 == 0 else i % 2)).to_bytes(w, "little")
                for i in range(n)
            )
            base = d.chunk(b)
            stored = frame(subpack_stream(zigzag(a, b, w), pack, w))
            s = d.stored_alone(name, a, SUBPACK, w, stored=stored, pack=pack, parameter=u32(base))
            root[f"{name}-{pack}"] = d.tensor([f"{name}-{pack}"], [n], s)
    d.root = root
    return d


@must_read
def cast() -> Draft:
    """CAST: bfloat16 that equals float32 rounded; nothing is stored for it."""
    d = Draft()
    d.chunk(floats(1, 2, 3, 4))
    s = d.stored_alone("bfloat16", struct.pack("<4H", 0x3F80, 0x4000, 0x4040, 0x4080), CAST, 2)
    d.root = {"a": d.tensor(["a"], [4], s)}
    return d


@must_read
def cast_rounding() -> Draft:
    """CAST of ties, overflow to infinity, NaNs (one with a payload that rounding would lose) and negative numbers."""
    pairs = [
        (0x3F808000, 0x3F80),  # a tie: to even, down
        (0x3F818000, 0x3F82),  # a tie: to even, up
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest number becomes infinity
        (0x7F800001, 0x7FC0),  # a NaN stays one
        (0xFF812345, 0xFFC1),
        (0x80008000, 0x8000),
        (0xBF80FFFF, 0xBF81),
    ]
    d = Draft()
    d.chunk(struct.pack("<8I", *(wide for wide, _ in pairs)))
    s = d.stored_alone("bfloat16", struct.pack("<8H", *(narrow for _, narrow in pairs)), CAST, 2)
    d.root = {"a": d.tensor(["a"], [8], s)}
    return d


@must_read
def ref() -> Draft:
    """REF: the bytes of another record."""
    d = Draft()
    d.chunk(BASE)
    s = d.stored_alone("bfloat16", BASE, REF, 2)
    d.root = {"a": d.tensor(["a"], [4], s)}
    return d


@must_read
def base_spans_records() -> Draft:
    """A base that begins at element 3 of one record and ends in the next, of another transform."""
    d = Draft()
    first, second = BASE, rot_stream(NEAR, 2)
    d.chunk(first)
    d.chunk(NEAR, ROT, 2, stored=frame(second))
    raw = BASE[6:] + NEAR[:6]
    s = d.stored_alone("bfloat16", raw, REF, 2, parameter=u32(0) + u32(3))
    t = d.stored_alone("bfloat16", raw[:4], SUB, 2, stored=frame(planes([0, 0], 2)), parameter=u32(2))
    d.root = {"a": d.tensor(["a"], [4], s), "b": d.tensor(["b"], [2], t)}
    return d


@must_read
def base_chain_of_64() -> Draft:
    """The longest chain of bases that a reader must follow."""
    return _chain(64)


@must_read
def empty_object() -> Draft:
    """An empty dict: payload and records are empty."""
    return Draft({})


@must_read
def empty_skeleton() -> Draft:
    """No skeleton: tensors can be fetched by name, but there is no object to load."""
    d = Draft(skeleton=b"")
    d.add(["a"], "float32", floats(1, 2, 3))
    return d


@must_read
def no_tensors() -> Draft:
    """An object without tensors; the directory has a step, metadata and a place among the ranks."""
    d = Draft({"epoch": 3, "lr": 0.5, "tags": ["x", None, True], "shape": (1, 2)})
    d.members = {"step": 1234, "rank": 3, "world": 8, "meta": {"run": "r1", "nested": {"x": [1, 2.5, None]}}}
    return d


@must_read
def bare_tensor() -> Draft:
    """The saved object is itself a tensor: its name is []."""
    d = Draft()
    d.root = d.add([], "float32", floats(1, 2, 3))
    return d


@must_read
def zero_dim() -> Draft:
    """A tensor with no dimensions: one element."""
    d = Draft()
    d.root = {"step": d.tensor(["step"], [], d.stored_alone("float32", floats(7)))}
    return d


@must_read
def dims_64() -> Draft:
    """As many dimensions as are allowed."""
    d = Draft()
    d.root = {"a": d.tensor(["a"], [1] * 63 + [2], d.stored_alone("uint8", b"ab"))}
    return d


@must_read
def raw_int64() -> Draft:
    """RAW."""
    d = Draft()
    d.root = {"a": d.add(["a"], "int64", struct.pack("<5q", 0, -1, 2**62, -(2**63), 123456789))}
    return d


@must_read
def const_zeros() -> Draft:
    """CONST, with the element's width as the lane."""
    d = Draft()
    d.root = {"a": d.add(["a"], "float32", bytes(4000), CONST, 4)}
    return d


@must_read
def const_widths() -> Draft:
    """CONST lanes of 1, 2, 4 and 8 bytes."""
    d = Draft()
    kinds = (("a", "uint8", 1), ("b", "bfloat16", 2), ("c", "float32", 4), ("d", "int64", 8))
    d.root = {name: d.add([name], dtype, bytes(range(0x81, 0x81 + w)) * 9, CONST, w) for name, dtype, w in kinds}
    return d


@must_read
def const_complex() -> Draft:
    """CONST of complex numbers: complex64 in one lane; complex128 whose halves are equal, in two."""
    d = Draft()
    a = d.add(["a"], "complex64", floats(1.5, -2.5) * 6, CONST, 8)
    d.root = {"a": a, "b": d.add(["b"], "complex128", struct.pack("<2d", 0.1, 0.1) * 5, CONST, 8)}
    return d


@must_read
def const_largest_chunk() -> Draft:
    """A chunk of the most elements and bytes that are allowed."""
    d = Draft()
    d.root = {"a": d.add(["a"], "float32", floats(-0.0) * MIB, CONST, 4)}
    return d


def one_rot(dtype: str, exponent_bits: int, count: int = 1001) -> Draft:
    """A container of one ROT chunk."""
    w = ELEMENTS[dtype][0]
    d = Draft()
    d.root = {"a": d.add(["a"], dtype, numbers(count, w, exponent_bits), ROT, w)}
    return d


@must_read
def rot_bf16() -> Draft:
    """ROT of bfloat16, with zeros of both signs, denormals, infinities and NaN payloads."""
    return one_rot("bfloat16", 8)


@must_read
def rot_fp16() -> Draft:
    """ROT of float16."""
    return one_rot("float16", 5)


@must_read
def rot_fp32() -> Draft:
    """ROT of float32."""
    return one_rot("float32", 8)


@must_read
def rot_fp64() -> Draft:
    """ROT of float64."""
    return one_rot("float64", 11)


@must_read
def rot_complex64() -> Draft:
    """ROT of complex64: two lanes of 4 bytes for each element."""
    d = Draft()
    d.root = {"a": d.add(["a"], "complex64", numbers(600, 4, 8), ROT, 4)}
    return d


@must_read
def rot_one_lane() -> Draft:
    """ROT of a single lane, in a frame longer than the raw bytes."""
    d = Draft()
    d.root = {"a": d.add(["a"], "bfloat16", b"\x34\x92", ROT, 2)}
    return d


@must_read
def rot_odd_tail() -> Draft:
    """ROT of more than one stripe, the last one short: 131,072 + 77 lanes of 2 bytes."""
    values = [0x3F80 + i % 251 | (i % 3 == 0) << 15 for i in range(131072 + 77)]
    d = Draft()
    d.root = {"a": d.add(["a"], "bfloat16", struct.pack(f"<{len(values)}H", *values), ROT, 2)}
    return d


@must_read
def rot_odd_tail_fp32() -> Draft:
    """ROT of two stripes and one lane of 4 bytes."""
    values = [0xBF800000 + i % 509 * 65537 for i in range(2 * 131072 + 1)]
    d = Draft()
    d.root = {"a": d.add(["a"], "float32", struct.pack(f"<{len(values)}I", *values), ROT, 4)}
    return d


@must_read
def frame_with_checksum() -> Draft:
    """The frame has a checksum of its own."""
    raw = numbers(64, 4, 8)
    d = Draft()
    s = d.stored_alone("float32", raw, ROT, 4, stored=zstd(rot_stream(raw, 4), checksum=True))
    d.root = {"a": d.tensor(["a"], [64], s)}
    return d


@must_read
def frame_window_8_mib() -> Draft:
    """The frame is no single segment and asks for the largest window that is allowed."""
    raw = numbers(32, 4, 8)
    d = Draft()
    s = d.stored_alone("float32", raw, ROT, 4, stored=frame(rot_stream(raw, 4), window=13 << 3))
    d.root = {"a": d.tensor(["a"], [32], s)}
    return d


@must_read
def frame_many_blocks() -> Draft:
    """The frame has empty, uncompressed and run-length blocks."""
    raw = floats(*range(8), *[2.0] * 8)
    stream = rot_stream(raw, 4)
    tail = len(stream) - len(stream.rstrip(b"\0"))
    parts = [(0, 0, b""), (0, len(stream) - tail, stream[:-tail]), (1, tail, b"\0"), (0, 0, b"")]
    d = Draft()
    s = d.stored_alone("float32", raw, ROT, 4, stored=frame(stream, blocks=parts))
    d.root = {"a": d.tensor(["a"], [16], s)}
    return d


@must_read
def bundle_of_two() -> Draft:
    """Two storages in one chunk."""
    raw = floats(1, 2, 3, 4, 5, 6, 7)
    d = Draft()
    d.chunk(raw)
    a, b = d.storage("float32", raw[:16], [[0, 0, 16]]), d.storage("float32", raw[16:], [[0, 16, 12]])
    d.root = {"a": d.tensor(["a"], [2, 2], a), "b": d.tensor(["b"], [3], b)}
    return d


@must_read
def multi_chunk() -> Draft:
    """One extent over several records of different lengths and transforms."""
    pieces = [floats(1, 2, 3), floats(9) * 50, numbers(40, 4, 8), floats(5)]
    d = Draft()
    for transform, lane, raw in zip((RAW, CONST, ROT, RAW), (1, 4, 4, 1), pieces, strict=True):
        d.chunk(raw, transform, lane)
    data = b"".join(pieces)
    d.root = {"a": d.tensor(["a"], [94], d.storage("float32", data, [[0, 0, len(data)]]))}
    return d


@must_read
def extents_scattered() -> Draft:
    """A storage of several extents: from the middle of records, across a boundary, backwards and twice the same."""
    pieces = [b"abcdefgh", b"ijklmnop", b"qrstuvwx"]
    d = Draft()
    for raw in pieces:
        d.chunk(raw)
    data = b"tuvwx" + b"fghijklmnopqr" + b"ab" + b"ab"
    s = d.storage("uint8", data, [[2, 3, 5], [0, 5, 13], [0, 0, 2], [0, 0, 2]])
    d.root = {"a": d.tensor(["a"], [len(data)], s)}
    return d


@must_read
def shared_chunk() -> Draft:
    """Two equal records share one stretch of the payload; the two storages are separate memory."""
    raw = floats(1, 2, 3, 4)
    d = Draft()
    a = d.add(["a"], "float32", raw)
    d.records.append(dict(d.records[0]))
    d.root = {"a": a, "b": d.tensor(["b"], [4], d.storage("float32", raw, [[1, 0, 16]]))}
    return d


@must_read
def unused_record() -> Draft:
    """Records that no storage uses."""
    d = Draft()
    d.chunk(b"nobody reads this")
    a = d.add(["a"], "float32", floats(1, 2))
    d.chunk(bytes(12), CONST, 2)
    d.root = {"a": a}
    return d


@must_read
def payload_not_in_record_order() -> Draft:
    """Stored bytes tile the payload in another order than the records'."""
    d = Draft()
    d.root = {"a": d.add(["a"], "uint8", b"aaaa"), "b": d.add(["b"], "uint8", b"bbbbbb")}
    d.payload[:] = b"bbbbbbaaaa"
    d.records[0]["offset"], d.records[1]["offset"] = 70, 64
    return d


@must_read
def tied() -> Draft:
    """One parameter under two names: two entries, one storage."""
    d = Draft()
    parameter = d.add(["embed"], "float32", floats(1, 2, 3), kind="parameter", requires_grad=True)
    d.tensor(["head"], [3], 0, kind="parameter", requires_grad=True)
    d.root = {"embed": parameter, "head": parameter}
    return d


@must_read
def view_strided_offset() -> Draft:
    """Views of one storage: with an offset, transposed, expanded, overlapping, and one with no elements at its end."""
    d = Draft()
    s = d.stored_alone("float32", floats(*range(12)))
    d.root = OrderedDict(
        empty=d.tensor(["empty"], [0], s, offset=12),
        expanded=d.tensor(["expanded"], [3, 4], s, stride=[0, 1]),
        overlapping=d.tensor(["overlapping"], [3, 3], s, stride=[1, 1], offset=4),
        strided=d.tensor(["strided"], [2, 3], s, stride=[6, 2], offset=1),
        transposed=d.tensor(["transposed"], [4, 3], s, stride=[1, 4]),
        whole=d.tensor(["whole"], [3, 4], s),
    )
    return d


@must_read
def conjugate_view() -> Draft:
    """A conjugate view: `tensors` describes the memory, the skeleton holds the bit."""
    d = Draft()
    d.root = {"a": d.add(["a"], "complex64", floats(1, 2, 3, -4), metadata={"conj": True})}
    return d


@must_read
def zero_size_dim() -> Draft:
    """A dimension of 0; a storage of 0 bytes."""
    d = Draft()
    d.root = {"a": d.tensor(["a"], [0, 3], d.storage("float32", b"", []))}
    return d


@must_read
def empty_storage() -> Draft:
    """A storage of 0 bytes between others."""
    d = Draft()
    a, b = d.add(["a"], "int32", u32(1)), d.tensor(["b"], [0], d.storage("int32", b"", []))
    d.root = [a, b, d.add(["c"], "int32", u32(2))]
    for number, tensor in enumerate(d.tensors):  # the object is a list: its keys are integers
        tensor["name"][:] = [number]
    return d


@must_read
def meta_storage() -> Draft:
    """A storage without data, by a persistent id as torch writes it for such a storage alone."""
    d = Draft(flags={"proposed": True})
    d.root = {"a": d.tensor(["a"], [4], d.storage("float32", None, None, "meta", 16))}
    return d


@must_read
def location_cuda() -> Draft:
    """A tensor that was on a GPU when it was saved."""
    d = Draft(flags={"map_location": "cpu"})
    raw = floats(1, 2)
    s = d.storage("float32", raw, [[d.chunk(raw), 0, 8]], "cuda:1")
    d.root = {"a": d.tensor(["a"], [2], s)}
    return d


@must_read
def nested_names() -> Draft:
    """Names of several keys of all types, in canonical order, which is by code point and not by UTF-16 unit."""
    tree: list[tuple[list[Any], bytes]] = [
        ([-1], b"A"),
        ([2], b"B"),
        ([10], b"C"),
        (["2"], b"D"),
        (["model", "layers", 0], b"E"),
        (["model", "layers", 1, "w"], b"F"),
        (["model", "layers.0"], b"G"),
        (["é"], b"H"),
        (["\uff5e"], b"I"),
        (["\U0001f600"], b"J"),
        ([{"repr": "(1, 2)"}], b"K"),
        ([{"repr": "None"}], b"L"),
    ]
    d = Draft()
    t = [d.add(name, "uint8", raw) for name, raw in tree]
    model = {"layers": [t[4], {"w": t[5]}], "layers.0": t[6]}
    d.root = {-1: t[0], 2: t[1], 10: t[2], "2": t[3], "model": model, "é": t[7], "\uff5e": t[8], "\U0001f600": t[9]}
    d.root |= {(1, 2): t[10], None: t[11]}
    return d


@must_read
def optimizer_state() -> Draft:
    """A state as optimizers have it: parameters by number, a step without dimensions, an OrderedDict."""
    d = Draft()
    raw = floats(1, 2, 3, 4)
    average = d.tensor(["optimizer", "state", 0, "exp_avg"], [2, 2], d.stored_alone("float32", raw))
    step = d.tensor(["optimizer", "state", 0, "step"], [], d.stored_alone("float32", floats(10)))
    weight = d.tensor(["model", "w"], [2, 2], d.stored_alone("float32", floats(-1, -2, -3, -4)))
    d.tensors = [d.tensors[2], *d.tensors[:2]]
    groups = [{"lr": 0.25, "params": [0]}]
    optimizer = {"state": {0: {"step": step, "exp_avg": average}}, "param_groups": groups}
    d.root = {"model": OrderedDict(w=weight), "optimizer": optimizer}
    return d


@must_read
def sharded() -> Draft:
    """A shard of a global tensor."""
    d = Draft()
    d.members = {"rank": 1, "world": 2}
    whole = {"shape": [4, 3], "offset": [2, 0]}
    d.root = {"a": d.tensor(["a"], [2, 3], d.stored_alone("float32", floats(*range(6))), whole=whole)}
    return d


@must_read
def numpy_array() -> Draft:
    """Arrays outside the pickle: constant; in Fortran order; and of a big-endian type."""
    d = Draft()
    fortran = struct.pack("<8281d", *(i % 50 - 25.0 for i in range(8281)))
    big = struct.pack(">f", 1.5) * 16385
    d.root = {
        "big": d.add(["big"], "numpy:>f4", big, CONST, 4, kind="array"),
        "c": d.add(["c"], "numpy:<f8", struct.pack("<d", 2.5) * 8193, CONST, 8, kind="array"),
        "f": d.tensor(
            ["f"], [91, 91], d.stored_alone("numpy:<f8", fortran, ROT, 8), stride=[1, 91], kind="array", order="F"
        ),
    }
    return d


@must_read
def sparse_parts() -> Draft:
    """A sparse tensor: its parts are tensors of kind `part`."""
    d = Draft()
    numbers_at = d.stored_alone("int64", struct.pack("<2q", 0, 2))
    indices = d.tensor(["s", "indices"], [1, 2], numbers_at, kind="part")
    values = d.tensor(["s", "values"], [2], d.stored_alone("float32", floats(1, 2)), kind="part")
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.sparse_coo",))
    size = Call(Global("torch", "Size"), ((3,),))
    shown = {"sparse_coo": {"indices": ["s", "indices"], "values": ["s", "values"], "shape": [3]}}
    sparse = Call(Global("torch._utils", "_rebuild_sparse_tensor"), (layout, (indices, values, size, False)), shown)
    d.root = {"s": sparse}
    return d


@must_read
def quantized() -> Draft:
    """A quantized tensor is described only; its bounds are not checked. The skeleton leaves it out."""
    d = Draft({"a": 1})
    d.tensor(["q"], [100], d.stored_alone("quint8", b"\x01\x02\x03\x04"), kind="quantized")
    return d


@must_read
def dtypes() -> Draft:
    """Every element type with a storage class of its own."""
    d, root = Draft(), OrderedDict[str, object]()
    for dtype in sorted(name for name, (_, storage) in ELEMENTS.items() if storage and name != "quint8"):
        size = ELEMENTS[dtype][0]
        raw = b"\x00\x01\x01\x00" if dtype == "bool" else bytes(range(128 - size, 128 + 2 * size))
        root[dtype] = d.add([dtype], dtype, raw)
    d.root = root
    return d


@must_read
def dtypes_untyped() -> Draft:
    """Element types without a storage class: UntypedStorage, whose elements are bytes."""
    d, root = Draft(), OrderedDict[str, object]()
    for dtype in sorted(name for name, (_, storage) in ELEMENTS.items() if not storage):
        size = ELEMENTS[dtype][0]
        root[dtype] = d.add([dtype], dtype, bytes(range(128 - size, 128 + 2 * size)))
    d.root = root
    return d


@must_read
def view_of_other_dtype() -> Draft:
    """A tensor whose element type is not its storage's: uint16 numbers in the memory of a uint32 tensor."""
    d = Draft()
    s = d.stored_alone("uint32", struct.pack("<2I", 0x00010002, 0x00030004))
    d.root = {"a": d.tensor(["a"], [2], s), "b": d.tensor(["b"], [4], s, dtype="uint16")}
    return d


@must_read
def unknown_features() -> Draft:
    """Write and check features that nobody knows: loading ignores them."""
    d = Draft(features=(1, 1 << 63 | 5, 1 << 40))
    d.root = {"a": d.add(["a"], "float32", floats(1, 2, 3))}
    return d


@must_read
def unknown_directory_members() -> Draft:
    """Members that nobody knows, at every level, are ignored."""
    d = Draft()
    d.root = {"a": d.add(["a"], "float32", floats(1, 2, 3))}
    d.members = {"future": {"x": [1, None, {"y": 0.5}]}, "another": "text"}
    d.storages[0] |= {"hint": [1]}
    d.tensors[0] |= {"hint": None}
    return d


@must_read
def writer_from_the_future() -> Draft:
    """The writer's version decides nothing."""
    d = Draft()
    d.root = {"a": d.add(["a"], "float32", floats(1, 2, 3))}
    d.members = {"writer": {"name": "fastckpt", "version": "99.1.0", "torch": "7.0.0", "more": 1}}
    return d


@must_read
def directory_spelled_otherwise() -> Draft:
    """The directory with white space, members in another order, and escapes."""
    d = Draft()
    d.root = {"é": d.add(["é"], "float32", floats(1, 2, 3))}
    d.directory = json.dumps(json.loads(d.directory_bytes()), indent=1, sort_keys=True).replace("/", "\\/").encode()
    d.directory = b"\r\n\t " + d.directory + b"\n"
    d.file_table = b" [ ] "
    return d


# --- What must be rejected -------------------------------------------------------------------------------------------

CORRUPT, UNSUPPORTED, FOREIGN, EMPTY, TOO_LARGE = "corrupt", "unsupported", "not_a_checkpoint", "empty", "too_large"
MUST_REJECT: dict[str, tuple[bytes, dict[str, Any]]] = {}


def reject(name: str, kind: str, part: str, why: str, container: bytes | Draft, **flags: object) -> None:
    """Register a file that breaks one rule."""
    data = container.build() if isinstance(container, Draft) else container
    MUST_REJECT[name] = (data, {"kind": kind, "part": part, "why": why} | flags)


def simple() -> Draft:
    """One float32 tensor `a` in one RAW chunk of 16 bytes: what most of the faults are put into."""
    d = Draft()
    d.root = {"a": d.add(["a"], "float32", floats(1, 2, 3, 4))}
    return d


def one_frame(stored: bytes | None = None, raw: bytes = floats(1, 2, 3, 4)) -> Draft:
    """One float32 tensor in one ROT chunk, stored as the given frame."""
    d = Draft()
    s = d.stored_alone("float32", raw, ROT, 4, stored=frame(rot_stream(raw, 4)) if stored is None else stored)
    d.root = {"a": d.tensor(["a"], [len(raw) // 4], s)}
    return d


def with_record(**fields: object) -> Draft:
    """Change fields of the only record."""
    d = simple()
    d.records[0] |= fields
    return d


def with_extra(raw: bytes, transform: int = CONST, lane: int = 4, **fields: Any) -> Draft:
    """Add a record that no storage uses."""
    d = simple()
    d.chunk(raw, transform, lane, **fields)
    return d


def with_storage(**members: object) -> Draft:
    """Change members of the only storage."""
    d = simple()
    d.storages[0] |= members
    return d


def with_tensor(**members: object) -> Draft:
    """Change members of the only tensor."""
    d = simple()
    d.tensors[0] |= members
    return d


def with_directory(*, old: bytes = b"", new: bytes = b"", encode: Callable[[bytes], bytes] = bytes) -> Draft:
    """Change the text of the directory."""
    d = simple()
    text = d.directory_bytes()
    if text.count(old) != 1 and old:
        raise ValueError(f"{old!r} is not in the directory once")
    d.directory = encode(text.replace(old, new) if old else text)
    return d


def without(member: str, inside: str | None = None) -> Draft:
    """Leave a member out of the directory, or out of its first storage or tensor."""
    d = simple()
    value = json.loads(d.directory_bytes())
    del (value[inside][0] if inside else value)[member]
    d.directory = compact(value)
    return d


def with_skeleton(**changes: Any) -> Draft:
    """Build the only tensor's pickle otherwise than the directory describes it."""
    d = simple()
    described = copy.deepcopy(d.tensors)
    d.root = {"a": d.tensor(["a"], changes.pop("shape", [4]), 0, **changes)}
    d.tensors = described
    return d


def patch_footer(container: bytes, at: int, new: bytes) -> bytes:
    """Change the footer and make its crc right again."""
    footer = bytearray(container[-256:-16])
    footer[at : at + len(new)] = new
    return container[:-256] + bytes(footer) + u64(crc(bytes(footer))) + container[-8:]


def patch_header(container: bytes, at: int, new: bytes) -> bytes:
    """Change the header, make its crc right again, and the footer's copy too."""
    header = bytearray(container[:56])
    header[at : at + len(new)] = new
    header += u64(crc(bytes(header)))
    return patch_footer(bytes(header) + container[64:], 160, bytes(header))


def footer_u64(container: bytes, at: int) -> int:
    """A number of the footer."""
    return int.from_bytes(container[len(container) - 256 + at :][:8], "little")


def reject_headers(good: bytes) -> None:
    """Faults of the file as a whole, of header and footer."""
    reject("empty_file", EMPTY, "header", "0 bytes", b"")
    reject("short_file", FOREIGN, "header", "319 bytes, none of them ours", bytes(319))
    reject("other_format", FOREIGN, "header", "a zip archive's first bytes", b"PK\x03\x04" + bytes(2000))
    magic = b"FASTCKPU"
    why = "another magic, here and in the footer's copy"
    reject("header_magic", FOREIGN, "header", why, patch_header(good, 0, magic), also_kind=[CORRUPT])
    bad = good[:56] + bytes([good[56] ^ 1]) + good[57:]
    reject("header_crc", CORRUPT, "header", "the header's crc is wrong", patch_footer(bad, 160, bad[:64]))
    reject("header_nonzero_reserved", CORRUPT, "header", "bytes 40–56 are not zero", patch_header(good, 55, b"\x01"))
    reject("version_2", UNSUPPORTED, "header", "format version 2", patch_header(good, 8, u32(2)))
    reject("version_0", UNSUPPORTED, "header", "format version 0", patch_header(good, 8, u32(0)))
    reject("digest_algorithm_2", UNSUPPORTED, "header", "digest algorithm 2", patch_header(good, 12, u32(2)))
    bit_63 = patch_header(good, 16, u64(1 << 63 | 1))
    reject("unknown_read_feature", UNSUPPORTED, "header", "read feature 63 is set", bit_63)
    reject("mappable", UNSUPPORTED, "header", "read feature MAPPABLE is reserved", patch_header(good, 16, u64(3)))
    alone = patch_header(good, 16, u64(0))
    reject("not_self_contained", UNSUPPORTED, "header", "SELF_CONTAINED is not set", alone, also_kind=[CORRUPT])
    header = good[:24] + u64(1) + good[32:56]
    differs = header + u64(crc(header)) + good[64:]
    why = "header and footer's copy differ, each with a right crc"
    reject("header_differs_from_footer_copy", CORRUPT, "footer", why, differs, also_part=["header"])

    reject("footer_magic", CORRUPT, "footer", "another magic at the end", good[:-8] + magic)
    reject("footer_crc", CORRUPT, "footer", "the footer's crc is wrong", good[:-16] + bytes(8) + good[-8:])
    reject("footer_nonzero_152", CORRUPT, "footer", "bytes 152–160 are not zero", patch_footer(good, 159, b"\x01"))
    reject("footer_nonzero_224", CORRUPT, "footer", "bytes 224–240 are not zero", patch_footer(good, 224, b"\x01"))
    reject("truncated", CORRUPT, "footer", "the last 100 bytes are missing", good[:-100])
    reject("truncated_before_footer", CORRUPT, "footer", "the whole footer is missing", good[:-256])
    reject("truncated_short", CORRUPT, "footer", "the first 200 bytes of a container", good[:200], also_kind=[FOREIGN])
    reject("trailing_bytes", CORRUPT, "footer", "a byte after the footer", good + b"\n")
    reject("two_containers", CORRUPT, "footer", "two containers, one after another", good + good)


def reject_tiling(good: bytes) -> None:
    """Faults of the parts' places and lengths."""
    length = len(good)
    wrong = "the container's length is not the file's"
    reject("container_length_wrong", CORRUPT, "footer", wrong, patch_footer(good, 144, u64(length + 64)))
    longer = patch_footer(good, 104, u64(footer_u64(good, 104) + (1 << 30)))
    longer = patch_footer(longer, 144, u64(length + (1 << 30)))
    why = "parts of 1 GiB more than the file has, and a container length to match"
    reject("container_longer_than_file", CORRUPT, "footer", why, longer)
    long_part = patch_footer(good, 8, u64(1 << 63))
    reject("part_longer_than_file", CORRUPT, "footer", "the directory is longer than the container", long_part)
    wraps = patch_footer(good, 104, u64((1 << 64) - 1))
    reject("part_length_wraps", CORRUPT, "footer", "offset + length of the skeleton passes 2^64", wraps)
    cap = patch_footer(good, 40, u64((64 << 20) + 1))
    reject("file_table_above_cap", CORRUPT, "footer", "a file table of 64 MiB + 1", cap)
    reject("payload_offset", CORRUPT, "footer", "the payload does not start at 64", patch_footer(good, 128, u64(72)))
    shorter = patch_footer(good, 136, u64(8))
    reject("payload_length", CORRUPT, "footer", "the payload ends before the directory starts", shorter)
    d = simple()
    d.gap = b"\0"
    reject("parts_gap", CORRUPT, "footer", "a byte between directory and file table", d)
    d = simple()
    d.members, d.file_table = {"again": []}, b""
    overlap = d.build()
    at = footer_u64(overlap, 0) + d.directory_bytes().index(b'"again":[]') + 8
    overlap = patch_footer(overlap, 32, u64(at) + u64(2) + digest(b"[]"))
    reject("parts_overlap", CORRUPT, "footer", "the file table lies in the directory", overlap)
    offset = footer_u64(good, 64)
    swapped = patch_footer(good, 64, good[-256 + 96 : -256 + 128] + good[-256 + 64 : -256 + 96])
    reject("parts_swapped", CORRUPT, "footer", f"the entry of the records does not say {offset}", swapped)
    for i, part in enumerate(PARTS):
        start = length - 256 + 32 * i
        entry = good[start : start + 31] + bytes([good[start + 31] ^ 1])
        name = part.replace(" ", "_") + "_digest"
        wrong_digest = patch_footer(good, 32 * i, entry)
        reject(name, CORRUPT, part, "the part's digest is wrong", wrong_digest, also_part=["footer"])


def reject_records() -> None:
    """Faults of single records."""

    def record(name: str, why: str, d: Draft, kind: str = CORRUPT, part: str = "records", **flags: object) -> None:
        reject(name, kind, part, why, d, **flags)

    d = simple()
    d.records_tail = b"\0"
    record("records_not_multiple_of_64", "65 bytes of records", d, also_part=["footer"])
    record("record_transform_0", "transform 0", with_record(transform=0))
    record("record_transform_99", "transform 99", with_record(transform=99), UNSUPPORTED)
    record("record_pack_width", "RAW with a pack width", with_record(pack=1))
    record("record_byte_3", "byte 3 is not zero", with_record(zero=1))
    record("record_last_bytes", "bytes 56–64 are not zero", with_record(zeros=b"\0\0\0\0\0\0\0\1"))
    record("record_file_1", "names another file in a self-contained container", with_record(file=1))
    record("raw_lane_4", "RAW with lanes of 4 bytes", with_record(lane=4))
    record("raw_parameter", "RAW with a parameter", with_record(parameter=b"\1"))
    record("rot_parameter", "ROT with a parameter", _with_rot_parameter())
    record("raw_stored_ne_raw", "RAW of 8 raw and 16 stored bytes", _raw_stored_ne_raw())
    record("record_lane_0", "lanes of 0 bytes", with_extra(bytes(4), lane=0))
    record("record_lane_3", "lanes of 3 bytes", with_extra(b"abc" * 4, lane=3))
    record("rot_lane_1", "ROT with lanes of 1 byte", _rot_lane_1())
    record("record_raw_0", "a chunk of 0 bytes", with_extra(b""))
    record("record_raw_too_large", "a chunk of 4 MiB + 4", with_extra(bytes(4 * MIB + 4)))
    record("record_raw_not_multiple_of_lane", "6 bytes in lanes of 4", with_extra(bytes(6)))
    record("const_with_stored_bytes", "CONST with stored bytes", with_extra(bytes(16), stored=b"abcd"))
    record("const_with_crc", "CONST with a crc", with_extra(bytes(16), crc=crc(b"abcd")))
    record("const_with_offset", "CONST with an offset", with_extra(bytes(16), offset=64))
    tail = with_extra(bytes(16), parameter=b"\0\0\0\0\1")
    record("const_param_tail_nonzero", "bytes of the parameter after the lane are not zero", tail)
    record("rot_no_stored_bytes", "ROT without stored bytes", with_extra(bytes(16), ROT, stored=b""))
    empty_blocks = [(0, 0, b"")] * 400
    stream = rot_stream(floats(1, 2, 3, 4), 4)
    long = frame(stream, blocks=[*empty_blocks, (0, len(stream), stream)])
    record("frame_stored_too_large", "more than 2 × raw + 1024 stored bytes", one_frame(long), also_part=["payload"])

    beyond = simple()
    reach = bytes(beyond.payload) + beyond.directory_bytes()[:8]
    beyond.records[0] |= {"stored": 24, "raw": 24, "crc": crc(reach), "digest": digest(reach)}
    tiling: dict[str, Any] = {"also_part": ["payload"]}
    record("record_stored_beyond_payload", "stored bytes reach into the directory", beyond, **tiling)
    before = simple()
    reach = before.build()[56:72]
    before.records[0] |= {"offset": 56, "crc": crc(reach), "digest": digest(reach)}
    record("record_stored_before_payload", "stored bytes start in the header", before, **tiling)
    far = with_record(offset=(1 << 64) - 8)
    record("record_offset_wraps", "offset + stored bytes passes 2^64", far, **tiling)
    d = simple()
    d.payload += bytes(8)
    record("payload_tail", "8 bytes at the payload's end are in no record", d, **tiling)
    d.chunk(b"next")
    record("payload_gap", "8 bytes between two chunks are in no record", d, **tiling)
    d = simple()
    d.payload += b"12345678"
    d.chunk(bytes(d.payload[8:24]), stored=b"")
    stretch = bytes(d.payload[8:24])
    d.records[1] |= {"offset": 72, "stored": 16, "crc": crc(stretch)}
    record("payload_overlap", "the stored bytes of two chunks overlap", d, **tiling)
    d = one_frame()
    d.chunk(bytes(d.payload), stored=b"")
    d.records[1] |= {"offset": 64, "stored": len(d.payload), "crc": d.records[0]["crc"]}
    record("shared_chunk_differs", "two different records share stored bytes; each alone would be right", d, **tiling)
    d = Draft({})
    d.payload += b"nobody's"
    record("payload_without_records", "a payload, but no records", d, **tiling)


def _with_rot_parameter() -> Draft:
    d = one_frame()
    d.records[0]["parameter"] = b"\1"
    return d


def _raw_stored_ne_raw() -> Draft:
    d = simple()
    d.chunk(b"12345678", stored=b"12345678abcdefgh")
    return d


def _rot_lane_1() -> Draft:
    raw = bytes(range(16))
    return with_extra(raw, ROT, 1, stored=frame(planes(rotate(raw, 1), 1)))


def reject_bases() -> None:
    """Transforms with a base, or with a width, where that is wrong. `good` is read by must_read/sub.fckpt."""

    def record(name: str, why: str, d: Draft, **flags: object) -> None:
        reject(name, CORRUPT, "records", why, d, **flags)

    def changed(**fields: object) -> Draft:
        d = sub()
        d.records[1] |= fields
        return d

    record("base_is_itself", "SUB of itself", changed(parameter=u32(1)))
    record("base_comes_later", "SUB of a later record", _base_comes_later())
    record("base_is_missing", "SUB of record 2^32 − 1", changed(parameter=u32((1 << 32) - 1)))
    record("base_starts_past_its_record", "SUB from element 4 of a record of 4", changed(parameter=u32(0) + u32(4)))
    record(
        "base_runs_past_its_record",
        "SUB from element 1 of a record of 4, the next is SUB itself",
        changed(parameter=u32(0) + u32(1)),
    )
    record("base_chain_of_65", "a chain of 65 bases", _chain(65))
    record("sub_pack_width", "SUB with a pack width", changed(pack=2))
    record("sub_lane_1", "SUB with lanes of 1 byte", changed(lane=1))
    for name, fields in (("0", {"pack": 0}), ("3", {"pack": 3}), ("16", {"pack": 16})):
        d = subpack()
        d.records[1] |= fields
        record(f"subpack_pack_width_{name}", f"SUBPACK with a pack width of {name}", d)
    d = rotu()
    d.records[0]["parameter"] = b"\1"
    record("rotu_parameter", "ROTU with a parameter", d)
    d = cast()
    d.records[1]["lane"] = 4
    record("cast_lane_4", "CAST with lanes of 4 bytes", d)
    d = cast()
    d.records[0]["raw"] = d.records[0]["stored"] = 12
    record("cast_base_too_short", "CAST of 4 lanes from 12 bytes", d, also_part=["payload"])
    d = ref()
    d.records[1] |= {"stored": 8, "offset": 64}
    record("ref_with_stored_bytes", "REF with stored bytes", d)


def _base_comes_later() -> Draft:
    d = Draft()
    s = d.stored_alone("bfloat16", NEAR, SUB, 2, stored=frame(planes(NEAR_ZIGZAG, 2)), parameter=u32(1))
    d.chunk(BASE)
    d.root = {"a": d.tensor(["a"], [4], s)}
    return d


def _chain(n: int) -> Draft:
    d = Draft()
    d.chunk(BASE)
    for i in range(n - 1):
        d.chunk(BASE, REF, 2, parameter=u32(i))
    s = d.stored_alone("bfloat16", BASE, REF, 2, parameter=u32(n - 1))
    d.root = {"a": d.tensor(["a"], [4], s)}
    return d


def _unused_bits() -> Draft:
    d = Draft()
    base, raw = BASE[:2], BASE[:2]
    d.chunk(base)
    s = d.stored_alone("bfloat16", raw, SUBPACK, 2, stored=frame(u32(0) + b"\xf0"), pack=2)
    d.root = {"a": d.tensor(["a"], [1], s)}
    return d


def reject_payload() -> None:
    """Faults of stored bytes: frames, crcs, digests."""

    def damaged(name: str, why: str, d: Draft) -> None:
        reject(name, CORRUPT, "payload", why, d)

    def streamed(d: Draft, stream: bytes) -> Draft:
        last = d.records[-1]
        stored = frame(stream)
        d.payload[last["offset"] - 64 :] = stored
        last |= {"stored": len(stored), "crc": crc(stored)}
        return d

    packed = sum(min(z, 3) << 2 * i for i, z in enumerate(NEAR_ZIGZAG)).to_bytes(1, "little")
    damaged(
        "subpack_escapes_too_many",
        "an escape is counted and none is marked",
        streamed(subpack(), u32(1) + packed + b"\0\0"),
    )
    damaged(
        "subpack_escapes_too_few",
        "an escape is marked and none is counted",
        streamed(subpack(), u32(0) + bytes([packed[0] | 3])),
    )
    damaged("subpack_escapes_2_32", "2^32 − 1 escapes", streamed(subpack(), u32((1 << 32) - 1) + packed))
    damaged("subpack_cut", "a stream without its packed values", streamed(subpack(), u32(0)))
    damaged("subpack_unused_bits", "unused bits are not zero", _unused_bits())
    d = Draft()
    s = d.stored_alone("bfloat16", NEAR[:2], ROTU, 2, stored=frame(bytes([rotate(NEAR[:2], 2)[0] >> 8, 0x80])))
    d.root = {"a": d.tensor(["a"], [1], s)}
    damaged("rotu_unused_bit", "the unused bit of a ROTU plane is not zero", d)
    damaged("rotu_short", "a ROTU stream of a byte too few", streamed(rotu(), bytes(7)))
    damaged("sub_short", "a SUB stream of a byte too few", streamed(sub(), bytes(7)))
    d = sub()
    d.records[1]["digest"] = bytes(16)
    damaged("sub_digest_wrong", "the digest of the sum is wrong", d)
    d = cast()
    d.records[1]["digest"] = bytes(16)
    damaged("cast_digest_wrong", "the digest of the rounded numbers is wrong", d)

    raw = floats(1, 2, 3, 4)
    stream = rot_stream(raw, 4)
    whole = frame(stream)
    skippable = b"\x50\x2a\x4d\x18" + u32(4) + b"skip"
    damaged("crc_wrong", "the crc of the stored bytes is wrong", with_record(crc=1))
    damaged("digest_wrong", "the digest of the raw bytes is wrong", with_record(digest=bytes(16)))
    d = one_frame()
    d.records[0]["digest"] = digest(raw[::-1])
    damaged("digest_wrong_rot", "the digest of a ROT chunk's raw bytes is wrong", d)
    d = Draft()
    s = d.stored_alone("float32", bytes(16), CONST, 4, digest=digest(raw))
    d.root = {"a": d.tensor(["a"], [4], s)}
    damaged("digest_wrong_const", "the digest of a CONST chunk's raw bytes is wrong", d)
    d = simple()
    d.payload[5] ^= 16
    damaged("payload_bit_flipped", "one bit of the payload is wrong", d)

    damaged("frame_two_frames", "an empty frame follows the frame", one_frame(whole + frame(b"")))
    damaged("frame_trailing_byte", "a byte follows the frame", one_frame(whole + b"\0"))
    damaged("frame_skippable", "a skippable frame comes before the frame", one_frame(skippable + whole))
    damaged("frame_skippable_after", "a skippable frame follows the frame", one_frame(whole + skippable))
    damaged("frame_only_skippable", "a skippable frame of the stream's length, and no other", one_frame(
        b"\x50\x2a\x4d\x18" + u32(len(stream)) + stream
    ))  # fmt: skip
    damaged("frame_not_zstd", "no frame at all", one_frame(b"\0" * 40))
    damaged("frame_no_content_size", "the content size is missing", one_frame(frame(stream, size=None)))
    damaged("frame_content_too_long", "4 bytes more than the stream has", one_frame(frame(stream + b"\0\0\0\0")))
    damaged("frame_content_too_short", "4 bytes less than the stream has", one_frame(frame(stream[:-4])))
    size = len(stream)
    damaged("frame_longer_than_it_says", "the blocks hold more than the content size", one_frame(
        frame(stream + b"\0\0\0\0", size=size)
    ))  # fmt: skip
    damaged("frame_shorter_than_it_says", "the blocks hold less than the content size", one_frame(
        frame(stream[:-4], size=size)
    ))  # fmt: skip
    damaged("frame_claims_gigabytes", "a content size of 4 GiB − 1", one_frame(frame(stream, size=(1 << 32) - 1)))
    big_window = frame(stream, window=13 << 3 | 1)
    damaged("frame_window_too_large", "a window of 9 MiB", one_frame(big_window))
    damaged("frame_dictionary_id", "the frame names a dictionary", one_frame(frame(stream, dictionary=7)))
    damaged("frame_corrupt", "a block of the reserved type; the crc is right", one_frame(
        frame(stream, blocks=[(3, size, stream)])
    ))  # fmt: skip
    damaged("frame_cut_short", "the last byte of the frame is missing", one_frame(whole[:-1]))
    damaged("frame_no_last_block", "no block is marked as the last", one_frame(frame(stream, closed=False)))


def reject_directory() -> None:
    """Faults of the directory's JSON and of what it says about the saved object."""

    def wrong(name: str, why: str, d: Draft, kind: str = CORRUPT, **flags: object) -> None:
        reject(name, kind, "directory", why, d, **flags)

    def proposed(name: str, why: str, d: Draft) -> None:
        wrong(name, why, d, proposed=True)

    wrong("directory_empty", "no directory", with_directory(encode=lambda _: b""))
    wrong("directory_not_json", "JSON that breaks off", with_directory(encode=lambda text: text[:-1]))
    wrong("directory_not_an_object", "an array", with_directory(encode=lambda text: b"[" + text + b"]"))
    wrong("directory_two_values", "a second value follows", with_directory(encode=lambda text: text + b"{}"))
    wrong("directory_trailing_zero", "a zero byte follows", with_directory(encode=lambda text: text + b"\0"))
    wrong("directory_not_utf8", "a byte that is not UTF-8", with_directory(old=b'"fastckpt"', new=b'"fast\xff"'))
    utf16 = with_directory(encode=lambda text: text.decode().encode("utf-16-le"))
    wrong("directory_utf16", "UTF-16", utf16)
    wrong("directory_nan", "NaN", with_directory(old=b'"meta":{}', new=b'"meta":{"x":NaN}'))
    wrong("directory_infinity", "Infinity", with_directory(old=b'"meta":{}', new=b'"meta":{"x":-Infinity}'))
    wrong("directory_duplicate_keys", "`rank` twice", with_directory(old=b'"rank":0', new=b'"rank":0,"rank":0'))
    inner = with_directory(old=b'"meta":{}', new=b'"meta":{"x":1,"x":2}')
    wrong("directory_duplicate_keys_inside", "a member twice, inside `meta`", inner)
    depth = 20000
    deep = with_directory(old=b'"meta":{}', new=b'"meta":{},"deep":' + b"[" * depth + b"]" * depth)
    proposed("directory_deeply_nested", f"{depth} arrays in each other", deep)
    huge = with_directory(old=b'"bytes":16', new=b'"bytes":1' + b"0" * 5000)
    wrong("directory_huge_integer", "a storage of 10^5000 bytes", huge)
    wrong("byteorder_big", "big-endian", with_directory(old=b'"little"', new=b'"big"'), UNSUPPORTED)
    wrong("byteorder_missing", "no byteorder", without("byteorder"))
    for member in ("storages", "tensors"):
        wrong(f"{member}_missing", f"no {member}", without(member))
    for member in ("bytes", "extents"):
        wrong(f"storage_{member}_missing", f"a storage without {member}", without(member, "storages"))
    for member in ("name", "dtype", "shape", "stride", "offset", "storage"):
        wrong(f"tensor_{member}_missing", f"a tensor without {member}", without(member, "tensors"))
    wrong("storages_not_an_array", "an object", with_directory(old=b'"storages":[', new=b'"storages":{},"other":['))
    wrong("rank_not_below_world", "rank 1 of 1", with_directory(old=b'"rank":0', new=b'"rank":1'))
    wrong("meta_not_an_object", "an array", with_directory(old=b'"meta":{}', new=b'"meta":[]'))

    above = 1 << 63
    wrong("storage_bytes_too_large", "2^63 bytes", with_storage(bytes=above, extents=[[0, 0, above]]))
    wrong("storage_bytes_negative", "−16 bytes", with_storage(bytes=-16, extents=[]))
    wrong("storage_bytes_fraction", "16.5 bytes", with_storage(bytes=16.5))
    wrong("extents_sum_wrong", "extents of 12 bytes for 16", with_storage(extents=[[0, 0, 12]]))
    wrong("extents_missing_bytes", "no extents for 16 bytes", with_storage(extents=[]))
    wrong("extent_record_out_of_range", "record 1 of 1", with_storage(extents=[[1, 0, 16]]))
    wrong("extent_record_negative", "record −1", with_storage(extents=[[-1, 0, 16]]))
    wrong("extent_runs_past_last_record", "17 bytes of 16", with_storage(bytes=17, extents=[[0, 0, 17]]))
    d = with_storage(extents=[[0, 16, 16]])
    d.chunk(floats(5, 6, 7, 8))
    wrong("extent_offset_past_record", "offset 16 of a record of 16 bytes, which another follows", d)
    wrong("extent_offset_negative", "offset −4", with_storage(extents=[[0, -4, 16]]))
    wrong("extent_zero_bytes", "an extent of 0 bytes", with_storage(extents=[[0, 0, 16], [0, 0, 0]]))
    wrong("extent_negative_bytes", "an extent of −4 bytes", with_storage(extents=[[0, 0, 16], [0, 0, 4], [0, 0, -4]]))
    wrong("extent_of_two_numbers", "no bytes", with_storage(extents=[[0, 16]]))
    proposed("extents_null_not_meta", "no data, but on the CPU", with_storage(extents=None))

    wrong("tensor_out_of_bounds", "5 elements of 4", with_tensor(shape=[5]))
    wrong("tensor_out_of_bounds_offset", "element 1 to 4 of 4", with_tensor(offset=1))
    wrong("tensor_out_of_bounds_stride", "a stride of 2", with_tensor(stride=[2]))
    wrong("tensor_out_of_bounds_dtype", "4 elements of 8 bytes in 16 bytes", with_tensor(dtype="float64"))
    wrong("tensor_negative_stride", "a stride of −1", with_tensor(stride=[-1], offset=3))
    wrong("tensor_negative_shape", "a shape of −1", with_tensor(shape=[-1]))
    wrong("tensor_negative_offset", "an offset of −1", with_tensor(shape=[2], offset=-1))
    wrong("tensor_shape_stride_differ", "two dimensions, one stride", with_tensor(shape=[1, 4]))
    wrong("tensor_shape_not_integers", "a shape of text", with_tensor(shape=["4"]))
    wrong("tensor_shape_fraction", "a shape of 2.5", with_tensor(shape=[2.5]))
    proposed("tensor_shape_true", "a shape of true", with_tensor(shape=[True]))
    wrong("tensor_storage_out_of_range", "storage 1 of 1", with_tensor(storage=1))
    wrong("tensor_storage_negative", "storage −1", with_tensor(storage=-1))
    wraps = with_tensor(shape=[(1 << 32) + 1], stride=[1 << 32])
    wrong("tensor_huge_shape", "the end passes 2^64 and would wrap around to 4 bytes", wraps)
    expanded = with_tensor(shape=[1 << 62, 1 << 62], stride=[0, 0])
    proposed("tensor_expanded_without_end", "2^124 elements of one, by strides of 0", expanded)
    wrong("too_many_dims", "65 dimensions", with_tensor(shape=[1] * 65, stride=[1] * 65))
    wrong("tensor_name_not_an_array", "a string", with_tensor(name="a"))
    wrong("tensor_name_bad_key", "a key of 1.5", with_tensor(name=[1.5]))
    wrong("tensor_name_bad_repr", "a key that is an object, but no repr", with_tensor(name=[{"repr": 5}]))
    proposed("tensor_kind_unknown", "a kind that is not in the table", with_tensor(kind="tensors"))
    wrong("tensor_requires_grad", "requires_grad is a number", with_tensor(requires_grad=0))
    objects = with_tensor(dtype="numpy:|O", shape=[2], kind="array")
    proposed("tensor_numpy_objects", "an array of Python objects would be made of stored bytes", objects)

    def table(name: str, why: str, text: bytes) -> None:
        d = simple()
        d.file_table = text
        reject(name, CORRUPT, "file table", why, d)

    entry = {"key": "packs/0", "bytes": 1, "crc64nvme": "0" * 16}
    table("file_table_not_empty", "names a file in a self-contained container", compact([entry]))
    table("file_table_not_json", "no JSON", b"[")
    table("file_table_empty_bytes", "no bytes", b"")
    table("file_table_not_an_array", "an object", b"{}")


def reject_shares(good: bytes) -> None:
    """What only votes may have (make_shares.py), in a self-contained container."""
    reject("shared_and_self_contained", CORRUPT, "header", "SHARED and SELF_CONTAINED", patch_header(good, 16, u64(5)))
    d = simple()
    d.storages[0]["shares"] = [[0, 16]]
    reject("shares_without_feature", CORRUPT, "header", "a storage with shares, SHARED not set", d)


def reject_sizes() -> None:
    """Small files that claim more memory than a reader should take without being told to."""
    for name, records, extents in (("claims_8_gib", 2048, 1), ("claims_8_tib", 512, 4096)):
        d = Draft()
        d.chunk(bytes(4 * MIB), CONST, 4)
        d.records *= records
        each = records * 4 * MIB
        d.storages.append({"dtype": "float32", "bytes": extents * each, "location": "cpu"})
        d.storages[0]["extents"] = [[0, 0, each]] * extents
        d.root = {"a": d.tensor(["a"], [extents * each // 4], 0)}
        why = f"{each >> 30} GiB in {records} CONST chunks, used {extents} times"
        reject(name, TOO_LARGE, "directory", why, d, needs_limit=True, claimed=extents * each, also_part=["records"])


def reject_skeletons() -> None:
    """Faults that only a loader can see: the skeleton does not fit the directory."""

    def skeleton(name: str, why: str, d: Draft, **flags: object) -> None:
        reject(name, CORRUPT, "skeleton", why, d, loader_only=True, **flags)

    skeleton("skeleton_bytes_mismatch", "5 float32 elements, but 16 bytes", with_skeleton(elements=5))
    fewer = with_skeleton(elements=3, shape=[3])
    skeleton("skeleton_bytes_mismatch_shorter", "3 float32 elements, but 16 bytes", fewer)
    skeleton("skeleton_unknown_storage_key", "storage 7 of 1", with_skeleton(key="7"))
    skeleton("skeleton_negative_storage_key", "storage −1", with_skeleton(key="-1"))
    skeleton("skeleton_storage_key_not_a_number", "storage `a`", with_skeleton(key="a"))
    skeleton("skeleton_tensor_past_storage", "5 elements of 4", with_skeleton(shape=[5]), proposed=True)
    d = simple()
    d.skeleton = bytes(Pickle(d.root).out)[:-20]
    skeleton("skeleton_truncated", "the pickle stream breaks off", d)
    d.skeleton = b"no pickle"
    skeleton("skeleton_not_a_pickle", "no pickle stream", d)
    d = Draft()
    raw = struct.pack("<d", 2.5) * 8193
    array = d.add(["a"], "numpy:<f8", raw, CONST, 8, kind="array")
    assert isinstance(array, PersistentId)
    d.root = {"a": PersistentId((*array.value[:7], (8194,), "C"))}
    skeleton("skeleton_array_shape_mismatch", "an array of 8194 numbers in the bytes of 8193", d)


def make_must_reject() -> None:
    """Fill MUST_REJECT."""
    MUST_REJECT.clear()
    good = simple().build()
    reject_headers(good)
    reject_tiling(good)
    reject_records()
    reject_bases()
    reject_payload()
    reject_directory()
    reject_shares(good)
    reject_sizes()
    reject_skeletons()


# --- Writing and checking --------------------------------------------------------------------------------------------


def write(folder: Path) -> None:
    """Replace must_read/ and must_reject/ in `folder`."""
    make_must_reject()
    files: dict[str, dict[str, bytes]] = {"must_read": {}, "must_reject": {}}
    expected: dict[str, dict[str, Any]] = {"must_read": {}, "must_reject": {}}
    for name, (about, make) in MUST_READ.items():
        draft = make()
        files["must_read"][f"{name}.fckpt"] = draft.build()
        expected["must_read"][f"{name}.fckpt"] = draft.expected(about)
    for name, (data, entry) in MUST_REJECT.items():
        files["must_reject"][f"{name}.fckpt"] = data
        expected["must_reject"][f"{name}.fckpt"] = entry
    for group, contents in files.items():
        shutil.rmtree(folder / group, ignore_errors=True)
        (folder / group).mkdir(parents=True)
        for name, data in contents.items():
            (folder / group / name).write_bytes(data)
        text = json.dumps(expected[group], ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        (folder / group / "expected.json").write_text(text, encoding="utf-8", newline="\n")


def differences(here: Path, there: Path) -> list[str]:
    """The files of must_read/ and must_reject/ that are not the same in both folders."""

    def contents(folder: Path) -> dict[str, bytes]:
        files = [*(folder / "must_read").glob("*"), *(folder / "must_reject").glob("*")]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    one, other = contents(here), contents(there)
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def main() -> int:
    """Write the goldens, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; report differences")
    here = Path(__file__).resolve().parent
    if not parser.parse_args().check:
        write(here)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        changed = differences(here, Path(folder))
    if changed:
        print("\n".join(changed))
        version = ".".join(map(str, zstandard.ZSTD_VERSION))
        print(f"{len(changed)} files differ. zstd here is {version}; another version may make other frames of the")
        print("rot_* files, multi_chunk, numpy_array and frame_with_checksum, which are then no less right.")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
