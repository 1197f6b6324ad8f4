"""Random nested states: values, strides and the pattern of aliases are those of torch."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.differential.tools import same

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint16,
]
KEYS = st.one_of(st.integers(), st.text(max_size=5), st.booleans(), st.tuples(st.integers(0, 3), st.text(max_size=2)))
ATOMS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(min_size=1, max_size=5)
)


@st.composite
def states(draw: Any) -> Any:
    bases = []
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(DTYPES))
        n = draw(st.integers(0, 300))
        generator = torch.Generator().manual_seed(number)
        limit = 2 if dtype is torch.bool else 256
        data = torch.randint(0, limit, (n * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        bases.append(torch.empty(0, dtype=dtype).set_(data.untyped_storage(), 0, (n,), (1,)))
    tensors = list(bases)
    for _ in range(draw(st.integers(0, 4))):
        base = draw(st.sampled_from(bases))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        strides = draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
        offset = draw(st.integers(0, 10))
        reach = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        if base.numel() >= reach and base.numel():
            tensors.append(torch.as_strided(base, shape, strides, offset))
    leaves: list[Any] = [*tensors]
    leaf = st.one_of(st.integers(0, len(leaves) - 1).map(lambda i: leaves[i]), ATOMS)
    shared: list[Any] = draw(st.lists(leaf, max_size=3))
    trees = st.recursive(
        st.one_of(leaf, st.just(shared)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(KEYS, inner, max_size=4),
            st.lists(st.tuples(KEYS, inner), max_size=4).map(OrderedDict),
        ),
        max_leaves=12,
    )
    return [draw(trees), tensors, shared]


@settings(max_examples=100)
@given(states())
def test_random_states(state: Any) -> None:
    same(state)
