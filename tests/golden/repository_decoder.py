"""A second reader of repositories, written from docs/format.md §5, §11 and docs/guarantees.md §3 alone. Shares no code with fastckpt.

python tests/golden/repository_decoder.py DIRECTORY     the history, and what each checkpoint holds
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
import reference_decoder as one

FormatError = one.FormatError

Checkpoint = tuple[int, int]


def unseal(data: bytes, kinds: tuple[str, ...]) -> dict[str, Any]:
    """A sealed object whose last 49 bytes are its digest."""
    body, seal = data[:-49], data[-49:]
    found = re.fullmatch(rb',\n"digest": "([0-9a-f]{32})"\n\}\n', seal)
    one.need(found is not None, kinds[0], "no seal at the end")
    assert found is not None
    one.need(xxhash.xxh3_128(body).hexdigest() == found[1].decode(), kinds[0], "its digest is wrong")
    value = json.loads(data)
    one.need(value["fastckpt"] in kinds and value["format"] == 1, kinds[0], f"it is a {value['fastckpt']!r}")
    return dict(value)


class Repository:
    """A repository in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.marker = unseal((root / "fastckpt.json").read_bytes(), ("marker",))
        self.epochs = {
            int(path.stem): unseal(path.read_bytes(), ("epoch",)) for path in sorted((root / "epochs").glob("*.json"))
        }
        self.commits: dict[Checkpoint, dict[str, Any]] = {}
        self.tombstones: dict[Checkpoint, dict[str, Any]] = {}
        for path in sorted((root / "commits").glob("*.json")):
            epoch, step = map(int, path.stem.split("-"))
            found = unseal(path.read_bytes(), ("commit", "tombstone"))
            one.need((found["epoch"], found["step"]) == (epoch, step), "commit", "another step than its key says")
            where = self.commits if found["fastckpt"] == "commit" else self.tombstones
            where[epoch, step] = found

    def history(self) -> list[Checkpoint]:
        """Newest first."""
        number, most, named = max([*self.epochs, *(c[0] for c in self.commits)], default=0), float("inf"), False
        found = []
        keys = [*self.commits, *self.tombstones]
        while number:
            own = sorted((c for c in keys if c[0] == number), reverse=True)
            found += [c for c in own if c[1] <= most]
            epoch = self.epochs.get(number)
            counts = named or bool(own) or (epoch is not None and (epoch["rewind"] or epoch["fresh"]))
            if epoch is not None and counts and epoch["parent"] is not None:
                number, most, named = epoch["parent"]["epoch"], epoch["parent"]["step"], True
            elif epoch is not None and epoch["fresh"]:
                break
            else:
                number, most, named = number - 1, float("inf"), False
        return [c for c in found if c in self.commits]

    def read(self, checkpoint: Checkpoint, rank: int = 0) -> dict[tuple[Any, ...], NDArray[Any]]:
        """All tensors of a rank, every byte verified."""
        commit = self.commits[checkpoint]
        data = self._vote(commit, rank)
        own = open_vote(self.root, data, commit["votes"][rank]["parts"])
        return tensors_of(own, lambda other: open_vote(self.root, self._vote(commit, other)))

    def _vote(self, commit: dict[str, Any], rank: int) -> bytes:
        name = f"{commit['epoch']:06}-{commit['step']:012}-{commit['try']:03}"
        vote = commit["votes"][rank]
        file = f"r{rank:05}-of-{commit['world']:05}.{vote['bytes']}.{vote['digest']}"
        data = (self.root / "votes" / name / file).read_bytes()
        one.need(len(data) == vote["bytes"], "vote", "another length than its name says")
        one.need(xxhash.xxh3_128(data).hexdigest() == vote["digest"], "vote", "another digest than its name says")
        return data


class Vote(NamedTuple):
    """An index whose chunks are in packs: its directory, where each record's raw bytes begin, and these bytes."""

    directory: dict[str, Any]
    starts: list[int]
    raw: bytes


def open_vote(root: Path, data: bytes, parts: dict[str, list[int]] | None = None) -> Vote:
    """Read and verify a vote and the packs below `root` that it names. parts: where its commit record has its parts."""
    features = struct.unpack_from("<Q", data, 16)[0]
    one.need(features in (0, one.SHARED) and data[-96:-32] == data[:64], "header", "not that of a vote")
    cut = {}
    for i, part in enumerate(one.CAPS):
        start, size, digest = struct.unpack_from("<QQ16s", data, len(data) - 256 + 32 * i)
        one.need(parts is None or [start, size] == parts[part], part, "not where the commit record has it")
        cut[part] = data[start : start + size]
        one._check_digest(part, "the part", cut[part], digest)
    directory, files = json.loads(cut["directory"]), json.loads(cut["file table"])
    one._check_members(directory)
    packs = []
    for entry in files:
        pack = (root / entry["key"]).read_bytes()
        one.need(len(pack) == entry["bytes"], "pack", "another length than the file table says")
        one.need(f"{one.crc64nvme(pack):016x}" == entry["crc64nvme"], "pack", "another crc than the file table says")
        packs.append(pack)
    records = [one.Record(*fields) for fields in struct.iter_unpack("<BBBBIQII16sQ8s8s", cut["records"])]
    starts = list(accumulate((r.raw for r in records), initial=0))
    one.check_bases(records)
    for i, storage in enumerate(directory["storages"]):
        place = directory["rank"], directory["world"]
        own = own_bytes(f"storage {i}", storage, *place) if "shares" in storage else None
        one.check_storage(f"storage {i}", storage, records, starts, own)
    shared = [i for i, storage in enumerate(directory["storages"]) if "shares" in storage]
    one.need(bool(shared) == bool(features), "header", "SHARED, and no storage has shares, or the other way round")
    firsts = first_names(directory)
    one.need(len(firsts) == len(shared), "directory", "storages with shares and without a first name of their own")
    return Vote(directory, starts, one.chunks(records, lambda r: packs[r.file - 1] if r.file else b"", True))


def own_bytes(what: str, storage: Any, rank: int, world: int) -> int:
    """Check the shares of a storage that has some; how many bytes are this rank's."""
    shares, last, own, total = storage["shares"], -1, 0, 0
    one.need(storage.get("extents") is not None, "directory", f"{what}: no data, but shares")
    one.need(isinstance(shares, list) and shares, "directory", f"{what}: shares must be an array, not empty")
    for share in shares:
        pair = one._integers(share, f"{what}: a share")
        one.need(len(pair) == 2 and pair[1] >= 1, "directory", f"{what}: a share is not [rank, bytes ≥ 1]")
        one.need(last < pair[0] < world, "directory", f"{what}: ranks of shares do not ascend, or reach {world}")
        last, total, own = pair[0], total + pair[1], own + (pair[1] if pair[0] == rank else 0)
    one.need(total == storage["bytes"], "directory", f"{what}: shares of {total} bytes, but {storage['bytes']} long")
    if "print" in storage:
        text = storage["print"]
        right = isinstance(text, str) and re.fullmatch("[0-9a-f]{32}", text)
        one.need(bool(right), "directory", f"{what}: print is not 32 hex digits")
    return own


def first_names(directory: dict[str, Any]) -> dict[str, int]:
    """First names, as JSON, of the storages with shares, and their numbers."""

    def order(name: list[Any]) -> list[tuple[int, int, str]]:
        parts = ((0, k, "") if type(k) is int else (1, 0, k) if type(k) is str else (2, 0, k["repr"]) for k in name)
        return list(parts)

    names: dict[int, list[list[Any]]] = {}
    for tensor in directory["tensors"]:
        if "shares" in directory["storages"][tensor["storage"]]:
            names.setdefault(tensor["storage"], []).append(tensor["name"])
    return {json.dumps(min(some, key=order)): number for number, some in names.items()}


def tensors_of(own: Vote, open_other: Callable[[int], Vote]) -> dict[tuple[Any, ...], NDArray[Any]]:
    """All tensors of a rank. open_other: the vote of another rank."""
    directory, others = own.directory, {own.directory["rank"]: own}
    numbers = {number: name for name, number in first_names(directory).items()}
    storages = []
    for number, storage in enumerate(directory["storages"]):
        if "shares" not in storage:
            storages.append(one._storage(storage, own.starts, own.raw))
            continue
        data = b""
        for rank, _ in storage["shares"]:
            other = others[rank] if rank in others else others.setdefault(rank, open_other(rank))
            there = first_names(other.directory).get(numbers[number])
            one.need(there is not None, "vote", f"rank {rank} has no storage with shares of the name {numbers[number]}")
            found = other.directory["storages"][there]
            for member in ("dtype", "bytes", "shares"):
                one.need(
                    found[member] == storage[member], "vote", f"rank {rank}: another {member} of {numbers[number]}"
                )
            data += one._storage(found, other.starts, other.raw) or b""
        storages.append(data)
    tensors = {}
    for i, tensor in enumerate(directory["tensors"]):
        array = one._tensor(f"tensor {i}", tensor, directory, storages)
        if array is not None:
            tensors[one._name(tensor["name"], f"tensor {i}")] = array
    return tensors


def main() -> None:
    repository = Repository(Path(sys.argv[1]))
    for checkpoint in repository.history():
        commit = repository.commits[checkpoint]
        tensors = [repository.read(checkpoint, rank) for rank in range(commit["world"])]
        print(
            checkpoint, commit["trigger"], commit["metrics"], [len(some) for some in tensors], "tensors, all verified"
        )


if __name__ == "__main__":
    main()
