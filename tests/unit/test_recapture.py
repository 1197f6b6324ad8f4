"""A state that is captured again is captured as if for the first time."""

from __future__ import annotations

import io
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt import RNGState, load
from fastckpt.options import Options
from fastckpt.state import Captured, Recapturer, capture, recapture
from fastckpt.state.sealing import seal
from fastckpt.writing.container import write
from fastckpt.writing.sinks import FileObject

OPTIONS = Options(threads=1)


def loaded(captured: Captured) -> Any:
    file = io.BytesIO()
    write(seal(captured), FileObject(file), "x", OPTIONS, None, 0.0)
    file.seek(0)
    return load(file, weights_only=False)


def flat(value: Any) -> Any:
    """What can be compared: bytes, types and form."""
    if isinstance(value, torch.Tensor):
        return (
            type(value),
            value.dtype,
            value.stride(),
            value.requires_grad,
            value.detach().resolve_conj().numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.tobytes()
    if isinstance(value, dict):
        return type(value), [(key, flat(one)) for key, one in value.items()], flat(getattr(value, "_metadata", None))
    if isinstance(value, (list, tuple)):
        return type(value), [flat(one) for one in value]
    return type(value), value.hex() if isinstance(value, float) else value


def names(captured: Captured) -> list[Any]:
    return [(one.name, one.shape, one.storage) for one in captured.tensors]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each stream that was pickled."""
    made: list[int] = []
    original = recapture.pickled  # type: ignore[attr-defined]

    def pickled(*args: Any) -> bytes:
        stream = original(*args)
        made.append(len(stream))
        return stream

    monkeypatch.setattr(recapture, "pickled", pickled)
    return made


def training() -> tuple[dict[str, Any], Callable[[], None]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def step() -> None:
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        schedule.step()

    objects = {"model": model, "optim": optimizer, "schedule": schedule, "rng": RNGState()}
    return objects, step


def state_of(objects: dict[str, Any]) -> dict[str, Any]:
    return {name: one.state_dict() for name, one in objects.items()}


def test_a_training_run_is_captured_as_it_is_and_its_tensors_are_pickled_once(counted: list[int]) -> None:
    objects, step = training()
    again = Recapturer()
    for number in range(5):
        step()
        counted.clear()
        state = state_of(objects)
        ours = again.capture(state)
        if number > 1:  # the first step makes the optimizer's moments
            assert (
                sum(counted)
                < len(ours.skeleton) - sum(len(part.opcodes) for part in again._parts.values() if part.form) + 4000
            )
        theirs = capture(state, pickle, 2)
        assert names(ours) == names(theirs)
        assert flat(loaded(ours)) == flat(loaded(theirs)) == flat(state)
    back = loaded(again.capture(state_of(objects)))
    model = back["model"]
    assert model["0.weight"].untyped_storage().data_ptr() == model["2.weight"].untyped_storage().data_ptr()


def test_the_form_is_the_same_object_as_long_as_it_is_the_same() -> None:
    objects, step = training()
    step()
    again = Recapturer()
    first = again.capture(state_of(objects)).form
    step()
    assert again.capture(state_of(objects)).form is first
    objects["model"].add_module("more", torch.nn.Linear(2, 2))
    assert again.capture(state_of(objects)).form is not first


def changes() -> dict[str, Callable[[dict[str, Any]], None]]:
    def resized(state: dict[str, Any]) -> None:
        state["a"]["x"] = torch.arange(7.0)

    def other_type(state: dict[str, Any]) -> None:
        state["a"]["x"] = state["a"]["x"].double()

    def view(state: dict[str, Any]) -> None:
        state["a"]["x"] = state["a"]["x"].t()

    def tied(state: dict[str, Any]) -> None:
        state["a"]["y"] = state["a"]["x"]

    def tied_across(state: dict[str, Any]) -> None:
        state["b"]["y"] = state["a"]["x"]

    def untied(state: dict[str, Any]) -> None:
        state["a"]["z"] = state["a"]["z"].clone()

    def parameter(state: dict[str, Any]) -> None:
        state["a"]["x"] = torch.nn.Parameter(state["a"]["x"])

    def gradient(state: dict[str, Any]) -> None:
        state["a"]["x"].requires_grad_()

    def number(state: dict[str, Any]) -> None:
        state["b"]["n"] = True

    def zero(state: dict[str, Any]) -> None:
        state["b"]["f"] = -0.0

    def order(state: dict[str, Any]) -> None:
        state["a"] = dict(reversed(state["a"].items()))

    def gone(state: dict[str, Any]) -> None:
        del state["a"]["x"]

    def more(state: dict[str, Any]) -> None:
        state["a"]["new"] = torch.ones(3)

    def strange(state: dict[str, Any]) -> None:
        state["a"]["strange"] = {1, 2}

    def array(state: dict[str, Any]) -> None:
        state["b"]["array"] = np.arange(30000.0)

    def attribute(state: dict[str, Any]) -> None:
        state["a"]["x"].note = "seen"

    def complex_one(state: dict[str, Any]) -> None:
        state["a"]["x"] = torch.ones(2, 3, dtype=torch.complex64).conj()

    def container(state: dict[str, Any]) -> None:
        state["a"] = OrderedDict(state["a"])

    def cycle(state: dict[str, Any]) -> None:
        state["b"]["list"].append(state["b"]["list"])

    return {name: one for name, one in locals().items() if callable(one)}


@pytest.mark.parametrize("name", sorted(changes()))
def test_each_change_is_seen(name: str) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    shared = torch.arange(4.0)
    state = {
        "a": {"x": base, "y": base.clone(), "z": shared, "w": shared},
        "b": {"n": 1, "f": 0.0, "list": [1, 2.5, "text", None], "y": torch.zeros(2)},
        "t": torch.ones(2),
    }
    again = Recapturer()
    for _ in range(2):
        before = again.capture(state)
    assert flat(loaded(before)) == flat(state)
    changes()[name](state)
    for _ in range(2):
        after = again.capture(state)
        if name == "cycle":
            back = loaded(after)["b"]["list"]
            assert back[-1] is back
            continue
        assert flat(loaded(after)) == flat(loaded(capture(state, pickle, 2))) == flat(state)
        assert names(after) == names(capture(state, pickle, 2))
    a = loaded(after)["a"]
    if name in ("tied", "untied"):
        same = a["y"].data_ptr() == a["x"].data_ptr() if name == "tied" else a["z"].data_ptr() != a["w"].data_ptr()
        assert same, "shared storages come back shared, others do not"


def test_what_a_state_dict_made_for_a_save_is_not_kept_for_the_next() -> None:
    import gc
    import weakref

    state = {"a": {"x": torch.ones(10)}}
    again = Recapturer()
    captured = again.capture(state)
    gone = weakref.ref(state["a"]["x"])
    state["a"]["x"] = torch.zeros(10)
    captured.release()
    del captured
    gc.collect()
    assert gone() is None


def something(r: random.Random, known: list[torch.Tensor], old: Any) -> Any:
    one = r.choice(known) if known else torch.zeros(2, 2)
    return r.choice(
        [
            torch.randn(r.randrange(4), r.randrange(3)),
            one,
            one.t() if one.dim() == 2 else one,
            one.clone(),
            [torch.zeros(2), r.random(), r.randrange(5)],
            {"deep": torch.ones(1), 3: r.random()},
            np.arange(r.choice([3, 20000])),
            old,
            r.random(),
        ]
    )


def test_random_histories() -> None:
    """A state that changes at random, captured again each time by the same Recapturer."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    r = random.Random(seed)
    state: dict[str, Any] = {name: OrderedDict() if name == "c" else {} for name in "abc"}
    again = Recapturer()
    for _ in range(150):
        part, key = state[r.choice("abc")], r.choice("uvwxyz")
        known = [value for one in state.values() for value in one.values() if isinstance(value, torch.Tensor)]
        part[key] = something(r, known, part.get(key))
        if r.random() < 0.2:
            part.pop(key)
        assert flat(loaded(again.capture(state))) == flat(state)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([0.0, 1.0], [-0.0, 1.0]),
        ([1, 2], [True, 2]),
        ([1, 2], [1.0, 2]),
        ([1, 2], [1, 2, 3]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ([["x"], ["x"]], [["x"]] * 2),
        ([(1, 2.0)], [[1, 2.0]]),
        ([b"a"], ["a"]),
        ({1, 2}, {1, 3}),
    ],
)
def test_plain_values_that_look_alike_are_told_apart(before: Any, after: Any, counted: list[int]) -> None:
    """Lists of lists share what they shared: in one of them, the second is the first."""
    again = Recapturer()
    state = {"w": {"w": torch.ones(2)}, "history": {"x": before}}
    first = again.capture(state)
    counted.clear()
    state["history"]["x"] = after
    second = again.capture(state)
    assert counted == [], "numbers do not need the pickler that looks for storages"
    assert (flat(loaded(first)["history"]["x"]), flat(loaded(second)["history"]["x"])) == (flat(before), flat(after))
    back = loaded(second)["history"]["x"]
    if isinstance(after, list) and len(after) == 2 and isinstance(after[0], list):
        assert (back[0] is back[1]) == (after[0] is after[1])


def test_numbers_beside_a_tensor_are_looked_at_at_once(counted: list[int]) -> None:
    numbers = [float(number) for number in range(1000)]
    state = {"a": {"b": {"history": numbers, "t": torch.ones(2)}}}
    again = Recapturer()
    again.capture(state)
    counted.clear()
    assert flat(loaded(again.capture(state))) == flat(state)
    assert not counted
    look = again._parts["a", "b"].form
    assert isinstance(look, list)
    assert len(look) < 100, "the form has an entry for every number"
    numbers[7] = -0.0
    assert flat(loaded(again.capture(state))) == flat(state)
    assert counted


def test_a_part_that_gets_and_loses_tensors(counted: list[int]) -> None:
    again = Recapturer()
    value: Any
    for value in ([1, 2], [1, torch.ones(2)], [1, 2], [np.float64(1)], torch.ones(1), {}):
        state = {"a": {"b": value}, "w": {"w": torch.ones(3)}}
        ours = again.capture(state)
        assert flat(loaded(ours)) == flat(state)
        assert names(ours) == names(capture(state, pickle, 2))
