"""Write shares/: votes of ranks that share what they hold alike, built byte by byte from docs/format.md, section 11.3.

    python -m tests.golden.make_shares

Run when a case is added; a case is never changed. Shares no code with fastckpt. README.md in this folder says what the files are for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.golden.make_goldens import CONST, RAW, REF, ROT, Draft, compact, crc, floats, frame, numbers, rot_stream, u32

ROOT = Path(__file__).resolve().parent / "shares"
SHARED = 4
PACK = "data/000001-000000000007-000/r{rank:05}/000000.pack"

Shares = list[list[int]]


@dataclass
class Vote(Draft):
    """A vote in the making, and its pack."""

    rank: int = 0
    world: int = 2
    pack: bytearray = field(default_factory=bytearray)
    features: tuple[int, int, int] = (SHARED, 0, 0)

    def chunk(
        self, raw: bytes, transform: int = RAW, lane: int = 1, stored: bytes | None = None, **fields: object
    ) -> int:
        number = super().chunk(raw, transform, lane, stored, **fields)
        record = self.records[number]
        if record["stored"]:
            record["file"], record["offset"] = 1, len(self.pack)
            self.pack += self.payload
        self.payload.clear()
        return number

    def share(
        self, dtype: str, data: bytes, shares: Shares, transform: int = RAW, lane: int = 1, *, record: int | None = None
    ) -> int:
        """Add a storage of which this rank writes its share. record: of the chunk that has it, if it is there already."""
        start, extents = 0, []
        for rank, size in shares:
            if rank == self.rank:
                part = data[start : start + size]
                stored = frame(rot_stream(part, lane)) if transform == ROT else None
                number = self.chunk(part, transform, lane, stored) if record is None else record
                extents = [[number, 0, size]]
            start += size
        storage = self.storage(dtype, data, extents)
        self.storages[storage]["shares"] = shares
        return storage

    def shared(
        self, name: list[Any], dtype: str, data: bytes, shares: Shares, transform: int = RAW, lane: int = 1
    ) -> int:
        """Add a one-dimensional tensor over a storage with shares."""
        storage = self.share(dtype, data, shares, transform, lane)
        self.tensor(name, [len(data) // {"float32": 4, "bfloat16": 2, "int64": 8, "uint8": 1}[dtype]], storage)
        return storage

    def build(self) -> bytes:
        self.members = {
            "step": 7,
            "rank": self.rank,
            "world": self.world,
            "save": {
                "epoch": 1,
                "try": 0,
                "parent": None,
                "trigger": "manual",
                "metrics": {},
                "raw_bytes": 0,
                "stored_bytes": len(self.pack),
                "seconds": 0.5,
                "utc": "2026-01-01T00:00:00Z",
            },
        } | self.members
        if self.pack:
            entry = {"key": PACK.format(rank=self.rank), "bytes": len(self.pack), "crc64nvme": f"{crc(self.pack):016x}"}
            self.file_table = compact([entry])
        self.skeleton = b"" if self.skeleton is None else self.skeleton
        return super().build()


A, B, C = numbers(64, 4, 8), numbers(50, 2, 8), bytes(range(200)) * 2


def two_ranks() -> list[Vote]:
    """One storage in two shares, one of each rank for both, and some of each rank's own; numbers and order differ."""
    votes = []
    for rank in range(2):
        v = Vote(rank=rank)
        if rank:
            v.add(["own"], "float32", floats(1.0, 2.0, 3.0 + rank))
        v.shared(["model", "a"], "float32", A, [[0, 100], [1, 156]])
        v.shared(["model", "c"], "uint8", C, [[0, 400]])
        b = v.share("bfloat16", B, [[1, 100]], ROT, 2)
        v.tensor(["z"], [50], b)
        v.tensor(["b", 3], [10], b, offset=7)
        v.tensor(["empty"], [0], v.storage("float32", b"", []))
        votes.append(v)
    return votes


def no_share_here() -> list[Vote]:
    """A rank that writes nothing of what it holds: no record, no pack."""
    votes = [Vote(rank=rank) for rank in range(2)]
    for v in votes:
        v.shared(["w"], "float32", A, [[1, 256]])
    return votes


def one_rank() -> list[Vote]:
    """A job of one that shares with itself."""
    v = Vote(world=1)
    v.shared(["w"], "float32", A, [[0, 256]])
    return [v]


def four_ranks() -> list[Vote]:
    """Groups that overlap: all of them, 0 and 2, 1 and 3. What has the same name is another storage in another group."""
    votes = []
    for rank in range(4):
        v, pair = Vote(rank=rank, world=4), rank % 2
        v.shared(["all"], "int64", C, [[0, 80], [1, 120], [3, 200]])
        v.shared(["pair"], "float32", A if pair else A[::-1], [[pair, 96], [pair + 2, 160]], ROT, 4)
        votes.append(v)
    return votes


def bases() -> list[Vote]:
    """The record of a share has a base, which nothing else of this rank needs; before both there is one that nobody does."""
    votes = []
    for rank in range(2):
        v = Vote(rank=rank)
        if rank:
            v.chunk(C)
            base = v.chunk(A)
            ref = v.chunk(A, REF, 4, parameter=u32(base) + u32(0))
            v.tensor(["w"], [64], v.share("float32", A, [[1, 256]], record=ref))
        else:
            v.add(["first"], "uint8", C)
            v.shared(["w"], "float32", A, [[1, 256]])
        votes.append(v)
    return votes


def constant_and_bundle() -> list[Vote]:
    """A share that stores nothing, and two that lie in one chunk."""
    votes = []
    for rank in range(2):
        v = Vote(rank=rank)
        v.shared(["zeros"], "float32", bytes(400), [[0, 200], [1, 200]], CONST, 4)
        shares: Shares = [[0, 40]]
        bundle = v.chunk(A[:80]) if not rank else None
        for i, name in enumerate("xy"):
            part = A[40 * i : 40 * i + 40]
            storage = v.storage("float32", part, [] if bundle is None else [[bundle, 40 * i, 40]])
            v.storages[storage]["shares"] = shares
            v.tensor([name], [10], storage)
        votes.append(v)
    return votes


def several_extents_and_prints() -> list[Vote]:
    """A share of several extents, out of order; prints; members that this version does not know."""
    votes = []
    for rank in range(2):
        v = Vote(rank=rank)
        storage = v.share("float32", A, [[0, 96], [1, 160]])
        if rank:
            v.records.clear(), v.pack.clear()
            two, one = v.chunk(A[196:]), v.chunk(A[96:196])
            v.storages[storage]["extents"] = [[one, 0, 100], [two, 0, 60]]
        v.storages[storage] |= {"print": "0123456789abcdef0123456789abcdef", "colour": "blue"}
        v.tensor(["w"], [64], storage)
        votes.append(v)
    return votes


MUST_READ: dict[str, Callable[[], list[Vote]]] = {
    make.__name__: make
    for make in (
        two_ranks,
        no_share_here,
        one_rank,
        four_ranks,
        bases,
        constant_and_bundle,
        several_extents_and_prints,
    )
}


def simple(shares: Shares, rank: int = 0, world: int = 2) -> Vote:
    """One storage with these shares, right where they are."""
    v = Vote(rank=rank, world=world)
    v.shared(["w"], "float32", A, shares)
    return v


def broken() -> dict[str, tuple[str, str, Vote]]:
    """Votes that no reader may accept: the part, why, and the vote."""
    found: dict[str, tuple[str, str, Vote]] = {}

    def add(name: str, why: str, v: Vote, part: str = "directory", **members: Any) -> Vote:
        v.storages[0] |= members
        found[name] = part, why, v
        return v

    good: Shares = [[0, 100], [1, 156]]
    add("sum_too_small", "shares of 252 bytes, a storage of 256", simple([[0, 100], [1, 152]]))
    add("sum_too_large", "shares of 260 bytes, a storage of 256", simple([[0, 100], [1, 160]]))
    add("rank_is_world", "a share of rank 2 of 2", simple([[0, 100], [2, 156]]))
    add("rank_negative", "a share of rank −1", simple(good), shares=[[-1, 156], [0, 100]], extents=[[0, 0, 100]])
    add("rank_twice", "two shares of one rank", simple([[1, 100], [1, 156]]))
    add("ranks_descending", "rank 1 before rank 0", simple([[1, 100], [0, 156]]))
    add("share_of_nothing", "a share of 0 bytes", simple([[0, 256], [1, 0]]))
    add("no_shares", "an empty array", simple(good), shares=[], extents=[[0, 0, 100]])
    add("shares_null", "null", simple(good), shares=None)
    add("shares_are_objects", "no arrays", simple(good), shares=[{"rank": 0, "bytes": 256}])
    add("share_of_three_numbers", "a third number", simple(good), shares=[[0, 100, 0], [1, 156, 0]])
    add("share_is_true", "true is no integer", simple([[1, 256]]), shares=[[True, 256]])
    v = simple(good)
    add("extents_of_the_whole", "the extents are of all 256 bytes", v, extents=[[v.chunk(A), 0, 256]])
    add("extents_of_the_other_share", "156 bytes, and this rank's share has 100", v := simple(good))
    v.storages[0]["extents"] = [[v.chunk(A[100:]), 0, 156]]
    v = add("extents_without_a_share", "this rank has no share", simple([[1, 256]]))
    v.storages[0]["extents"] = [[v.chunk(A), 0, 256]]
    add("share_without_extents", "this rank's share of 100 bytes is nowhere", simple(good), extents=[])
    add("shares_on_meta", "no data, and shares", simple(good), extents=None, location="meta")
    add("print_too_short", "a print of 31 digits", simple(good), print="0" * 31)
    add("print_in_capitals", "hex digits are lowercase", simple(good), print="ABCDEF0123456789" * 2)
    add("print_null", "a print of null", simple(good), print=None)
    v = add("no_name", "no tensor has this storage, so no other vote can tell which it is", simple(good))
    v.tensors.clear()
    v = add("first_name_twice", "two storages with shares and one first name", simple(good))
    v.shared(["w"], "float32", A, [[1, 256]])
    add("shares_without_the_feature", "storages with shares, SHARED not set", simple(good), "header").features = (
        0,
        0,
        0,
    )
    v = Vote()
    v.add(["w"], "float32", A)
    found["feature_without_shares"] = "header", "SHARED is set, and nothing has shares", v
    add("both_features", "SHARED and SELF_CONTAINED", simple(good), "header").features = (SHARED | 1, 0, 0)
    return found


def not_fitting() -> dict[str, tuple[str, list[Vote]]]:
    """Votes that are right by themselves, and whose rank 0 cannot be merged: why, and the votes."""
    good: Shares = [[0, 100], [1, 156]]
    other: dict[str, tuple[str, Vote]] = {
        "other_shares": ("the owner has other shares", simple([[0, 104], [1, 152]], 1)),
        "other_name": ("the owner has no storage of that first name", Vote(rank=1)),
        "other_type": ("the owner has another element type", Vote(rank=1)),
        "other_length": ("the owner's storage is longer", Vote(rank=1)),
        "another_first_name": ("the name is not the first one of the owner's storage", simple(good, 1)),
        "not_shared_there": ("the owner has that storage for itself", Vote(rank=1, features=(0, 0, 0))),
    }
    other["other_name"][1].shared(["v"], "float32", A, good)
    other["other_type"][1].shared(["w"], "int64", A, good)
    other["other_length"][1].shared(["w"], "float32", A + A[:4], [[0, 100], [1, 160]])
    other["another_first_name"][1].tensor(["a"], [64], 0)
    other["not_shared_there"][1].add(["w"], "float32", A)
    return {name: (why, [simple(good), vote]) for name, (why, vote) in other.items()}


def save(folder: Path, votes: list[Vote]) -> None:
    """Votes and packs of one case."""
    folder.mkdir(parents=True)
    for vote in votes:
        (folder / f"r{vote.rank}.vote").write_bytes(vote.build())
        if vote.pack:
            pack = folder / PACK.format(rank=vote.rank)
            pack.parent.mkdir(parents=True)
            pack.write_bytes(vote.pack)


def tensors(vote: Vote) -> dict[str, str]:
    """Names and the SHA-256 of what is in the tensors of a rank."""
    return {json.dumps(t["name"]): vote.expected_tensor(t)["sha256"] for t in vote.tensors}


def write(root: Path) -> None:
    """Write all cases into a folder that is made anew."""
    shutil.rmtree(root, ignore_errors=True)
    expected: dict[str, dict[str, Any]] = {"must_read": {}, "must_reject": {}, "must_not_merge": {}}
    for name, make in MUST_READ.items():
        votes = make()
        save(root / "must_read" / name, votes)
        expected["must_read"][name] = {"about": make.__doc__, "ranks": [tensors(vote) for vote in votes]}
    (root / "must_reject").mkdir()
    for name, (part, why, vote) in broken().items():
        (root / "must_reject" / f"{name}.vote").write_bytes(vote.build())
        expected["must_reject"][name] = {"part": part, "why": why}
    for name, (why, votes) in not_fitting().items():
        save(root / "must_not_merge" / name, votes)
        expected["must_not_merge"][name] = {"why": why}
    text = json.dumps(expected, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (root / "expected.json").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(ROOT)
