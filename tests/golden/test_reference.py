"""The reference decoder reads and rejects the golden files, and torch reads their skeletons; without fastckpt."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.golden import make_goldens, reference_decoder
from tests.golden.reference_decoder import Container, FormatError, Repr, UnsupportedError

HERE = Path(__file__).resolve().parent


def expectations(group: str) -> dict[str, Any]:
    found = json.loads((HERE / group / "expected.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


MOST_DIMENSIONS = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
MUST_READ = expectations("must_read")
MUST_REJECT = expectations("must_reject")


def name_of(keys: str) -> tuple[Any, ...]:
    return tuple(Repr(key["repr"]) if isinstance(key, dict) else key for key in json.loads(keys))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("group", ["must_read", "must_reject"])
def test_every_file_has_an_expectation(group: str) -> None:
    assert {path.name for path in (HERE / group).iterdir()} == {"expected.json", *expectations(group)}


@pytest.mark.parametrize("file", sorted(MUST_READ))
@pytest.mark.parametrize("verify_crc", [True, False])
def test_must_read(file: str, verify_crc: bool) -> None:
    expected = copy.deepcopy(MUST_READ[file])
    container = reference_decoder.read(HERE / "must_read" / file, verify_crc=verify_crc)
    found = [None if data is None else {"bytes": len(data), "sha256": sha256(data)} for data in container.storages]
    assert found == expected["storages"]
    described = {json.dumps(entry["name"], ensure_ascii=False): entry for entry in container.directory["tensors"]}
    assert described.keys() == expected["tensors"].keys()
    digests = {}
    for keys, tensor in expected["tensors"].items():
        digest = tensor.pop("sha256")
        assert described[keys].items() >= tensor.items()
        if digest is not None and len(tensor["shape"]) <= MOST_DIMENSIONS:
            digests[name_of(keys)] = digest
            assert list(container.tensors[name_of(keys)].shape) == tensor["shape"]
    assert {name: sha256(array.tobytes()) for name, array in container.tensors.items()} == digests


@pytest.mark.parametrize("file", sorted(file for file, entry in MUST_REJECT.items() if not entry.get("loader_only")))
def test_must_reject(file: str) -> None:
    expected = MUST_REJECT[file]
    with pytest.raises(FormatError) as caught:
        reference_decoder.read(HERE / "must_reject" / file)
    assert isinstance(caught.value, UnsupportedError) == (expected["kind"] == "unsupported"), caught.value
    assert caught.value.part == expected["part"], caught.value


@pytest.mark.parametrize("file", sorted(file for file, entry in MUST_REJECT.items() if entry.get("loader_only")))
def test_loader_only_faults_are_in_the_skeleton_alone(file: str) -> None:
    reference_decoder.read(HERE / "must_reject" / file)


@pytest.mark.parametrize("file", sorted(file for file, entry in MUST_REJECT.items() if entry.get("needs_limit")))
def test_claims_are_within_bounds_but_for_the_limit(file: str) -> None:
    claimed = MUST_REJECT[file]["claimed"]
    with pytest.raises(FormatError, match=str(1 << 32)):
        reference_decoder.read(HERE / "must_reject" / file)
    assert claimed > 1 << 32


def test_every_bit_is_covered() -> None:
    """No single flipped bit of a container goes unnoticed."""
    pytest.importorskip("xxhash")
    good = (HERE / "must_read" / "raw_int64.fckpt").read_bytes()
    for at in range(len(good)):
        for mask in (1 << at % 8, 0xFF):
            bad = good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :]
            with pytest.raises(FormatError):
                reference_decoder.read(bad)


def test_every_cut_is_noticed() -> None:
    good = (HERE / "must_read" / "rot_one_lane.fckpt").read_bytes()
    for end in range(len(good)):
        with pytest.raises(FormatError):
            reference_decoder.read(good[:end])


@pytest.mark.parametrize("length", [0, 1, 9, 1023, 1024, 1025, 5000])
def test_crc_of_blocks_equals_crc_of_bytes(length: int) -> None:
    data = bytes(i * i % 251 for i in range(length))
    assert reference_decoder.crc64nvme(data) == make_goldens.crc(data)


def test_crc_check_value() -> None:
    assert reference_decoder.crc64nvme(b"123456789") == 0xAE8B14860A799888
    assert reference_decoder.crc64nvme(b"") == 0


def test_rot_stream_is_that_of_the_text() -> None:
    """The goldens' plain-Python stream equals the one that format.md spells in NumPy."""

    def rot_stream(raw: bytes, w: int) -> bytes:
        x = np.frombuffer(raw, f"<u{w}")
        y = (x << 1) | (x >> (8 * w - 1))
        stripes = (y[i : i + 131072] for i in range(0, y.size, 131072))
        return b"".join(s.view("u1").reshape(-1, w)[:, k].tobytes() for s in stripes for k in reversed(range(w)))

    raw = bytes(i * 31 % 256 for i in range(131072 * 2 + 16))
    for w in (2, 4, 8):
        assert make_goldens.rot_stream(raw, w) == rot_stream(raw, w)


def test_goldens_are_what_the_script_makes(tmp_path: Path) -> None:
    """Files whose frames the zstd library makes are left out: another version may make others."""
    make_goldens.write(tmp_path)
    library = ("rot_", "multi_chunk", "numpy_array", "frame_with_checksum")
    changed = make_goldens.differences(HERE, tmp_path)
    assert [name for name in changed if not Path(name).name.startswith(library)] == []


def compare(found: Any, expected: Any, entries: dict[str, Any]) -> None:
    """Compare an object with the description of it that expected.json gives under `load`."""
    import torch

    if isinstance(expected, dict):
        ((kind, content),) = [item for item in expected.items() if item[0] != "conj"]
        if kind in ("tensor", "parameter", "array"):
            types = {"tensor": torch.Tensor, "parameter": torch.nn.Parameter, "array": np.ndarray}
            assert type(found) is types[kind]
            compare_tensor(found, entries[json.dumps(content, ensure_ascii=False)], expected.get("conj", False))
        elif kind == "sparse_coo":
            assert list(found.shape) == content["shape"]
            compare(found._indices(), {"tensor": content["indices"]}, entries)
            compare(found._values(), {"tensor": content["values"]}, entries)
        else:
            assert type(found).__name__ == kind
            items = [list(item) for item in found.items()] if isinstance(found, dict) else list(found)
            compare(items, content, entries)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for value, other in zip(found, expected, strict=True):
            compare(value, other, entries)
    else:
        assert type(found) is type(expected)
        assert found == expected


def compare_tensor(found: Any, entry: dict[str, Any], conjugate: bool) -> None:
    """Compare a tensor or array with its entry under `tensors`."""
    import torch

    assert list(found.shape) == entry["shape"]
    if isinstance(found, np.ndarray):
        assert f"numpy:{found.dtype.str}" == entry["dtype"]
        assert sha256(found.tobytes()) == entry["sha256"]
        return
    assert (str(found.dtype), found.requires_grad) == (f"torch.{entry['dtype']}", entry["requires_grad"])
    assert found.is_conj() == conjugate
    assert found.is_meta == (entry["sha256"] is None)
    if not found.is_meta:
        memory = found.detach().conj() if conjugate else found.detach()
        content = memory.contiguous().flatten().view(torch.uint8).numpy().tobytes() if found.numel() else b""
        assert sha256(content) == entry["sha256"]


def storages_of(container: Container) -> Any:
    """A function that gives torch's unpickler what a persistent id of §7 stands for."""
    torch: Any = pytest.importorskip("torch")
    made: dict[str, Any] = {}

    def persistent_load(persistent_id: tuple[Any, ...]) -> Any:
        tag, kind, key, location, elements, *of_array = persistent_id
        described, data = container.directory["storages"][int(key)], container.storages[int(key)]
        assert (tag, location) == ("storage", described["location"])
        if of_array:
            marker, dtype, shape, order = of_array
            assert marker == "ndarray"
            assert data is not None
            return np.ndarray(shape, dtype, data, order=order)
        if key not in made:
            untyped = torch.UntypedStorage(described["bytes"], device="cpu" if data is not None else "meta")
            if data:
                memory = torch.empty(0, dtype=torch.uint8).set_(untyped)
                memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            assert elements * dtype.itemsize == described["bytes"]
            made[key] = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return made[key]

    return persistent_load


@pytest.mark.parametrize("file", sorted(MUST_READ))
def test_torch_reads_the_skeleton(file: str) -> None:
    """torch's restricted unpickler makes the described object of the skeleton and the reference decoder's bytes."""
    pytest.importorskip("torch")
    from torch._weights_only_unpickler import Unpickler

    expected = MUST_READ[file]
    container = reference_decoder.read(HERE / "must_read" / file)
    if expected["load"] == {"absent": True}:
        assert container.skeleton == b""
        return
    unpickler: Any = Unpickler(io.BytesIO(container.skeleton), encoding="utf-8")
    unpickler.persistent_load = storages_of(container)
    compare(unpickler.load(), expected["load"], expected["tensors"])
