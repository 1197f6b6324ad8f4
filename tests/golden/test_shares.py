"""Votes whose storages are shared by ranks: both readers read and merge the same, and refuse the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt.errors import CorruptCheckpointError
from fastckpt.format.directory import FileEntry
from fastckpt.format.tensor_names import to_json
from fastckpt.options import Options
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.contents import OfContainer
from fastckpt.reading.merged_reader import merge
from fastckpt.reading.object_source import BytesSource
from fastckpt.reading.sources import PathSource, Source
from fastckpt.reading.tensor_reader import TensorReader
from tests.golden import make_shares, repository_decoder
from tests.golden.make_goldens import sha256

ROOT = make_shares.ROOT
EXPECTED: dict[str, dict[str, Any]] = json.loads((ROOT / "expected.json").read_text(encoding="utf-8"))


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_they_are_what_the_script_makes(tmp_path: Path) -> None:
    make_shares.write(tmp_path / "shares")
    assert files_below(tmp_path / "shares") == files_below(ROOT)


def opened(folder: Path) -> dict[int, Reader]:
    def pack(file: FileEntry) -> Source:
        return PathSource(str(folder / file.key))

    found = {}
    for path in sorted(folder.glob("*.vote")):
        reader = Reader.open_vote(BytesSource(path.read_bytes(), path.name), pack)
        found[reader.directory.rank] = reader
    return found


def decoded(folder: Path, rank: int) -> dict[tuple[Any, ...], Any]:
    def of(rank: int) -> repository_decoder.Vote:
        return repository_decoder.open_vote(folder, (folder / f"r{rank}.vote").read_bytes())

    return repository_decoder.tensors_of(of(rank), of)


@pytest.mark.parametrize("case", sorted(EXPECTED["must_read"]))
def test_they_are_read(case: str) -> None:
    votes = opened(ROOT / "must_read" / case)
    ranks = EXPECTED["must_read"][case]["ranks"]
    assert len(votes) == len(ranks)
    for rank, tensors in enumerate(ranks):
        reader = merge(votes[rank], votes)
        assert not any(storage.shares for storage in reader.directory.storages)
        with TensorReader(OfContainer(reader, Options())) as found:
            names = {json.dumps(to_json(entry.name)): entry.name for entry in reader.directory.tensors}
            contents = {text: found[name] for text, name in names.items()}
        digests = {text: sha256(v.contiguous().view(torch.uint8).numpy().tobytes()) for text, v in contents.items()}
        assert digests == tensors


@pytest.mark.parametrize("case", sorted(EXPECTED["must_read"]))
def test_the_reference_decoder_reads_them(case: str) -> None:
    for rank, tensors in enumerate(EXPECTED["must_read"][case]["ranks"]):
        arrays = decoded(ROOT / "must_read" / case, rank)
        found = {json.dumps(name): sha256(np.ascontiguousarray(array).tobytes()) for name, array in arrays.items()}
        assert found == tensors


@pytest.mark.parametrize("case", sorted(EXPECTED["must_reject"]))
def test_broken_votes_are_refused(case: str) -> None:
    data, part = (ROOT / "must_reject" / f"{case}.vote").read_bytes(), EXPECTED["must_reject"][case]["part"]
    with pytest.raises(CorruptCheckpointError) as caught:
        Reader.open_vote(BytesSource(data, case), lambda file: BytesSource(bytes(file.n_bytes), file.key))
    assert {damage.part for damage in caught.value.damage} == {part}


@pytest.mark.parametrize("case", sorted(EXPECTED["must_reject"]))
def test_the_reference_decoder_refuses_broken_votes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = make_shares.PACK.format(rank=0)
    of_case = make_shares.broken()[case][2]
    monkeypatch.setattr(Path, "read_bytes", lambda path: bytes(of_case.pack) if str(path).endswith(pack) else b"")
    with pytest.raises(repository_decoder.FormatError) as caught:
        repository_decoder.open_vote(Path("nowhere"), of_case.build())
    assert caught.value.part == EXPECTED["must_reject"][case]["part"]


@pytest.mark.parametrize("case", sorted(EXPECTED["must_not_merge"]))
def test_votes_that_do_not_fit_are_not_merged(case: str) -> None:
    folder = ROOT / "must_not_merge" / case
    votes = opened(folder)
    with pytest.raises(CorruptCheckpointError) as caught:
        merge(votes[0], votes)
    (damage,) = caught.value.damage
    assert damage.tensors == ("w",)
    assert "r0.vote" in damage.expected
    assert "r1.vote" in damage.found
    with pytest.raises(repository_decoder.FormatError, match="rank 1"):
        decoded(folder, 0)
