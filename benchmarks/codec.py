"""The codec against ZipNN, zstd, memcpy and the order-0 entropy bound, on real weights and training states.

    python benchmarks/codec.py [--quick] [--rounds N] [--only TEXT] [--out DIR] [--json]

One process, one thread. In a round each contender encodes and decodes the whole set; each round starts with another one, so
that a neighbour that slows the machine down slows everybody. Ratios of speeds are taken within a round; the table shows
medians. From memory to memory: sets of 64 MiB and more, a scratch buffer of the same size overwritten before each
measurement, outputs touched before. The C allocator is told to keep freed memory, which spares the contenders that allocate
their outputs (ZipNN, zstd) the page faults. What ZipNN does to its input is undone outside the measured time.
Our side includes the choice of the transform, the digest of the raw bytes and the CRC of the stored ones, both ways.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import CACHE, ROOT, codec_data, measure, output, progress, tables
from benchmarks.runner import rotated
from fastckpt import __version__, _native, codec
from fastckpt.kernels.transform import MAX_CHUNK_ELEMENTS, MAX_RAW_BYTES, Transform

Bytes = NDArray[np.uint8]
OWN_CACHE = CACHE / "codec"
SET_BYTES = 64 << 20  # at least; more than a last-level cache
QUICK_BYTES = 8 << 20


# --- our codec, as a save and a load use it ---


def encode_chunk(raw: memoryview, base: memoryview | None, lane_bytes: int, out: memoryview) -> codec.Encoded:
    """Chooses from a sample, encodes into `out`. A chunk that would not be shorter is copied, as a save would write it elsewhere."""
    x, room = np.frombuffer(raw, np.uint8), np.frombuffer(out, np.uint8)
    found = codec.encode(
        x, lane_bytes, lane_bytes, base=None if base is None else np.frombuffer(base, np.uint8), out=room
    )
    if found.transform is Transform.RAW:
        room[:] = x
    return found


def decode_chunk(chunk: codec.Encoded, base: memoryview | None, lane_bytes: int, raw: memoryview) -> None:
    """Raises unless both checksums are right."""
    if _native.crc64nvme(chunk.stored) != chunk.crc64nvme:
        raise ValueError("stored bytes are damaged")
    out = np.frombuffer(raw, np.uint8)
    if (
        codec.decode(chunk.transform, lane_bytes, chunk.pack_bits, chunk.parameter, chunk.stored, out, base)
        != chunk.digest
    ):
        raise ValueError("decoded bytes are wrong")


# --- contenders: `prepare_*` is not measured ---


@functools.cache
def zstd() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    return zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()


class Contender(Protocol):
    def prepare_encode(self) -> None: ...
    def encode(self) -> None: ...
    def prepare_decode(self) -> None: ...
    def decode(self) -> None: ...
    def size(self) -> int: ...
    def decoded(self) -> Bytes: ...


class Plain:
    """Nothing to prepare."""

    def prepare_encode(self) -> None: ...
    def prepare_decode(self) -> None: ...


def pieces(data: Bytes, lane_bytes: int) -> list[memoryview]:
    step = min(MAX_CHUNK_ELEMENTS * lane_bytes, MAX_RAW_BYTES)
    return [data.data[at : at + step] for at in range(0, data.size, step)]


class Ours(Plain):
    def __init__(self, raw: Bytes, base: Bytes | None, lane_bytes: int, isa: str | None = None) -> None:
        self.lane_bytes, self.isa, self.restored = lane_bytes, isa, np.ones_like(raw)
        self.raw, self.out = pieces(raw, lane_bytes), pieces(np.ones_like(raw), lane_bytes)
        self.base: list[memoryview | None] = [None] * len(self.raw)
        if base is not None:
            self.base = [*pieces(base, lane_bytes)]
        self.target = pieces(self.restored, lane_bytes)
        self.chunks: list[codec.Encoded] = []

    def prepare_encode(self) -> None:
        _native.use_isa(self.isa)

    prepare_decode = prepare_encode

    def encode(self) -> None:
        places = zip(self.raw, self.base, self.out, strict=True)
        self.chunks = [encode_chunk(raw, base, self.lane_bytes, out) for raw, base, out in places]

    def decode(self) -> None:
        for chunk, base, raw in zip(self.chunks, self.base, self.target, strict=True):
            decode_chunk(chunk, base, self.lane_bytes, raw)

    def size(self) -> int:
        return sum(len(chunk.stored) for chunk in self.chunks)

    def decoded(self) -> Bytes:
        return self.restored

    def choices(self) -> dict[str, int]:
        """Chunks by transform."""
        counts: dict[str, int] = {}
        for c in self.chunks:
            name = Transform(c.transform).name + (f" {c.pack_bits}" if c.pack_bits else "")
            name += " + zstd" if isinstance(c.stored, bytes) else ""
            counts[name] = counts.get(name, 0) + 1
        return counts


class ZipNN:
    """One thread. With a base: XOR, then ZipNN."""

    def __init__(self, raw: Bytes, base: Bytes | None, lane_bytes: int) -> None:
        dtype = {2: "bfloat16", 4: "float32"}[lane_bytes]
        make = importlib.import_module("zipnn").ZipNN
        self.coder = make(input_format="byte", bytearray_dtype=dtype, threads=1)
        self.raw, self.base, self.input = raw, base, bytearray(raw.size)
        self.view = np.frombuffer(self.input, np.uint8)
        self.stored = b""
        self.copy = b""
        self.restored: Bytes = np.ones_like(raw)

    def prepare_encode(self) -> None:
        np.copyto(self.view, self.raw)  # it changes its input

    def encode(self) -> None:
        if self.base is not None:
            np.bitwise_xor(words(self.raw), words(self.base), out=words(self.view))
        self.stored = self.coder.compress(self.input)

    def prepare_decode(self) -> None:
        self.copy = bytes(bytearray(self.stored))

    def decode(self) -> None:
        found = np.frombuffer(self.coder.decompress(self.copy), np.uint8)
        if self.base is None:
            self.restored = found
        else:
            np.bitwise_xor(words(found), words(self.base), out=words(self.restored))

    def size(self) -> int:
        return len(self.stored)

    def decoded(self) -> Bytes:
        return self.restored


def words(data: Bytes) -> NDArray[np.uint64]:
    return data.view(np.uint64)


class Zstd(Plain):
    """Level 1 on the raw bytes, chunk by chunk."""

    def __init__(self, raw: Bytes, lane_bytes: int) -> None:
        self.raw, self.restored = pieces(raw, lane_bytes), np.ones_like(raw)
        self.target = pieces(self.restored, lane_bytes)
        self.stored: list[bytes] = []
        self.chunks: list[bytes] = []

    def encode(self) -> None:
        self.stored = [zstd()[0].compress(raw) for raw in self.raw]

    def decode(self) -> None:
        self.chunks = [zstd()[1].decompress(frame) for frame in self.stored]

    def size(self) -> int:
        return sum(map(len, self.stored))

    def decoded(self) -> Bytes:
        return np.frombuffer(b"".join(self.chunks), np.uint8)


class Memcpy(Plain):
    """The floor: no coder moves fewer bytes through memory than it reads."""

    def __init__(self, raw: Bytes, lane_bytes: int) -> None:
        self.raw, self.first, self.second = raw, np.ones_like(raw), np.ones_like(raw)

    def encode(self) -> None:
        np.copyto(self.first, self.raw)

    def decode(self) -> None:
        np.copyto(self.second, self.first)

    def size(self) -> int:
        return self.raw.size

    def decoded(self) -> Bytes:
        return self.second


# --- what is asked ---


class Bar(NamedTuple):
    """Each figure against the rival's in the same round; None: not asked."""

    kind: str
    who: str
    rival: str
    size: float | None
    encode: float | None
    decode: float | None


ZIPNN, XOR, ZSTD, AVX2 = "zipnn", "xor + zipnn", "zstd -1", "ours, avx2"
BARS = [
    Bar("weights bf16", "ours", ZIPNN, 1.002, 3, 2),
    Bar("weights fp32", "ours", ZIPNN, 1.002, 3, 2),
    Bar("exp_avg fp32", "ours", ZIPNN, 1.002, 3, 2),
    Bar("exp_avg bf16", "ours", ZIPNN, 1.003, 3, 1.8),
    Bar("exp_avg_sq dense", "ours", ZIPNN, 1.0, 3, 1.7),
    Bar("exp_avg_sq zero rows", "ours", ZIPNN, 0.97, None, None),
    Bar("weights bf16", AVX2, ZIPNN, 1.002, 2, 1.8),
    Bar("weights fp32", AVX2, ZIPNN, 1.002, 2, 1.8),
    Bar("weights bf16", "ours", ZSTD, 0.86, 4.5, 4.5),
    Bar("weights fp32", "ours", ZSTD, 0.90, 4.5, 4.5),
    Bar("delta 50", "ours", XOR, 0.60, 2, 2),
    Bar("delta 1", "ours", XOR, 0.20, 2, 2),
]
ENTROPY_BAR, SCALING_BAR, OVERHEAD_BAR = 1.01, 0.85, 100e-6


# --- measuring ---


def show(done: int, total: int, text: str) -> None:
    """A bar on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        progress.bar(done, total, f"{done}/{total}  {text}")


def keep_freed_memory() -> None:
    """No mmap for large blocks, nothing given back: a second allocation of the same size finds its pages in place."""
    for option, value in ((-3, 1 << 30), (-1, 2**31 - 1), (-2, 256 << 20)):  # M_MMAP_THRESHOLD, TRIM, TOP_PAD
        measure.libc.mallopt(ctypes.c_int(option), ctypes.c_int(value))


def seconds(function: Callable[[], object]) -> float:
    gc.disable()
    start = time.perf_counter()
    function()
    taken = time.perf_counter() - start
    gc.enable()
    return taken


def tiled(lanes: codec_data.Lanes, quick: bool) -> Bytes:
    """Whole chunks, more of them than the caches hold. No coder here looks back further than a chunk."""
    times = 1 if quick else -(-SET_BYTES // lanes.nbytes)
    data = np.tile(lanes, times)
    whole = max(data.size // MAX_CHUNK_ELEMENTS, 1) * MAX_CHUNK_ELEMENTS
    if quick:
        whole = min(whole, QUICK_BYTES // lanes.itemsize)
    return np.ascontiguousarray(data[: min(whole, data.size // 64 * 64)]).view(np.uint8)


def entropy_bound(raw: Bytes, base: Bytes | None, lane_bytes: int) -> float:
    """Order-0 entropy of each byte plane (rotated; with a base: differences), in bytes."""
    counts = np.zeros((lane_bytes, 256), np.int64)
    transform = Transform.ROT if base is None else Transform.SUB
    bases: list[memoryview | None] = [None] * len(pieces(raw, lane_bytes))
    if base is not None:
        bases = [*pieces(base, lane_bytes)]
    stripe = 131072 * lane_bytes
    stream = np.zeros(MAX_RAW_BYTES, np.uint8)
    for piece, before in zip(pieces(raw, lane_bytes), bases, strict=True):
        n = _native.split(piece, before, transform, lane_bytes, 0, stream)
        for at in range(0, n, stripe):
            planes = stream[at : min(at + stripe, n)].reshape(lane_bytes, -1)
            for k, plane in enumerate(planes):
                counts[k] += np.bincount(plane, minlength=256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    bits = -(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum()
    return float(bits) / 8 * raw.size / lane_bytes


def check(name: str, contender: Contender, raw: Bytes) -> None:
    contender.prepare_encode()
    contender.encode()
    contender.prepare_decode()
    contender.decode()
    if not np.array_equal(contender.decoded(), raw):
        raise SystemExit(f"{name}: what comes back is not what went in")


def measure_set(data: codec_data.DataSet, rounds: int, quick: bool, scrub: Bytes) -> dict[str, Any]:
    lane_bytes = data.lanes.itemsize
    raw, base = tiled(data.lanes, quick), None if data.base is None else tiled(data.base, quick)
    ours = Ours(raw, base, lane_bytes)
    contenders: dict[str, Contender] = {"ours": ours}
    if data.kind.startswith("weights") and "avx512" in _native.isas().split():
        contenders[AVX2] = Ours(raw, base, lane_bytes, "avx2")
    contenders[ZIPNN if base is None else XOR] = ZipNN(raw, base, lane_bytes)
    contenders |= {ZSTD: Zstd(raw, lane_bytes), "memcpy": Memcpy(raw, lane_bytes)}
    for name, contender in contenders.items():
        check(f"{data.name}, {name}", contender, raw)
    times: dict[str, dict[str, list[float]]] = {name: {"encode": [], "decode": []} for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in rotated(names, number):
            contender = contenders[name]
            for way in ("encode", "decode"):
                getattr(contender, f"prepare_{way}")()
                scrub += 1
                times[name][way].append(seconds(getattr(contender, way)))
    _native.use_isa(None)
    sizes = {name: contender.size() for name, contender in contenders.items()}
    return {
        "name": data.name,
        "kind": data.kind,
        "bytes": raw.size,
        "tensor_bytes": data.lanes.nbytes,
        "entropy_bytes": entropy_bound(raw, base, lane_bytes),
        "choices": ours.choices(),
        "contenders": {name: {"bytes": sizes[name], **times[name]} for name in names},
    }


def measure_scaling(data: codec_data.DataSet, rounds: int, quick: bool, scrub: Bytes) -> dict[str, Any]:
    """The same bytes by one thread and by two, each with its half of the chunks."""
    raw, lane_bytes = tiled(data.lanes, quick), data.lanes.itemsize
    middle = len(pieces(raw, lane_bytes)) // 2 * MAX_CHUNK_ELEMENTS * lane_bytes
    halves = [raw[:middle].copy(), raw[middle : 2 * middle].copy()]
    jobs: dict[str, list[Any]] = {
        "ours": [Ours(half, None, lane_bytes) for half in halves],
        "memcpy": [Memcpy(half, lane_bytes) for half in halves],
    }
    times: dict[str, list[float]] = {
        f"{who} {way} {n}": [] for who in jobs for way in ("encode", "decode") for n in (1, 2)
    }

    def run(job: Callable[[], None]) -> None:
        job()

    with ThreadPoolExecutor(2) as pool:
        for number in range(rounds + 1):
            for who, pair in jobs.items():
                for way in ("encode", "decode"):
                    calls = [getattr(half, way) for half in pair]
                    scrub += 1
                    one = seconds(lambda calls=calls: [call() for call in calls])  # type: ignore[misc]
                    scrub += 1
                    two = seconds(lambda calls=calls: list(pool.map(run, calls)))  # type: ignore[misc]
                    if number:  # the first one is for the threads' contexts and the pages
                        times[f"{who} {way} 1"].append(one)
                        times[f"{who} {way} 2"].append(two)
    return {"set": data.name, "bytes": 2 * middle, "seconds": times}


def measure_overhead() -> dict[str, list[float]]:
    """Seconds of one call for a chunk of 4 KiB: choice, calls, results, and a little coding. The rest is the codec's own."""
    raw = np.random.default_rng(1).normal(0, 0.02, 1024).astype(np.float32).view(np.uint8)
    out, back = np.zeros_like(raw), np.zeros_like(raw)
    chunk = encode_chunk(raw.data, None, 4, out.data)
    assert chunk.transform == Transform.ROT, chunk.transform

    def encode() -> None:
        for _ in range(1000):
            encode_chunk(raw.data, None, 4, out.data)

    def decode() -> None:
        for _ in range(1000):
            decode_chunk(chunk, None, 4, back.data)

    samples: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(7):
        samples["encode"].append(seconds(encode) / 1000)
        samples["decode"].append(seconds(decode) / 1000)
    return samples


# --- judging and printing ---


@dataclasses.dataclass
class Verdict:
    what: str
    asked: str
    measured: str
    passed: bool


def ratio(entry: dict[str, Any], who: str, rival: str, way: str) -> float:
    """How many times faster than the rival: median over rounds of the ratio within a round."""
    theirs: list[float] = entry["contenders"][rival][way]
    mine: list[float] = entry["contenders"][who][way]
    return statistics.median(a / b for a, b in zip(theirs, mine, strict=True))


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    found = []
    for bar in BARS:
        for entry in result["sets"]:
            sizes = {name: c["bytes"] for name, c in entry["contenders"].items()}
            if entry["kind"] != bar.kind or bar.who not in sizes:
                continue
            what = f"{entry['name']}: {bar.who} against {bar.rival}"
            if bar.size is not None:
                got = sizes[bar.who] / sizes[bar.rival]
                found.append(Verdict(f"{what}, size", f"<= {bar.size:.3f}x", f"{got:.4f}x", got <= bar.size))
            if bar.who == AVX2:
                same = sizes[AVX2] == sizes["ours"]
                found.append(
                    Verdict(
                        f"{what}, size as with {result['versions']['isas'].split()[0]}", "equal", f"{sizes[AVX2]}", same
                    )
                )
            for way, least in (("encode", bar.encode), ("decode", bar.decode)):
                if least is not None:
                    got = ratio(entry, bar.who, bar.rival, way)
                    found.append(Verdict(f"{what}, {way}", f">= {least:g}x", f"{got:.2f}x", got >= least))
    for entry in result["sets"]:
        if entry["kind"] == "weights bf16":
            got = entry["contenders"]["ours"]["bytes"] / entry["entropy_bytes"]
            what = f"{entry['name']}: size against order-0 entropy"
            found.append(Verdict(what, f"<= {ENTROPY_BAR}x", f"{got:.4f}x", got <= ENTROPY_BAR))
    times = result["scaling"]["seconds"]
    for way in ("encode", "decode"):
        ours, copy = (
            [a / b for a, b in zip(times[f"{who} {way} 1"], times[f"{who} {way} 2"], strict=True)]
            for who in ("ours", "memcpy")
        )
        mine, floor = statistics.median(ours), statistics.median(copy)
        text = f"{mine / floor:.2f}x ({mine:.2f}x; memcpy {floor:.2f}x)"
        what = f"{result['scaling']['set']}: two threads, {way}, against memcpy's scaling"
        found.append(Verdict(what, f">= {SCALING_BAR}x", text, mine / floor >= SCALING_BAR))
    for way, samples in result["overhead"].items():
        got = statistics.median(samples)
        found.append(
            Verdict(
                f"Python's share of a chunk, {way}",
                f"<= {OVERHEAD_BAR * 1e6:.0f} us",
                f"{got * 1e6:.1f} us",
                got <= OVERHEAD_BAR,
            )
        )
    return found


def speeds(entry: dict[str, Any], name: str, way: str) -> str:
    """GB/s, median (smallest-largest)."""
    found = [entry["bytes"] / s / 1e9 for s in entry["contenders"][name][way]]
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def markdown(result: dict[str, Any]) -> str:
    m, v, s = result["machine"], result["versions"], result["settings"]
    load = s["load_average"]
    others = load["start"] > 0.5 or max(load["during"]) > 1.5  # we are one
    lines = [
        "# Codec",
        "",
        f"{result['date']}. {m['cpu']}, {m['cores']} cores, instruction sets {v['isas']}; "
        f"{m['memory_bytes'] / 1e9:.0f} GB; Linux {m['kernel']}. fastckpt {v['fastckpt']}, ZipNN {v['zipnn']}, "
        f"zstandard {v['zstandard']} (libzstd {v['libzstd']}), torch {v['torch']}, NumPy {v['numpy']}, "
        f"Python {v['python']}. {s['rounds']} rounds{', quick: no result' if s['quick'] else ''}; "
        f"freed memory {'given back' if s['system_malloc'] else 'kept'}. "
        f"Load average {load['start']:.1f} before, {max(load['during']):.1f} at most during the run"
        f"{' (**others used the machine: provisional**)' if others else ''}.",
        "",
        "One process, one thread, contenders in turn; GB/s of raw bytes (10^9), memory to memory: median (smallest–largest). "
        "Size: stored / raw. H0: order-0 entropy of the byte planes. Ours includes choosing, digest and CRC; the others have none.",
        "",
        "| set | MB | H0 | contender | size | encode GB/s | decode GB/s | chunks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in result["sets"]:
        bound = f"{entry['entropy_bytes'] / entry['bytes']:.4f}"
        first = [entry["name"], f"{entry['bytes'] / 1e6:.0f}", bound]
        for name, c in entry["contenders"].items():
            how = ", ".join(f"{n} {t}" for t, n in entry["choices"].items()) if name == "ours" else ""
            cells = [
                *first,
                name,
                f"{c['bytes'] / entry['bytes']:.4f}",
                speeds(entry, name, "encode"),
                speeds(entry, name, "decode"),
                how,
            ]
            lines.append(tables.row(cells))
            first = ["", "", ""]
    lines += [
        "",
        "Asked and measured (speeds: median of the ratios within a round):",
        "",
        "| what | asked | measured | |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {b['what']} | {b['asked']} | {b['measured']} | {'pass' if b['passed'] else '**FAIL**'} |"
        for b in result["bars"]
    ]
    for text in result["missing"]:
        lines += ["", text]
    return "\n".join(lines) + "\n"


def write(path: Path) -> list[Path]:
    """Writes the table beside the JSON."""
    text = path.with_suffix(".md")
    text.write_text(markdown(json.loads(path.read_text())))
    return [text]


def versions() -> dict[str, str]:
    from importlib.metadata import version

    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "fastckpt": f"{__version__} {commit}".strip(),
        "zipnn": version("zipnn"),
        "zstandard": zstandard.__version__,
        "libzstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "isas": _native.isas(),
    }


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    sets, missing = codec_data.data_sets(OWN_CACHE, args.quick)
    chosen = [data for data in sets if args.only in data.name]
    if not chosen:
        raise SystemExit(f"no set has {args.only!r} in its name; there are: {'; '.join(d.name for d in sets)}")
    torch.set_num_threads(1)
    if not args.system_malloc:
        keep_freed_memory()
    start, during = os.getloadavg()[0], []
    scrub = np.zeros(QUICK_BYTES if args.quick else SET_BYTES, np.uint8)
    entries = []
    for number, data in enumerate(chosen):
        show(number, len(chosen) + 2, data.name)
        entries.append(measure_set(data, args.rounds, args.quick, scrub))
        during.append(os.getloadavg()[0])
    show(len(chosen), len(chosen) + 2, "two threads")
    weights = next((d for d in chosen if d.kind == "weights bf16"), chosen[0])
    scaling = measure_scaling(weights, args.rounds, args.quick, scrub)
    show(len(chosen) + 1, len(chosen) + 2, "overhead")
    overhead = measure_overhead()
    show(len(chosen) + 2, len(chosen) + 2, "done")
    result: dict[str, Any] = {
        **output.head("codec", measure.machine(OWN_CACHE)),
        "versions": versions(),
        "settings": {
            "rounds": args.rounds,
            "quick": args.quick,
            "system_malloc": args.system_malloc,
            "load_average": {"start": start, "during": during},
        },
        "missing": missing,
        "sets": entries,
        "scaling": scaling,
        "overhead": overhead,
    }
    result["bars"] = [dataclasses.asdict(v) for v in verdicts(result)]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="default 9, with --quick 2")
    parser.add_argument(
        "--quick", action="store_true", help="a small model and 8 MB of each set: a smoke test, no result"
    )
    parser.add_argument(
        "--system-malloc",
        action="store_true",
        help="page faults for those who allocate, as in a process of their users",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="sets whose name contains it")
    output.add_options(parser)
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 9)
    result = measure_all(args)
    output.publish(result, args, write, OWN_CACHE)
    return 0 if args.quick or all(bar["passed"] for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
