"""Rules of retention, and histories that they are asked about."""

from __future__ import annotations

from hypothesis import strategies as st

from fastckpt.format.keys import CheckpointId
from fastckpt.repository.keeping import Candidate, Keep

numbers = st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def histories(draw: st.DrawFn) -> list[Candidate]:
    """Steps rise; times, in quarters of minutes, do whatever a clock may do."""
    steps = sorted(draw(st.lists(st.integers(0, 40), unique=True, max_size=12)))
    quarters = draw(st.lists(st.integers(-20, 80), min_size=len(steps), max_size=len(steps)))
    if draw(st.booleans()):
        quarters.sort()
    metrics = st.dictionaries(st.sampled_from(["loss", "accuracy"]), numbers)
    found = [Candidate(CheckpointId(1, step), draw(metrics), 15.0 * n) for step, n in zip(steps, quarters, strict=True)]
    return found[::-1]


keeps = st.builds(
    Keep,
    last=st.integers(1, 5),
    every=st.none() | st.integers(1, 10),
    every_minutes=st.none() | st.sampled_from([0.5, 1, 2.5, 7]),
    for_minutes=st.none() | st.sampled_from([0.25, 3, 10]),
    steps=st.lists(st.integers(0, 40), max_size=3),
    best=st.none() | st.sampled_from(["loss", "accuracy"]),
    mode=st.sampled_from(["min", "max"]),
    best_count=st.integers(1, 3),
    max_grace_bytes=st.none() | st.integers(0, 10),
)
