"""Tensors made of tensors that lie about each other: indices outside of a shape, offsets outside of values, scales too few.

Real files with every checksum right. torch makes such tensors without a word when it unpickles them, and its kernels then read and write
where they are told to.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nested._internal.nested_tensor import NestedTensor, _rebuild_njt  # also lets restricted loads make them

import fastckpt
from fastckpt.errors import CheckpointError, CorruptCheckpointError
from fastckpt.state import invariants
from tests.faults.tools import Parts, container_of, outcome

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns about prototypes: sparse CSR, quantization, nested

Make = Callable[[], Any]


def coo(indices: list[list[int]], size: int = 3, coalesced: bool = False) -> torch.Tensor:
    parts = (torch.tensor(indices), torch.ones(len(indices[0])), torch.Size((size,)), coalesced)
    return torch._utils._rebuild_sparse_tensor(torch.sparse_coo, parts)


def compressed(layout: torch.layout, ends: list[int], plain: list[int], *block: int) -> torch.Tensor:
    size = (2 * block[0], 2 * block[1]) if block else (2, 2)
    parts = (torch.tensor(ends), torch.tensor(plain), torch.ones(len(plain), *block), torch.Size(size))
    return torch._utils._rebuild_sparse_tensor(layout, parts)


def jagged(offsets: list[int], lengths: list[int] | None = None, longest: int | None = None) -> torch.Tensor:
    return _rebuild_njt(
        {
            "values": torch.ones(4),
            "offsets": torch.tensor(offsets),
            "lengths": None if lengths is None else torch.tensor(lengths),
            "_ragged_idx": 1,
            "_metadata_cache": None if longest is None else {"max_seqlen": torch.empty(longest, 0)},
        }
    )


def per_channel(scales: int, axis: int) -> torch.Tensor:
    # The constructor checks the number of scales by the axis; set_ makes the tensor longer afterwards.
    zeros = torch.zeros(scales, dtype=torch.long)
    made = torch._empty_per_channel_affine_quantized(
        (scales, 2), scales=torch.ones(scales), zero_points=zeros, axis=axis, dtype=torch.qint8
    )
    return made.set_(torch.zeros(8, dtype=torch.int8).untyped_storage(), 0, (4, 2), (2, 1))


def parameter_with(grad: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.hidden = grad  # type: ignore[attr-defined]
    return parameter


def ordered_with(value: torch.Tensor) -> OrderedDict[str, int]:
    made = OrderedDict(a=1)
    made.hidden = value  # type: ignore[attr-defined]
    return made


LIES: dict[str, Make] = {
    "coo above": lambda: coo([[0, 3]]),
    "coo far above": lambda: coo([[0, 1 << 40]]),
    "coo below": lambda: coo([[0, -1]]),
    "coo says coalesced": lambda: coo([[1, 1]], coalesced=True),
    "coo of old": lambda: torch.sparse.FloatTensor(torch.tensor([[0, 9]]), torch.ones(2), torch.Size((3,))),  # type: ignore[attr-defined]
    "csr plain": lambda: compressed(torch.sparse_csr, [0, 1, 2], [0, 5]),
    "csr ends": lambda: compressed(torch.sparse_csr, [0, 1, 9], [0, 1]),
    "csr goes back": lambda: compressed(torch.sparse_csr, [0, 5, 2], [0, 1]),
    "csc plain": lambda: compressed(torch.sparse_csc, [0, 1, 2], [0, 5]),
    "bsr plain": lambda: compressed(torch.sparse_bsr, [0, 1, 2], [0, 5], 2, 2),
    "bsc plain": lambda: compressed(torch.sparse_bsc, [0, 1, 2], [0, -5], 2, 2),
    "jagged above": lambda: jagged([0, 99]),
    "jagged below": lambda: jagged([-9, 4]),
    "jagged goes back": lambda: jagged([0, 3, 1]),
    "jagged lengths": lambda: jagged([0, 2, 4], [1, 9]),
    "jagged longest": lambda: jagged([0, 3, 4], longest=1),
    "hidden in an attribute": lambda: parameter_with(coo([[0, 3]])),
    "hidden in a dictionary": lambda: ordered_with(coo([[0, 3]])),
    "hidden in a list": lambda: [[({"x": [coo([[0, 3]])]},)]],
    "hidden in a set": lambda: {coo([[0, 3]])},
    "hidden in a key": lambda: {coo([[0, 3]]): 1},
}
TRUTHS: dict[str, Make] = {
    "coo": lambda: coo([[0, 2]]),
    "coo not coalesced": lambda: coo([[1, 1]]),
    "coo empty": lambda: torch.sparse_coo_tensor(size=(3, 4)),
    "coo hybrid": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2, 3), (4, 3)),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csr batch": lambda: torch.stack([torch.eye(4)] * 2).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged),
    "jagged with bounds": lambda: torch.nested.nested_tensor_from_jagged(
        torch.ones(4, 2), torch.tensor([0, 1, 4]), min_seqlen=1, max_seqlen=3
    ),
    "jagged with holes": lambda: torch.nested.nested_tensor_from_jagged(
        torch.ones(9, 2), torch.tensor([0, 3, 9]), torch.tensor([1, 4])
    ),
    "per channel": lambda: torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), 0, torch.qint8
    ),
    "per tensor": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_restricted_load_refuses_it(kind: str) -> None:
    data = container_of({"honest": torch.ones(3), "lie": LIES[kind]()})
    with pytest.raises(CorruptCheckpointError, match="'lie") as raised:
        fastckpt.load(io.BytesIO(data))
    assert "weights_only=False" in str(raised.value)


@pytest.mark.parametrize("kind", LIES)
def test_who_runs_the_files_code_gets_what_it_makes(kind: str) -> None:
    """As with torch: the check costs a look at all indices, and such a file could do worse."""
    data = container_of({"lie": LIES[kind]()})
    assert "lie" in fastckpt.load(io.BytesIO(data), weights_only=False)


def test_who_has_torch_check_everything_has_it_checked() -> None:
    data = container_of({"lie": coo([[0, 3]])})
    with torch.sparse.check_sparse_tensor_invariants(), pytest.raises(CorruptCheckpointError, match="'lie'"):
        fastckpt.load(io.BytesIO(data), weights_only=False)


@pytest.mark.parametrize("kind", TRUTHS)
def test_what_fits_together_is_loaded(kind: str) -> None:
    made = TRUTHS[kind]()
    loaded = fastckpt.load(io.BytesIO(container_of({"x": made})))["x"]
    assert (loaded.layout, loaded.is_nested, loaded.is_quantized) == (made.layout, made.is_nested, made.is_quantized)


def test_all_of_them_are_named_at_once() -> None:
    data = container_of(
        {"a": coo([[0, 3]]), "b": [jagged([0, 99])], 3: compressed(torch.sparse_csr, [0, 1, 2], [0, 5])}
    )
    with pytest.raises(CorruptCheckpointError) as raised:
        fastckpt.load(io.BytesIO(data))
    found = [item.place for item in raised.value.damage]
    assert sorted(found) == ["jagged tensor 'b.0'", "sparse_coo tensor 'a'", "sparse_csr tensor '3'"]


def test_no_data_is_no_danger() -> None:
    """On the meta device nothing can be read outside of anything, nor can indices be looked at."""
    data = container_of({"x": coo([[0, 2]]), "y": jagged([0, 2, 4])})
    assert fastckpt.load(io.BytesIO(data), map_location="meta")["x"].device.type == "meta"
    assert fastckpt.load(io.BytesIO(container_of({"x": coo([[0, 9]])})), map_location="meta")["x"].is_meta


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["coo above", "csr plain", "jagged above", "hidden in a set"])
def test_files_of_torch_are_held_to_the_same(kind: str, zipped: bool, tmp_path: Path) -> None:
    torch.save({"lie": LIES[kind]()}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    error = outcome(fastckpt.load, tmp_path / "x.pt")
    assert isinstance(error, (CorruptCheckpointError, RuntimeError))  # torch's own word from 2.14 on
    assert "lie" in fastckpt.load(tmp_path / "x.pt", weights_only=False)


@pytest.mark.parametrize("kind", ["nested", "csr", "per channel"])
def test_honest_files_of_torch_are_loaded(kind: str, tmp_path: Path) -> None:
    torch.save({"x": TRUTHS[kind]()}, tmp_path / "x.pt")
    assert "x" in fastckpt.load(tmp_path / "x.pt")


def test_a_checkpointer_refuses_it(tmp_path: Path) -> None:
    state = {"a": {"w": torch.ones(3)}, "extra": {"lie": coo([[0, 3]])}}
    with fastckpt.Checkpointer(tmp_path, state, spot=None, every=None) as ckpt:
        ckpt.save_now(1)
    with (
        fastckpt.Checkpointer(tmp_path, {"a": {}, "extra": {}}, spot=None, every=None) as ckpt,
        pytest.raises(CheckpointError, match=r"extra\.lie"),
    ):
        ckpt.restore()


def test_indices_are_not_copied_into_a_tensor_that_they_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.fckpt"
    fastckpt.save({"s": coo([[0, 9]], 10), "w": torch.zeros(3)}, path)
    state = {"s": coo([[0, 2]], 3), "w": torch.ones(3)}
    with fastckpt.open(path) as reader, pytest.raises(CorruptCheckpointError, match="sparse_coo"):
        reader.load_into(state)
    assert state["s"]._indices().tolist() == [[0, 2]]
    assert state["w"].tolist() == [1, 1, 1], "something was copied"


def test_offsets_are_not_copied_into_a_tensor_that_they_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "x.fckpt"
    fastckpt.save({"j": jagged([0, 1, 99])}, path)
    state = {"j": jagged([0, 1, 4])}
    with fastckpt.open(path) as reader, pytest.raises(CorruptCheckpointError, match="jagged"):
        reader.load_into(state)
    assert state["j"].offsets().tolist() == [0, 1, 4]


def test_a_quantized_tensor_has_a_scale_for_each_channel() -> None:
    """torch 2.13 looks at this when it unpickles one; an axis outside of the shape passes before that."""
    for made in (per_channel(2, 0), per_channel(2, 5)):
        assert [item.kind for item in invariants.misfits({"q": made})] == ["tensor quantized per channel"]


def test_a_nested_tensor_lies_within_its_buffer() -> None:
    """torch 2.13 looks at this when it makes one; 2.6 does not."""
    places = ([[9]], [[1]], [0]), ([[4]], [[1]], [1000]), ([[4]], [[9]], [0]), ([[2], [2]], [[1], [1]], [-100, 0])
    for place in places:
        size, stride, offset = map(torch.tensor, place)
        try:
            made = torch._nested_view_from_buffer(torch.ones(4), size, stride, offset)
        except RuntimeError:
            continue
        assert [item.kind for item in invariants.misfits({"n": made})] == ["nested tensor"], place


def test_a_jagged_tensor_made_without_its_constructor() -> None:
    empty = torch._utils._rebuild_wrapper_subclass(
        NestedTensor, torch.float32, (1,), (1,), 0, torch.strided, "cpu", False
    )
    empty._values, empty._offsets, empty._lengths, empty._ragged_idx = torch.ones(3), torch.tensor([0, 999]), None, 1
    assert [item.kind for item in invariants.misfits([empty])] == ["jagged tensor"]


def test_a_sparse_gradient_is_looked_at() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = coo([[0, 3]])
    assert [item.name for item in invariants.misfits({"p": parameter})] == ["p.grad"]


def test_a_storage_that_is_not_on_the_host_does_not_grow() -> None:
    """There torch makes a storage longer for a tensor that ends outside of it, out of memory that was somebody's."""
    parts = Parts.of(container_of({"x": torch.arange(40)}))
    for location in (None, "meta"):
        assert fastckpt.load(io.BytesIO(parts.build()), location)["x"].shape == (40,)
    size = b"K\x28\x85"
    assert parts.skeleton.count(size) == 1
    parts.skeleton = parts.skeleton.replace(size, b"K\xc8\x85")
    for location in (None, "meta"):
        with pytest.raises(CorruptCheckpointError, match=r"within|storage"):
            fastckpt.load(io.BytesIO(parts.build()), location)


def test_plain_states_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "misfits", lambda obj: pytest.fail("searched"))
    fastckpt.load(io.BytesIO(container_of({"a": torch.ones(3), "b": [torch.nn.Parameter(torch.ones(2))]})))
