"""Every knob, with its unit, default and trade-off. Validated once, when built.

An argument overrides the environment, which overrides the default.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastckpt.host.deadline import bounded
from fastckpt.kernels import kernels
from fastckpt.kernels.transform import MAX_RAW_BYTES

logger = logging.getLogger("fastckpt")

PREFIX = "FASTCKPT_"
OTHER_VARIABLES = frozenset(
    PREFIX + name
    for name in (
        *("EXIT_TIMEOUT_S", "ISA", "KERNELS", "NOTICE_FILE", "SIGTERM_GRACE_S", "TRACE"),
        *("NO_NATIVE", "REQUIRE_NATIVE", "SANITIZE"),  # setup.py
        *("TEST_AZURITE", "TEST_NATIVE", "TEST_S3", "TEST_S3_PORT", "TEST_SEED", "URL"),  # tests and the demo
        *(
            "GPU_COMMIT",
            "GPU_PINNED_BYTES",
            "GPU_RECORD",
            "GPU_ROUNDS",
            "GPU_SEED",
            "GPU_SNAPSHOTS",
            "GPU_STATE_MB",
            "GPU_TESTS_ON",
        ),
    )
)
"""Variables that are read besides the knobs below, so their names are no typing errors."""
_CLOSE = (
    0.7  # MAX_LOAD for MAX_LOAD_BYTES is one (0.73), a name of somebody's own such as TEST_URL for TEST_S3 none (0.67)
)
_told_of_unknown = False

_MIB = 1 << 20
# Scratch memory of one chunk in flight: raw copy, ROT stream, frame (≤ 4 MiB each) and the finished bytes waiting for the writer. Native
# kernels need only the first and the last.
CHUNK_IN_FLIGHT_BYTES = 16 * _MIB
# Scratch memory of a thread that decodes: planes of a stripe (2 MiB), and a frame of a file or the chunk of several small storages.
DECODER_BYTES = 2 * _MIB + MAX_RAW_BYTES
LEAST_LOAD_EXTRA_BYTES = 24 * _MIB
MIN_PACK_BYTES = MAX_RAW_BYTES  # a chunk never crosses the border of a pack
MAX_PACK_BYTES = 32 * _MIB
MOST_READ_AMPLIFICATION = 64
"""As long as a chain of differences can be."""
EFFORTS = ("auto", "none", "fast", "normal", "high")
_CONNECTIONS, _MOST_CONNECTIONS = 8, 64
_PACK_OF_MANY_BYTES = 8 * _MIB  # the more connections there are, the less a long pack gains


def _physical_memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its cgroup's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def _chunk_in_flight_bytes() -> int:
    return CHUNK_IN_FLIGHT_BYTES if kernels().encode is None else 2 * MAX_RAW_BYTES


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Knobs of save and load. Each can be set by an environment variable, FASTCKPT_ and its name in capitals."""

    threads: int = 0
    """Threads that encode or decode. 0: one for each CPU this process may use, at most 16; more are memory-bound."""
    compress: bool = True
    """False stores every chunk RAW (or CONST): 20–50 % more bytes, several times less CPU time. For very fast disks."""
    effort: str = "auto"
    """How much time the encoder may spend. "auto": a Checkpointer follows its link, with less effort while uploads wait for the encoder and
    more while packs wait for the link; other saves are "normal". "none": as `compress` False. "fast": no search for matches. "normal".
    "high": 0.2 % fewer bytes at most, in up to eight times the time. It changes sizes and speed, never what is read back."""
    deltas: bool = True
    """Whether a save of a Checkpointer names chunks of the checkpoint before it that have not changed, and stores differences where
    they are smaller. For differences the bytes of that checkpoint stay in memory, as far as they fit the budget beside a snapshot. False:
    every checkpoint is whole by itself."""
    read_amplification: float = 1.53
    """How many times the stored bytes of a whole checkpoint a restore may read because of differences, at least 1. More: smaller saves;
    less: faster restores."""
    host_budget_bytes: int = 0
    """Most extra host memory of saves: snapshots, encoders and uploads together. 0: half of this machine's (or cgroup's) memory.
    A state that does not fit goes through it in parts, and training waits for the last one; `save_async` writes before it returns."""
    max_stall_s: float = 60.0
    """How long training may be kept because a state is larger than the budget and its upload does not get on. Then that snapshot is
    dropped with an error, and training goes on. Longer: fewer saves are lost to a slow store; shorter: less training time is."""
    max_order_wait_s: float = 300.0
    """How long a save to a path, URL or file object waits for earlier ones to the same target before it fails with TargetBusyError. Longer:
    an earlier save to a slow disk may end; shorter: one that hangs is told sooner."""
    verify_snapshot: str = "sampled"
    """Whether staged bytes are compared with fingerprints taken at the call of save; finds writes that torch does not count (`.data`, NumPy
    views, kernels of others). "sampled": in every snapshot, host tensors by 64 bytes of each 4 KiB, which each save chooses anew, and whole
    where they are smaller than 64 KiB: 500 MB take some 2 ms before `save` returns. "always": every byte, one more reading of host
    tensors. "first": every byte of the first snapshot that is left to a fence, nothing of the others. "off": nothing. Of tensors on a
    device, "sampled" too reads every byte, in the device's own stream."""
    background_nice: int = 0
    """By how much the threads that encode and upload give way to others (as nice(1), 1 to 19) while nobody waits for them. 0: not at all.
    Giving way costs training more than it gains where its own threads wait for each other (docs/decisions/0003)."""
    spill_dir: str = ""
    """A directory on a local disk for snapshots that are larger than the budget: what the store is too slow to take goes there, so that
    training need not wait for it. "": none."""
    connections: int = 0
    """Uploads under way at once, for stores; a load has twice as many reads under way. One connection to S3 gives some 80 MB/s; an upload
    holds one pack of up to 32 MiB, a read up to 8 MiB. 0: 8, and uploads follow the link: as long as more of them carry more, there are
    more, up to `max_connections`."""
    max_connections: int = 0
    """Most uploads under way at once. 0: 64 if `connections` is 0, otherwise as many as `connections`, which then does not change."""
    max_upload_bytes_per_s: int = 0
    """Most bytes a second that the saves of one Checkpointer upload into packs, on average over ten seconds or one pack. 0: no limit.
    Keeps a machine's burst credits for its last save: after a notice, and while `close` waits, there is no limit. Each rank has its own."""
    join_timeout_s: float = 300.0
    """How much later than the first one the last rank of a job may come to where all ranks meet: when their Checkpointers are made, at a
    restore, at the first save. Longer: slow nodes may come; shorter: a rank that never comes is told sooner."""
    cache_dir: str = ""
    """A folder of this machine that `fastckpt prefetch` fills: `restore`, `load` and `open` read packs and votes of a repository there, and
    from the store what is not there. "": none."""
    max_load_bytes: int = 0
    """Largest state that load will allocate host memory for. 0: this machine's (or cgroup's) memory.
    Protects against files of a few kilobytes that say they hold terabytes."""
    load_extra_bytes: int = 0
    """Most host memory that a load or a restore takes beyond the state and the indexes: stored bytes on their way, what decodes them, and
    storages that wait to go on to a device. 0: 256 MiB. Less: fewer reads are under way at once, and fewer threads decode. A storage that
    goes on to a device is in host memory whole, and so is a tensor that is put together from several ranks' parts."""

    def __post_init__(self) -> None:
        wrong = (
            (f.name, getattr(self, f.name), _expected(f.name, f.type, getattr(self, f.name))) for f in fields(self)
        )
        problems = [f"{name} is {value!r}: it must be {expected}" for name, value, expected in wrong if expected]
        if problems:
            raise ValueError("; ".join(problems))
        for name in ("max_stall_s", "max_order_wait_s", "join_timeout_s"):
            object.__setattr__(self, name, bounded(getattr(self, name)))
        if not self.threads:
            object.__setattr__(self, "threads", min(_cpus(), 16))
        if not self.max_connections:
            object.__setattr__(self, "max_connections", self.connections or _MOST_CONNECTIONS)
        if not self.connections:
            object.__setattr__(self, "connections", min(_CONNECTIONS, self.max_connections))
        if not self.host_budget_bytes:
            object.__setattr__(self, "host_budget_bytes", _physical_memory_bytes() // 2)
        if not self.max_load_bytes:
            object.__setattr__(self, "max_load_bytes", _physical_memory_bytes())
        if not self.load_extra_bytes:
            object.__setattr__(self, "load_extra_bytes", 256 * _MIB)

    @property
    def chunks_in_flight(self) -> int:
        """Number of chunks that may be between the state and the file: two for each thread, and at most a quarter of the budget."""
        return max(1, min(2 * self.threads, self.host_budget_bytes // 4 // _chunk_in_flight_bytes()))

    @property
    def encoders(self) -> int:
        """Number of packs that threads fill at once."""
        return min(self.threads, self.chunks_in_flight)

    @property
    def pack_bytes(self) -> int:
        """Host memory for packs: a quarter of the budget; no more than all connections can use, no less than one pack for each."""
        useful = max((self.connections + 1) * MAX_PACK_BYTES, (self.max_connections + 1) * _PACK_OF_MANY_BYTES)
        return max((self.connections + 1) * MIN_PACK_BYTES, min(self.host_budget_bytes // 4, useful))

    @property
    def pack_buffer_bytes(self) -> int:
        """Host memory for the packs of a save that is encoded in them: an encoder then needs no memory of its own for stored bytes."""
        return self.pack_bytes + self.encoder_bytes - self.encoders * (_chunk_in_flight_bytes() - MAX_RAW_BYTES)

    @property
    def load_threads(self) -> int:
        """Threads that decode: at most half of the extra memory of a load is for them."""
        return max(1, min(self.threads, self.load_extra_bytes // 2 // DECODER_BYTES))

    @property
    def encoder_bytes(self) -> int:
        """Host memory that encoding takes."""
        return self.chunks_in_flight * _chunk_in_flight_bytes()

    @property
    def snapshot_bytes(self) -> int:
        """The part of the budget that is left for snapshots, after encoders and uploads have theirs. 0: nothing."""
        return max(0, self.host_budget_bytes - self.encoder_bytes - self.pack_bytes)

    def shared_by(self, n: int) -> Options:
        """These, for one of `n` processes of a machine, which share cores, memory and link as far as those were left to the defaults."""
        if n == 1:
            return self
        default = Options()
        shares = {"threads": 1, "host_budget_bytes": 1 << 20, "max_load_bytes": 1 << 20}
        shares |= {"connections": 4, "max_connections": 4}
        return replace(
            self,
            **{
                name: max(least, getattr(self, name) // n)
                for name, least in shares.items()
                if getattr(self, name) == getattr(default, name)
            },
        )

    def for_store(self, useful_connections: int | None) -> Options:
        """These options, with no more connections than the store can use: each one takes memory."""
        if useful_connections is None or useful_connections >= self.max_connections:
            return self
        return replace(self, connections=min(useful_connections, self.connections), max_connections=useful_connections)

    @classmethod
    def from_env(cls) -> Options:
        """The defaults, changed by the environment. ValueError lists every bad variable."""
        _tell_of_unknown_variables(cls)
        found: dict[str, Any] = {}
        problems = []
        for field in fields(cls):
            text = os.environ.get(variable(field.name))
            if text is None:
                continue
            try:
                value = found[field.name] = _PARSERS[str(field.type)](text)
                expected = _expected(field.name, field.type, value)
            except ValueError:
                expected = _WORDS[str(field.type)]
            if expected:
                problems.append(f"{variable(field.name)} is {text!r}: expected {expected}")
        if problems:
            raise ValueError("; ".join(problems))
        return cls(**found)


def variable(name: str) -> str:
    """The environment variable of a knob."""
    return PREFIX + name.upper()


def _expected(name: str, kind: Any, value: Any) -> str | None:
    """The requirement that a value violates, in words; None if it is right."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "int" and not (number and isinstance(value, int) and value >= 0):
        return "an integer ≥ 0"
    if kind == "bool" and not isinstance(value, bool):
        return "True or False"
    if kind == "str" and not isinstance(value, str):
        return "a string"
    if kind == "float" and not (number and value >= 0):
        return "a number ≥ 0"
    if name == "verify_snapshot" and value not in ("sampled", "always", "first", "off"):
        return '"sampled", "always", "first" or "off"'
    if name == "effort" and value not in EFFORTS:
        return f"one of {', '.join(EFFORTS)}"
    if name == "background_nice" and value > 19:
        return "at most 19"
    if name == "read_amplification" and not 1 <= value <= MOST_READ_AMPLIFICATION:
        return f"from 1 to {MOST_READ_AMPLIFICATION}"
    if name == "host_budget_bytes" and 0 < value < CHUNK_IN_FLIGHT_BYTES:
        return f"0, for half of the memory, or more: one chunk in flight needs {CHUNK_IN_FLIGHT_BYTES}"
    if name == "load_extra_bytes" and 0 < value < LEAST_LOAD_EXTRA_BYTES:
        return f"0, for 256 MiB, or at least {LEAST_LOAD_EXTRA_BYTES}"
    return None


def _tell_of_unknown_variables(cls: type[Options]) -> None:
    """Warn once in a process of mistyped variables: otherwise such a knob would silently keep its default.

    Only for names close to a known one: other programs may use variables that begin with FASTCKPT_.
    """
    global _told_of_unknown  # noqa: PLW0603 - told twice at worst
    if _told_of_unknown:
        return
    _told_of_unknown = True
    known = {name.removeprefix(PREFIX) for name in (*OTHER_VARIABLES, *(variable(field.name) for field in fields(cls)))}
    found = []
    for name in sorted(os.environ):
        rest = name.removeprefix(PREFIX)
        if rest != name and rest not in known and (close := difflib.get_close_matches(rest, known, 1, _CLOSE)):
            found.append(f"{name} is not known; did you mean {PREFIX}{close[0]}?")
    if found:
        logger.warning("%s", " ".join(found))


_BOOLEANS = {"1": True, "true": True, "yes": True, "y": True, "0": False, "false": False, "no": False, "n": False}


def _parse_bool(text: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


_PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": _parse_bool, "str": str}
_WORDS = {"int": "an integer ≥ 0", "float": "a number ≥ 0", "bool": f"one of {', '.join(_BOOLEANS)}"}
