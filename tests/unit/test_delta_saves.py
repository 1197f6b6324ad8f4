"""Saves against the checkpoint before them: what comes back is bit for bit what was saved, and no more is stored than has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt import Options, events
from fastckpt.errors import SaveError
from fastckpt.format import keys
from fastckpt.format.repository_records import Parent
from fastckpt.format.sealed_state import SealedState
from fastckpt.kernels.checksums import digest
from fastckpt.store.memory import MemoryStore
from fastckpt.writing.bases import Base, Place
from tests.support.delta_runs import OPTIONS, Run
from tests.support.repositories import check_all, read
from tests.support.states import same, sealed

MIB = 1 << 20
generator = torch.Generator()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    generator.manual_seed(1)


def noise(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, generator=generator).to(dtype)


def drifted(tensor: torch.Tensor, part: float = 1.0) -> torch.Tensor:
    """A little further on, or only a part of the numbers."""
    lanes = torch.int16 if tensor.element_size() == 2 else torch.int32
    steps = torch.randint(0, 20, (1999,), generator=generator) * (torch.rand(1999, generator=generator) < part)
    moved = tensor.clone().view(lanes)
    return moved.add_(steps.to(lanes).repeat(moved.numel() // 1999 + 1)[: moved.numel()]).view(tensor.dtype)


def saved(run: Run, step: int, obj: Any) -> None:
    """Save, and read it back."""
    assert same(read(run.job.repository.store, run.save(step, obj)), obj)


@pytest.mark.parametrize("keeps", [bool, None, lambda number: number % 2 == 0], ids=["all", "nothing", "some"])
def test_a_run_comes_back_bit_for_bit(keeps: Callable[[int], bool] | None) -> None:
    store = MemoryStore()
    run = Run(store, keeps=keeps)
    state: dict[str, Any] = {
        "fp32": noise(300_000),
        "bf16": noise(600_000, torch.bfloat16),
        "fp16": noise(100_000, torch.float16),
        "fp64": noise(50_000, torch.float64),
        "frozen": noise(300_000),
        "ids": torch.arange(100_000),
        "small": {f"b{i}": noise(1000 + i) for i in range(20)},
        "zeros": torch.zeros(300_000),
        "nan": torch.full((100_000,), float("nan")),
        "complex": torch.complex(noise(50_000), noise(50_000)),
    }
    for step in range(1, 6):
        saved(run, step, state)
        state = {
            **state,
            "fp32": drifted(state["fp32"]),
            "bf16": drifted(state["bf16"], 0.02),
            "fp16": drifted(state["fp16"]),
            "fp64": drifted(state["fp64"]),
            "ids": state["ids"] + 1,
            "small": {name: drifted(one) for name, one in state["small"].items()},
            "nan": torch.full((100_000,), float("nan")) if step % 2 else -torch.full((100_000,), float("nan")),
        }
    check_all(store)


def test_nothing_is_stored_of_what_rests() -> None:
    state = {"w": noise(400_000), "b": noise(7), "ids": torch.arange(99), "zeros": torch.zeros(99)}
    for keeps in (bool, None):
        run = Run(MemoryStore(), keeps=keeps)
        saved(run, 1, state)
        rows = run.transforms()
        for step in (2, 3, 4):
            saved(run, step, state)
            assert run.stored_bytes == 0
            assert run.transforms() == rows


def test_every_transform_is_used_where_it_pays() -> None:
    run = Run(MemoryStore())
    state = {"a": noise(400_000), "b": noise(400_000, torch.bfloat16), "c": torch.zeros(400_000), "d": noise(800_000)}
    saved(run, 1, state)
    state |= {"a": state["a"] * 1.000001, "b": drifted(state["b"], 0.01)}
    saved(run, 2, state)
    found = Counter(run.transforms())
    assert found["CONST"] == 1
    assert found["SUB"] + found["SUBPACK"] == 2
    assert found["ROT"] == 3, "two of them carried, as their bases"
    state |= {"master": noise(400_000)}
    state |= {"b": state["master"].bfloat16()}
    saved(run, 3, state)
    assert Counter(run.transforms())["CAST"] == 1


def test_a_chain_stays_within_its_cap_and_is_renewed() -> None:
    run = Run(MemoryStore(), replace(OPTIONS, read_amplification=1.3))
    state = {f"w{i}": noise(262_144) for i in range(9)}
    whole = 0
    for step in range(1, 9):
        saved(run, step, state)
        assert run.uploaded is not None
        stored = run.uploaded.records["stored_bytes"].astype(int)
        whole = whole or int(stored.sum())
        assert stored.sum() <= 1.31 * whole
        assert step == 1 or run.stored_bytes < 0.97 * whole, "never all at once again"
        state = {name: drifted(one) for name, one in state.items()}


def test_a_chunk_that_comes_back_to_what_it_was_is_stored_again() -> None:
    run = Run(MemoryStore())
    there, here = {"w": noise(300_000)}, {"w": noise(300_000)}
    for step, state in enumerate((there, here, there, here), 1):
        saved(run, step, state)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {**s, "w": s["w"].double()},
        lambda s: {**s, "w": s["w"].bfloat16()},
        lambda s: {**s, "w": torch.cat([s["w"], s["w"]])},
        lambda s: {**s, "w": s["w"][: s["w"].numel() // 2].clone()},
        lambda s: {"renamed": s["w"], "v": s["v"]},
        lambda s: {**s, "new": s["v"] + 1},
        lambda s: {"v": s["v"]},
        lambda s: {"v": s["w"], "w": s["v"]},
        lambda s: {"w": s["w"].view(torch.int32), "v": s["v"]},
        lambda s: {},
    ],
    ids=["wider", "narrower", "longer", "shorter", "renamed", "more", "fewer", "exchanged", "integers", "nothing"],
)
def test_a_state_of_another_form_comes_back(change: Callable[[Any], Any]) -> None:
    run = Run(MemoryStore())
    state = {"w": noise(700_000), "v": noise(50_000)}
    saved(run, 1, state)
    state = {"w": drifted(state["w"]), "v": drifted(state["v"])}
    saved(run, 2, state)
    saved(run, 3, change(state))
    saved(run, 4, change({name: drifted(one) for name, one in state.items()}))
    check_all(run.job.repository.store)


def test_names_that_collide_are_no_identity() -> None:
    run = Run(MemoryStore())
    a, b = noise(400_000), noise(400_000)
    for step, (one, two) in enumerate(([a, b], [b, a], [a, a.clone()], [drifted(a), b]), 1):
        # Two keys of one text, and one more storage in the second save: then the forms are unlike, and names decide.
        saved(run, step, {1.5: one, "1.5": two, **({"more": noise(5)} if step == 2 else {})})


def test_equal_chunks_of_one_save_share_what_was_stored_of_one() -> None:
    run = Run(MemoryStore())
    state = {"a": noise(300_000), "b": noise(300_000)}
    saved(run, 1, state)
    moved = drifted(state["a"])
    saved(run, 2, {"a": moved, "b": moved.clone()})
    saved(run, 3, {"a": drifted(moved), "b": moved.clone()})


def test_what_memory_keeps_is_not_trusted() -> None:
    run = Run(MemoryStore())
    state = {"w": noise(600_000), "v": noise(600_000)}
    saved(run, 1, state)
    assert run.base is not None
    for content in run.base.memory.chunks.values():  # type: ignore[union-attr]
        content[100] ^= 1
    state["v"] = drifted(state["v"])
    saved(run, 2, state)
    assert not {"SUB", "SUBPACK"} & set(run.transforms())


def shifted(base: Base, state: SealedState) -> Base:
    """The same, with places that no row has alone: each chunk begins some bytes into its row, and ends in the next."""
    places: list[Place | None] = [Place(number, 4096) for number in range(len(state.chunks) - 1)]
    return replace(base, places=[*places, None])


def test_a_base_whose_chunks_lie_in_two_rows_each() -> None:
    run = Run(MemoryStore())
    whole = noise(6 * MIB)
    first = sealed({"w": whole})
    run.save(1, first)
    assert run.base is not None
    moved = torch.cat([whole[1024:], whole[:1024]])
    state = sealed({"w": moved})
    run.base = shifted(replace(run.base, memory=type(run.base.memory)(state)), state)  # type: ignore[call-arg, misc]
    saved(run, 2, {"w": moved})
    assert Counter(run.transforms())["REF"] == len(state.chunks) - 1
    for step in (3, 4):  # a REF is named again as it is: chains do not grow
        saved(run, step, {"w": moved})
        assert Counter(run.transforms())["REF"] == len(state.chunks) - 1
    saved(run, 5, {"w": drifted(moved)})


@pytest.mark.parametrize("known", [True, False])
def test_what_memory_keeps_of_two_rows_is_not_trusted(known: bool) -> None:
    run = Run(MemoryStore())
    whole = noise(6 * MIB)
    run.save(1, {"w": whole})
    moved = torch.cat([whole[1024:], whole[:1024]])
    state = sealed({"w": moved})
    assert run.base is not None
    memory: Any = type(run.base.memory)(state)  # type: ignore[call-arg, misc]
    digests = {number: digest(content) for number, content in memory.chunks.items()} if known else {}
    run.base = shifted(replace(run.base, memory=memory, digests=digests), state)
    for number in (0, 2):
        memory.chunks[number][100] ^= 1
    saved(run, 2, {"w": drifted(moved)})
    assert bool({"SUB", "SUBPACK"} & set(run.transforms())) is known


def test_without_effort_only_equality_counts() -> None:
    run = Run(MemoryStore(), replace(OPTIONS, compress=False))
    state = {"w": noise(400_000), "frozen": noise(400_000)}
    saved(run, 1, state)
    state["w"] = drifted(state["w"])
    saved(run, 2, state)
    assert set(run.transforms()) == {"RAW"}
    assert run.stored_bytes == 4 * 400_000


def test_known_chunks_are_neither_read_nor_stored() -> None:
    run = Run(MemoryStore())
    state = sealed({"frozen": noise(2 * MIB), "w": noise(300_000)})
    run.save(1, state)
    assert run.base is not None
    assert run.uploaded is not None
    frozen = {n: run.base.records["digest"][place.row].tobytes() for n, place in enumerate(run.base.places[:2])}  # type: ignore[union-attr]
    source: Any = state.source

    class Knowing:
        def known(self, number: int) -> bytes | None:
            return frozen.get(number)

        def raw(self, number: int, scratch: Any) -> Any:
            read_.append(number)
            return source.raw(number, scratch)

        def __getattr__(self, name: str) -> Any:
            return getattr(source, name)

    read_: list[int] = []
    run.keeps = None
    commit = run.save(2, replace(state, source=Knowing()))
    assert read_ == [2]
    assert run.stored_bytes == 0
    assert read(run.job.repository.store, commit).keys() == {"frozen", "w"}
    frozen[0] = bytes(16)
    with pytest.raises(SaveError, match="other bytes there"):
        run.save(3, replace(state, source=Knowing()))


def test_a_base_must_be_the_parent() -> None:
    seen: list[events.Event] = []
    run = Run(MemoryStore())
    state = {"w": noise(1000)}
    run.save(1, state)
    old = run.base
    run.save(2, state)
    run.base = old
    with events.subscribe(seen.append):
        saved(run, 3, state)
    (told,) = (event for event in seen if isinstance(event, events.DeltasUsed))
    assert "continues from 1-2 instead" in told.why_full
    assert told.base_step is None


def test_an_event_says_what_became_of_the_chunks() -> None:
    seen: list[events.Event] = []
    run = Run(MemoryStore())
    state = {"w": noise(400_000), "frozen": noise(MIB), "new": noise(10)}
    saved(run, 1, state)
    state |= {"w": drifted(state["w"])}
    with events.subscribe(seen.append):
        saved(run, 2, state)
    (told,) = (event for event in seen if isinstance(event, events.DeltasUsed))
    assert (told.step, told.base_step, told.why_full) == (2, 1, "")
    assert told.chunks["difference"] == 1
    assert told.raw_bytes["equal"] == 4 * MIB + 40
    stored = [event for event in seen if isinstance(event, events.ChunkStored)]
    assert sum(event.stored_bytes for event in stored) == run.stored_bytes
    assert Counter(event.transform for event in stored)["REF"] == told.chunks["equal"]


def test_the_file_table_has_own_packs_first_and_only_what_is_named() -> None:
    run = Run(MemoryStore(), Options(threads=1, connections=1, host_budget_bytes=256 << 20, effort="normal"))
    state = {"frozen": noise(400_000), "w": noise(400_000)}
    saved(run, 1, state)
    for step in (2, 3, 4):
        state["w"] = noise(400_000)
        saved(run, step, state)
        assert run.uploaded is not None
        saves = [keys.parse_pack(file.key) for file in run.uploaded.vote.files]
        assert [save.step for save in saves if save is not None] == [step, 1]
    assert run.base is not None
    assert run.base.parent == Parent(keys.CheckpointId(1, 4), run.base.parent.digest)


def test_the_same_saves_give_the_same_bytes() -> None:
    options = Options(threads=1, connections=1, host_budget_bytes=256 << 20, effort="normal")
    found = []
    for _ in range(2):
        generator.manual_seed(5)
        run = Run(MemoryStore(), options)
        state = {"w": noise(700_000), "v": noise(200_000, torch.bfloat16)}
        for step in (1, 2, 3):
            run.save(step, state)
            state = {name: drifted(one) for name, one in state.items()}
        assert run.uploaded is not None
        store = run.job.repository.store
        found.append([store.get(info.key) for info in store.list(keys.DATA)] + [run.uploaded.records.tobytes()])
    assert all(np.array_equal(np.frombuffer(a, "u1"), np.frombuffer(b, "u1")) for a, b in zip(*found, strict=True))
