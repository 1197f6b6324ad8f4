"""fastckpt reads and rejects the golden files, and the reference decoder reads what fastckpt writes."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt import errors
from fastckpt.format.tensor_names import ReprKey, from_json
from tests.golden import reference_decoder
from tests.golden.test_reference import compare
from tests.support.readers import index_of

HERE = Path(__file__).resolve().parent
MUST_READ: dict[str, Any] = json.loads((HERE / "must_read/expected.json").read_text(encoding="utf-8"))
MUST_REJECT: dict[str, Any] = json.loads((HERE / "must_reject/expected.json").read_text(encoding="utf-8"))
ARRAY_GLOBALS = [
    np.ndarray,
    np.dtype,
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    *{type(np.dtype(code)) for code in "bBhHiIqQefdFD?"},
]
CLASSES = {
    "corrupt": errors.CorruptCheckpointError,
    "unsupported": errors.UnsupportedFormatError,
    "not_a_checkpoint": errors.NotACheckpointError,
    "empty": errors.EmptyCheckpointError,
    "too_large": errors.TooLargeError,
}


def memory_of(value: Any) -> bytes:
    """The elements in row-major order, as memory holds them."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    plain = value.detach()
    if plain.is_conj():
        plain = plain.conj()
    flat = torch.empty(plain.numel(), dtype=plain.dtype).copy_(plain.flatten())
    return flat.view(torch.uint8).numpy().tobytes()


def opener(kind: str, path: Path) -> Any:
    return path if kind == "path" else io.BytesIO(path.read_bytes())


@pytest.mark.parametrize("file", sorted(MUST_READ))
@pytest.mark.parametrize("kind", ["path", "file object"])
def test_load(file: str, kind: str) -> None:
    expected = MUST_READ[file]
    source = opener(kind, HERE / "must_read" / file)
    if expected["load"] == {"absent": True}:
        with pytest.raises(errors.CheckpointError, match=r"fastckpt\.open"):
            fastckpt.load(source)
        return
    with torch.serialization.safe_globals(ARRAY_GLOBALS):
        found = fastckpt.load(source, map_location=expected.get("map_location"))
    compare(found, expected["load"], expected["tensors"])


@pytest.mark.parametrize("file", sorted(MUST_READ))
@pytest.mark.parametrize("kind", ["path", "file object"])
def test_fetch_by_name(file: str, kind: str) -> None:
    expected = MUST_READ[file]["tensors"]
    with fastckpt.open(opener(kind, HERE / "must_read" / file)) as reader:
        assert len(index_of(reader).directory.tensors) == len(expected)
        for text, tensor in expected.items():
            name = from_json(json.loads(text))
            entry = reader.entry(name)
            assert (entry.dtype, list(entry.shape), entry.kind, entry.requires_grad, entry.storage) == tuple(
                tensor[member] for member in ("dtype", "shape", "kind", "requires_grad", "storage")
            )
            if tensor["kind"] == "quantized":
                with pytest.raises(errors.UnsupportedFormatError, match="quantized"):
                    reader[name]
                continue
            value = reader[name]
            assert list(value.shape) == tensor["shape"]
            if isinstance(value, torch.Tensor) and value.is_meta:
                assert tensor["sha256"] is None
                continue
            dtype = f"numpy:{value.dtype.str}" if isinstance(value, np.ndarray) else str(value.dtype)[6:]
            assert dtype == tensor["dtype"]
            assert tensor["sha256"] in (None, hashlib.sha256(memory_of(value)).hexdigest())


@pytest.mark.parametrize("file", sorted(MUST_READ))
def test_storages_are_shared_as_described(file: str) -> None:
    """Tensors of one storage share memory after a load, those of two never do."""
    expected = MUST_READ[file]
    names = [text for text, tensor in expected["tensors"].items() if tensor["sha256"] and tensor["kind"] != "array"]
    if not isinstance(expected["load"], dict) or "dict" not in expected["load"] or len(names) < 2:
        return
    with torch.serialization.safe_globals(ARRAY_GLOBALS):
        found = fastckpt.load(HERE / "must_read" / file, map_location=expected.get("map_location"))
    pointers: dict[int, int] = {}
    for text in names:
        keys = json.loads(text)
        if (
            len(keys) != 1
            or isinstance(keys[0], dict)
            or keys[0] not in found
            or not isinstance(found[keys[0]], torch.Tensor)
        ):
            continue
        if found[keys[0]].is_sparse or not found[keys[0]].untyped_storage().nbytes():
            continue
        number = expected["tensors"][text]["storage"]
        pointer = found[keys[0]].untyped_storage().data_ptr()
        assert pointers.setdefault(number, pointer) == pointer
    assert len(set(pointers.values())) == len(pointers)


def refuse(call: Callable[[], Any], expected: dict[str, Any]) -> None:
    kinds = [expected["kind"], *expected.get("also_kind", ())]
    if expected.get("proposed"):  # format.md has since decided for one of the two
        kinds += ["corrupt", "unsupported"]
    with pytest.raises(tuple(CLASSES[kind] for kind in kinds)) as caught:
        call()
    error = caught.value
    if isinstance(error, errors.CorruptCheckpointError):
        assert {item.part for item in error.damage} & {expected["part"], *expected.get("also_part", ())}, error
        assert all(item.place for item in error.damage)


def fetch_all(source: Any) -> None:
    with fastckpt.open(source) as reader:
        for entry in index_of(reader).directory.tensors:
            reader[entry.name]


@pytest.mark.parametrize("file", sorted(MUST_REJECT))
@pytest.mark.parametrize("kind", ["path", "file object"])
def test_load_refuses(file: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = MUST_REJECT[file]
    if file == "two_containers.fckpt" and kind == "file object":  # a stream may hold several
        with torch.serialization.safe_globals(ARRAY_GLOBALS):
            stream = opener(kind, HERE / "must_reject" / file)
            fastckpt.load(stream)
            fastckpt.load(stream)
        return
    if file == "other_format.fckpt":  # a zip archive by its first bytes: torch's, and torch refuses it
        with pytest.raises(RuntimeError):
            fastckpt.load(opener(kind, HERE / "must_reject" / file))
        return
    if file == "container_length_wrong.fckpt" and kind == "file object":
        expected = {**expected, "also_part": ["header", "directory"]}
    if file in ("skeleton_not_a_pickle.fckpt", "skeleton_truncated.fckpt"):
        # The digest is right, so this is what the writer pickled: torch's own words say what its unpickler refuses.
        with torch.serialization.safe_globals(ARRAY_GLOBALS), pytest.raises(pickle.UnpicklingError):
            fastckpt.load(opener(kind, HERE / "must_reject" / file))
        return
    monkeypatch.setenv("FASTCKPT_MAX_LOAD_BYTES", str(64 << 20))
    with torch.serialization.safe_globals(ARRAY_GLOBALS):
        refuse(lambda: fastckpt.load(opener(kind, HERE / "must_reject" / file)), expected)


@pytest.mark.parametrize(
    "file",
    sorted(file for file, entry in MUST_REJECT.items() if not (entry.get("loader_only") or entry.get("needs_limit"))),
)
def test_fetching_refuses(file: str) -> None:
    refuse(lambda: fetch_all(HERE / "must_reject" / file), MUST_REJECT[file])


@pytest.mark.parametrize("file", sorted(file for file, entry in MUST_REJECT.items() if entry.get("needs_limit")))
def test_fetching_refuses_more_than_the_limit(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_MAX_LOAD_BYTES", str(64 << 20))
    refuse(lambda: fetch_all(HERE / "must_reject" / file), MUST_REJECT[file])


@pytest.mark.parametrize("file", sorted(file for file, entry in MUST_REJECT.items() if entry.get("loader_only")))
def test_faults_of_the_skeleton_leave_the_tensors_readable(file: str) -> None:
    fetch_all(HERE / "must_reject" / file)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int64, torch.uint8)


def random_state(seed: int) -> dict[Any, Any]:
    """Tensors, views, ties, arrays and constants, some of several chunks."""
    rng = np.random.default_rng(seed)

    def tensor() -> torch.Tensor:
        dtype = DTYPES[rng.integers(len(DTYPES))]
        shape = tuple(int(n) for n in rng.integers(0, 40, size=rng.integers(0, 4)))
        if rng.random() < 0.1:
            shape = (int(rng.integers(1, 1_500_000)),)
        data = torch.from_numpy(rng.standard_normal(shape)).to(torch.float64)
        if rng.random() < 0.2:
            data = torch.full_like(data, float(rng.integers(4)))
        return (data * 50).abs().to(dtype)

    state: dict[Any, Any] = {f"t{i}": tensor() for i in range(rng.integers(1, 12))}
    first = state["t0"]
    state |= {0: first, "view": first.reshape(-1)[::2], "nested": [{"x": tensor()}, (tensor(), 3, None)]}
    state["optimizer"] = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": tensor()}}}
    state["array"] = rng.standard_normal((150, 150)).astype("f8" if seed % 2 else "i4", order="F" if seed % 3 else "C")
    state[(1, "tuple")] = torch.nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(seed)))
    state["\ud800"] = torch.arange(4)
    return state


def leaves(value: Any, name: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for at, inner in items for key, leaf in leaves(inner, (*name, at)).items()}
    return {name: value} if isinstance(value, (torch.Tensor, np.ndarray)) else {}


@pytest.mark.parametrize("seed", range(20))
def test_reference_decoder_reads_what_save_writes(seed: int) -> None:
    print(f"{seed=}")
    state = random_state(seed)
    out = io.BytesIO()
    fastckpt.save(state, out)
    container = reference_decoder.read(out.getvalue())
    expected = {}
    for name, value in leaves(state).items():
        keys = tuple(
            reference_decoder.Repr(repr(key)) if isinstance(key, tuple) or key == "\ud800" else key for key in name
        )
        expected[keys] = value
    described = [entry["name"] for entry in container.directory["tensors"]]
    assert len(described) == len(expected)
    for keys, value in expected.items():
        assert container.tensors[keys].tobytes() == memory_of(value), (seed, keys)
        assert container.tensors[keys].shape == tuple(value.shape)
    with fastckpt.open(io.BytesIO(out.getvalue())) as reader:
        for keys, value in expected.items():
            ours = tuple(ReprKey(key.text) if isinstance(key, reference_decoder.Repr) else key for key in keys)
            assert memory_of(reader[ours]) == memory_of(value)
