"""What votes say together of tensors. The fast look at a directory says "nothing to enter" only where entering it changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.errors import CorruptCheckpointError
from fastckpt.format import directory
from fastckpt.format.directory import Directory, GlobalPlace, StorageEntry, TensorEntry
from fastckpt.format.directory_reader import parse
from fastckpt.format.tensor_names import BOX
from fastckpt.format.wholes import Wholes, touches

N_BYTES = 1 << 20


def row(
    name: tuple[Any, ...],
    at: tuple[int, ...] | None,
    shape: tuple[int, ...],
    whole: tuple[int, ...],
    dtype: str = "float32",
) -> TensorEntry:
    stride = tuple(1 for _ in shape)
    place = None if at is None else GlobalPlace(whole, at)
    return TensorEntry(name, dtype, shape, stride, 0, 0, "tensor", False, place)


def listed(rows: list[TensorEntry], rank: int = 0) -> bytes:
    storage = StorageEntry("uint8", N_BYTES, "cpu", ())
    return directory.build(Directory((storage,), tuple(rows), 1, rank, 8, {"a": "b"}, {}, {}))


def parsed(data: bytes) -> Directory:
    return parse(data.replace(b'"extents":[]', b'"extents":[[0,0,1048576]]'), None, "a vote")


names = st.sampled_from([("a",), ("a", "b"), ("a", 0), ("äöü",), ('q"\\',), ("", 1)])
shapes = st.sampled_from([(), (4,), (2, 3), (0, 3)])


@st.composite
def rows(draw: st.DrawFn) -> TensorEntry:
    shape = draw(shapes)
    at = draw(st.none() | st.tuples(*(st.integers(0, 9) for _ in shape)))
    whole = draw(st.sampled_from([tuple(10 + n for n in shape), tuple(12 for _ in shape)]))
    return row(draw(names), at, shape, whole, draw(st.sampled_from(["float32", "int64"])))


@settings(max_examples=300)
@given(
    first=st.lists(rows(), max_size=6, unique_by=lambda one: one.name),
    second=st.lists(rows(), max_size=6, unique_by=lambda one: one.name),
    wanted=st.sampled_from([[], [((0, 0), (3, 3))], [((0,), (5,))]]),
    spoilt=st.sampled_from(
        [None, (b'"offset":0', b'"offset":00'), (b"float32", b"float33"), (b"}]}", b"},]}"), (b"[", b"[ ")]
    ),
)
def test_nothing_to_enter_is_nothing(
    first: list[TensorEntry], second: list[TensorEntry], wanted: Any, spoilt: Any
) -> None:
    wholes = Wholes(lambda name, box: touches(box, [one for one in wanted if len(one[0]) == len(box[0])]))
    wholes.add(0, parsed(listed(first)))
    data = listed(second, 1)
    if spoilt is not None:
        data = data.replace(*spoilt)
    if wholes.add_unwanted(data):
        try:
            parsed(data)
        except CorruptCheckpointError:  # in what it does not look at
            return
        before = copy.deepcopy(matters(wholes))
        wholes.add(1, parsed(data))
        assert matters(wholes) == before


def matters(wholes: Wholes) -> Any:
    """What a restore on another layout takes from it: who else has a tensor that is no DTensor is not asked."""
    return wholes.problems, {
        name: (whole.dtype, whole.shape, whole.kind, whole.entry, whole.blocks, whole.was_spread and whole.doubtful)
        for name, whole in wholes.found.items()
    }


def test_the_fast_look_takes_what_is_usual() -> None:
    same = [row(("model", f"layers.{n}.weight"), (8, 0), (4, 3), (32, 3)) for n in range(5)] + [
        row(("s",), None, (), ())
    ]
    wholes = Wholes(lambda name, box: touches(box, [((0, 0), (8, 3))]))
    wholes.add(0, parsed(listed(same)))
    assert not any(whole.blocks for name, whole in wholes.found.items() if name[0] == "model")
    assert wholes.add_unwanted(listed(same, 1))
    assert not wholes.add_unwanted(listed([*same, row(("new",), None, (), ())], 1))
    assert not wholes.add_unwanted(listed([row(("model", "layers.1.weight"), (6, 0), (4, 3), (32, 3))], 1)), "wanted"
    assert not wholes.add_unwanted(b"")
    assert wholes.add_unwanted(listed([]))


def test_blocks_come_once_and_rows_of_blocks_belong_to_their_tensor() -> None:
    wholes = Wholes()
    several = [
        row(("w",), None, (2, 3), ()),
        row(("w", BOX, 0), (0, 0), (1, 3), (4, 3))._replace(kind="part"),
        row(("w", BOX, 1), (2, 0), (1, 3), (4, 3))._replace(kind="part", offset=3),
    ]
    for rank in (0, 3):
        wholes.add(rank, parsed(listed(several, rank)))
    (whole,) = wholes.found.values()
    assert (whole.shape, whole.kind, whole.was_spread) == ((4, 3), "tensor", True)
    assert [(block.at, block.rank, block.offset) for block in whole.blocks] == [((0, 0), 0, 0), ((2, 0), 0, 3)]


@pytest.mark.parametrize(
    "other",
    [row(("w",), None, (2, 3), ()), row(("w",), (0, 0), (2, 3), (5, 3)), row(("w",), (0, 0), (2, 3), (4, 3), "int64")],
)
def test_votes_that_contradict_each_other(other: TensorEntry) -> None:
    wholes = Wholes()
    wholes.add(0, parsed(listed([row(("w",), (0, 0), (2, 3), (4, 3))])))
    wholes.add(1, parsed(listed([other], 1)))
    (problem,) = wholes.problems
    assert problem.startswith("w is ")
    assert "in the vote of rank 1, and float32 [4, 3], a DTensor in another" in problem
