"""Cuts cover everything once, keep their limits and depend on nothing but names and sizes."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.format.element_types import ElementType, element_type
from fastckpt.format.tensor_names import ReprKey
from fastckpt.state.chunking import BUNDLE_BYTES, Cuts, Piece, StorageShape, chunk_bytes, cut

TYPES = [
    found
    for name in ("float32", "bfloat16", "uint8", "int64", "complex128", "float64", "bool")
    if (found := element_type(name)) is not None
]
KEYS = st.one_of(st.text(max_size=4), st.integers(-3, 3), st.builds(ReprKey, st.text(max_size=3)))
ELEMENTS = st.one_of(st.integers(0, 300), st.integers(1, 9_000_000), st.sampled_from([1 << 18, (1 << 20) - 1, 1 << 20]))


@st.composite
def storages(draw: st.DrawFn) -> list[StorageShape]:
    result = []
    for number in range(draw(st.integers(0, 25))):
        element: ElementType = draw(st.sampled_from(TYPES))
        name = draw(st.one_of(st.none(), st.lists(KEYS, max_size=3).map(tuple)))
        role = draw(st.sampled_from(["", "exp_avg"]))
        n_bytes = draw(ELEMENTS) * element.n_bytes
        result.append(
            StorageShape(
                number,
                n_bytes,
                element,
                name,
                role,
                draw(st.booleans()),
                draw(st.sampled_from("ab")),
                draw(st.integers(0, 5)),
            )
        )
    return result


def check_limits(cuts: Cuts, shapes: list[StorageShape]) -> None:
    by_number = {shape.number: shape for shape in shapes}
    for chunk in cuts.chunks:
        assert 1 <= chunk.n_bytes <= 4 << 20
        assert chunk.n_bytes % chunk.element.n_bytes == 0
        assert chunk.n_bytes // chunk.element.n_bytes <= 1 << 20
        members = [by_number[piece.storage] for piece in chunk.pieces]
        assert len({(m.element, m.role, m.requires_grad) for m in members}) == 1
        assert members[0].element == chunk.element
        if len(members) > 1:
            assert chunk.n_bytes <= BUNDLE_BYTES
            assert all(m.n_bytes < BUNDLE_BYTES for m in members)


@given(shapes=storages())
@settings(deadline=None, max_examples=100)
def test_every_byte_is_in_one_chunk_and_extents_agree(shapes: list[StorageShape]) -> None:
    cuts = cut(shapes)
    check_limits(cuts, shapes)
    covered: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for chunk in cuts.chunks:
        for piece in chunk.pieces:
            covered[piece.storage].append((piece.offset, piece.n_bytes))
    places = {}  # (record, offset in it) → (storage, offset in it, bytes)
    for record, chunk in enumerate(cuts.chunks):
        at = 0
        for piece in chunk.pieces:
            places[record, at] = piece
            at += piece.n_bytes
    assert cuts.extents.keys() == {shape.number for shape in shapes}
    for shape in shapes:
        position = 0
        for offset, n_bytes in sorted(covered[shape.number]):
            assert offset == position
            position += n_bytes
        assert position == shape.n_bytes
        position = 0
        for extent in cuts.extents[shape.number]:
            record, offset, left = extent
            while left:
                piece = places[record, offset]
                assert (piece.storage, piece.offset) == (shape.number, position)
                position, left = position + piece.n_bytes, left - piece.n_bytes
                record, offset = record + 1, 0
        assert position == shape.n_bytes


@given(shapes=storages(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_the_order_of_the_input_does_not_matter(shapes: list[StorageShape], seed: int) -> None:
    shuffled = shapes[:]
    random.Random(seed).shuffle(shuffled)
    assert cut(shuffled) == cut(shapes)


@given(
    element=st.sampled_from(TYPES),
    rows=st.integers(2, 40),
    row=st.integers(1 << 20, 3 << 20),
    at=st.integers(1, 39),
)
@settings(deadline=None, max_examples=80)
def test_shards_are_cut_where_the_whole_is(element: ElementType, rows: int, row: int, at: int) -> None:
    at = min(at, rows - 1)
    width = element.n_bytes
    step = chunk_bytes(element)

    def ends(first: int, elements: int) -> set[int]:
        cuts = cut([StorageShape(0, elements * width, element, ("w",), first_element=first)])
        return {first * width + piece.offset for chunk in cuts.chunks for piece in chunk.pieces}

    whole, left, right = ends(0, rows * row), ends(0, at * row), ends(at * row, (rows - at) * row)
    assert whole == set(range(0, rows * row * width, step))
    assert left | right == whole | {at * row * width}


@given(
    element=st.sampled_from(TYPES),
    n_elements=st.integers(2 << 20, 9 << 20),
    first=st.integers(0, 3 << 20),
    splits=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True),
)
@settings(deadline=None, max_examples=80)
def test_shares_are_cut_where_the_whole_is(
    element: ElementType, n_elements: int, first: int, splits: list[int]
) -> None:
    width, step = element.n_bytes, chunk_bytes(element)
    n_bytes = n_elements * width

    def pieces(own: tuple[int, int] | None) -> list[tuple[int, int]]:
        cuts = cut([StorageShape(7, n_bytes, element, ("w",), first_element=first, own=own)])
        assert sum(extent.n_bytes for extent in cuts.extents[7]) == (n_bytes if own is None else own[1])
        return [(piece.offset, piece.n_bytes) for chunk in cuts.chunks for piece in chunk.pieces]

    places = {at * step - first * width % step for at in splits}
    inside = sorted(place for place in places if 0 < place < n_bytes)
    borders = [0, *inside, n_bytes]
    parts = [pieces((start, stop - start)) for start, stop in itertools.pairwise(borders)]
    assert list(itertools.chain(*parts)) == pieces(None)


def test_what_others_write_is_not_cut() -> None:
    element = TYPES[0]
    sizes = {0: 400, 1: 400, 2: 8 << 20, 3: 8 << 20, 4: 12}
    own = {0: (0, 0), 2: (0, 0), 4: (8, 4)}
    cuts = cut([StorageShape(n, size, element, (n,), own=own.get(n)) for n, size in sizes.items()])
    assert {piece for chunk in cuts.chunks for piece in chunk.pieces} == {
        Piece(1, 0, 400),
        Piece(3, 0, 4 << 20),
        Piece(3, 4 << 20, 4 << 20),
        Piece(4, 8, 4),
    }
    assert cuts.extents[0] == cuts.extents[2] == ()
    assert sum(extent.n_bytes for extent in cuts.extents[4]) == 4
