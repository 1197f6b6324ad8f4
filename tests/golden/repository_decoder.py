"""A second reader of repositories, written from docs/format.md §11 and docs/guarantees.md §3 alone. Shares no code with fastckpt.

python tests/golden/repository_decoder.py DIRECTORY     the history, and what each checkpoint holds
"""

from __future__ import annotations

import json
import re
import struct
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

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
        name = f"{commit['epoch']:06}-{commit['step']:012}-{commit['try']:03}"
        vote = commit["votes"][rank]
        file = f"r{rank:05}-of-{commit['world']:05}.{vote['bytes']}.{vote['digest']}"
        data = (self.root / "votes" / name / file).read_bytes()
        one.need(len(data) == vote["bytes"], "vote", "another length than its name says")
        one.need(xxhash.xxh3_128(data).hexdigest() == vote["digest"], "vote", "another digest than its name says")
        return self._tensors(data, vote["parts"])

    def _tensors(self, data: bytes, parts: dict[str, list[int]]) -> dict[tuple[Any, ...], NDArray[Any]]:
        read_features = struct.unpack_from("<Q", data, 16)[0]
        one.need(read_features == 0 and data[-96:-32] == data[:64], "header", "not that of a vote")
        cut = {}
        for i, part in enumerate(one.CAPS):
            start, size, digest = struct.unpack_from("<QQ16s", data, len(data) - 256 + 32 * i)
            one.need([start, size] == parts[part], part, "not where the commit record has it")
            cut[part] = data[start : start + size]
            one._check_digest(part, "the part", cut[part], digest)
        directory, files = json.loads(cut["directory"]), json.loads(cut["file table"])
        packs = []
        for entry in files:
            pack = (self.root / entry["key"]).read_bytes()
            one.need(len(pack) == entry["bytes"], "pack", "another length than the file table says")
            one.need(
                f"{one.crc64nvme(pack):016x}" == entry["crc64nvme"], "pack", "another crc than the file table says"
            )
            packs.append(pack)
        records = [one.Record(*fields) for fields in struct.iter_unpack("<BBBBIQII16sQ8s8s", cut["records"])]
        starts = list(accumulate((r.raw for r in records), initial=0))
        one.check_bases(records)
        raw = one.chunks(records, lambda r: packs[r.file - 1] if r.file else b"", True)
        storages = [one._storage(storage, starts, raw) for storage in directory["storages"]]
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
