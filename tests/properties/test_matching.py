"""Which chunk is which: by names, stretches and types, whatever else of a state has changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.format.directory import Extent, Share, StorageEntry, TensorEntry
from fastckpt.format.element_types import element_type
from fastckpt.format.sealed_state import SealedChunk
from fastckpt.state.chunking import Cuts, StorageShape, cut
from fastckpt.writing.matching import match, pieces_of, roles

MIB = 1 << 20


@dataclass(frozen=True)
class Form:
    """As a sealed state has it, and where it was cut."""

    storages: tuple[StorageEntry, ...]
    tensors: tuple[TensorEntry, ...]
    chunks: tuple[SealedChunk, ...]
    cuts: Cuts


def form_of(sizes: Mapping[str, tuple[str, int]], shares: Mapping[str, tuple[Share, ...]] | None = None) -> Form:
    """A state of named tensors: type and number of elements of each."""
    shapes, tensors = [], []
    for number, (name, (dtype, n)) in enumerate(sizes.items()):
        element = element_type(dtype)
        assert element is not None
        own = None
        if shares and name in shares:
            (first, *rest) = shares[name]
            own = (0, first.n_bytes) if first.rank == 0 else (first.n_bytes, rest[0].n_bytes)
        shapes.append(StorageShape(number, n * element.n_bytes, element, (name,), own=own))
        tensors.append(TensorEntry((name,), dtype, (n,), (1,), 0, number, "tensor", False))
    cuts = cut(shapes)
    storages = tuple(
        StorageEntry(
            shape.element.name,
            shape.n_bytes,
            "cpu",
            cuts.extents[n],
            (shares or {}).get(str(shape.name and shape.name[0]), ()),
        )
        for n, shape in enumerate(shapes)
    )
    return Form(storages, tuple(tensors), tuple(SealedChunk(c.n_bytes, c.element) for c in cuts.chunks), cuts)


def identities(form: Form) -> list[frozenset[tuple[object, ...]]]:
    """Of each chunk, from the cuts themselves: names, types and stretches."""
    names = {entry.storage: entry.name for entry in form.tensors}
    return [
        frozenset((names[p.storage], form.storages[p.storage].dtype, p.offset, p.n_bytes) for p in chunk.pieces)
        for chunk in form.cuts.chunks
    ]


TENSORS = st.dictionaries(
    st.sampled_from([f"t{i}" for i in range(9)]),
    st.tuples(st.sampled_from(["float32", "bfloat16", "uint8"]), st.sampled_from([1, 7, 90_000, 300_000, 1_200_000])),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(TENSORS, TENSORS)
def test_it_finds_what_has_the_same_identity(
    before: dict[str, tuple[str, int]], after: dict[str, tuple[str, int]]
) -> None:
    old, new = form_of(before), form_of({**after, **dict(list(before.items())[:4])})
    theirs = identities(old)
    expected = [theirs.index(one) if one in theirs else -1 for one in identities(new)]
    assert match(old, new).tolist() == expected
    assert match(old, form_of(before)).tolist() == list(range(len(old.chunks)))


@settings(max_examples=80, deadline=None)
@given(TENSORS)
def test_pieces_are_those_of_the_cuts(sizes: dict[str, tuple[str, int]]) -> None:
    form = form_of(sizes)
    found = list(zip(*(column.tolist() for column in pieces_of(form)), strict=True))
    expected = []
    for number, chunk in enumerate(form.cuts.chunks):
        offset = 0
        for piece in chunk.pieces:
            expected.append((number, piece.storage, piece.offset, piece.n_bytes, offset))
            offset += piece.n_bytes
    assert found == expected


def test_shares_are_stretches_of_the_whole() -> None:
    sizes = {"w": ("float32", 3 * MIB), "x": ("float32", 5)}
    shares = {"w": (Share(0, 4 * MIB), Share(1, 8 * MIB))}
    mine, theirs = form_of(sizes, shares), form_of({"y": ("float32", 6), **sizes}, shares)
    assert match(mine, theirs, rank=0).tolist() == [0, -1]
    other = form_of({"y": ("float32", 6), **sizes}, {"w": (Share(0, 8 * MIB), Share(1, 4 * MIB))})
    assert match(mine, other, rank=0).tolist()[:2] == [0, -1], "the second chunk was another rank's"


def test_names_of_two_storages_and_no_names_are_no_identity() -> None:
    form = form_of({"a": ("float32", 300_000), "b": ("float32", 400_000), "c": ("float32", 500_000)})
    a, b, c = form.tensors
    odd = Form(form.storages, (a, b._replace(name=a.name)), form.chunks, form.cuts)
    assert match(odd, Form(form.storages, (a, b, c), form.chunks, form.cuts)).tolist() == [-1, -1, -1]
    assert match(odd, odd).tolist() == [0, 1, 2], "equal forms need no names"


def test_roles_are_the_keys_of_optimizers() -> None:
    form = form_of({"w": ("float32", 300_000), "m": ("float32", 400_000)})
    w, m = form.tensors
    named = Form(form.storages, (w, m._replace(name=("optim", "state", 0, "exp_avg"))), form.chunks, form.cuts)
    assert sorted(roles(named)) == ["", "state exp_avg"]
    assert roles(form_of({"w": ("float32", 5 * MIB), "v": ("float32", 3)})) == ["", *["storage 0"] * 5]


def test_many_chunks_take_little_time() -> None:
    """A loop that is quadratic would take minutes."""
    element = element_type("float32")
    assert element is not None
    n = 10_000
    forms = []
    for names in ("w", "v"):
        storages = tuple(StorageEntry("float32", 8 * MIB, "cpu", (Extent(2 * i, 0, 8 * MIB),)) for i in range(n))
        tensors = tuple(
            TensorEntry((names if i < 9 else "w", str(i)), "float32", (1,), (1,), 0, i, "tensor", False)
            for i in range(n)
        )
        forms.append(Form(storages, tensors, (SealedChunk(4 * MIB, element),) * (2 * n), Cuts([], {})))
    found = match(*forms)
    assert np.count_nonzero(found < 0) == 18
