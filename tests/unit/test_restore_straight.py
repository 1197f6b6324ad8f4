"""Restores that read straight into live tensors: the same as loading all first, to the bit and to the holder; and what they leave when they
fail.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastckpt import Checkpointer, Options, RNGState
from fastckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    PartialRestoreError,
    RestoreError,
)
from fastckpt.format.keys import SaveId
from fastckpt.format.tensor_names import dotted
from fastckpt.reading import storage_loader, window
from fastckpt.repository.commit import open_vote, try_commit
from fastckpt.store.memory import MemoryStore
from fastckpt.training.restorer import Loaded, Restorer
from tests.support.repositories import as_parent, commit_of, flip, keys_of, place_vote
from tests.support.straight import ReadStore, addresses, all_straight, place_of, plain

OPTIONS = Options(threads=2, connections=2)


@pytest.fixture(autouse=True)
def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    all_straight(monkeypatch)


def training(
    seed: int = 0, *, steps: int = 1, dtype: torch.dtype = torch.float32, amsgrad: bool = False
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=amsgrad)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return {"m": model, "o": optimizer}


def save(store: MemoryStore, state: dict[str, Any]) -> None:
    with opened(store, state) as ckpt:
        ckpt.save_now(1).wait()


def opened(store: MemoryStore, state: dict[str, Any]) -> Checkpointer:
    return Checkpointer(store, state, every=None, spot=None, options=OPTIONS)


@pytest.fixture
def went_straight(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that were read straight."""
    names: list[str] = []
    fill = Restorer._fill

    def watched(self: Restorer, found: Loaded, *, states: bool = True) -> None:
        names.extend(map(dotted, found.straight.rows))
        fill(self, found, states=states)

    monkeypatch.setattr(Restorer, "_fill", watched)
    return names


# -- as if all had been loaded first -----------------------------------------------------------------------------------


def tied() -> dict[str, Any]:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    return {"m": model, "d": {"w": model["a"].weight, "n": torch.randn(3)}, "l": [torch.randn(4), model["b"].bias]}


def same_memory_twice() -> dict[str, Any]:
    model = nn.Linear(5, 5)
    return {"m": model, "best": {"weight": model.weight.detach(), "set": {1, 2}}}


def views() -> dict[str, Any]:
    base = torch.randn(20)
    return {"d": {"a": base[:10], "b": base[10:], "c": torch.randn(3, 4).t(), "e": torch.randn(1).expand(4)}}


def flat() -> dict[str, Any]:
    """Parameters that lie side by side in one memory, as some optimizers want them."""
    memory, model = torch.randn(30), nn.Linear(5, 5)
    model.weight.data, model.bias.data = memory[:25].view(5, 5), memory[25:]
    return {"m": model}


def nested() -> dict[str, Any]:
    deep = OrderedDict(x=torch.randn(7), n=3)
    return {"d": {"a": deep, "b": deep, "t": (torch.randn(2), 1), "l": [{"y": torch.randn(5)}]}, "l": [torch.randn(3)]}


def hidden() -> dict[str, Any]:
    model = nn.Linear(5, 5)
    return {"m": model, "d": {"holds": {model.weight.detach()}}}


def odd() -> dict[str, Any]:
    parameter = nn.Parameter(torch.randn(3))
    return {
        "d": {"p": parameter, "sparse": torch.eye(3).to_sparse(), "empty": torch.zeros(0), "one": torch.randn(())},
        "t": torch.randn(6),
        "rng": RNGState(),
    }


def channels_last() -> dict[str, Any]:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {"m": model}


def compiled() -> dict[str, Any]:
    state = training(3)
    return {"m": nn.parallel.DataParallel(state["m"]), "o": state["o"]}


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "adamw": training,
    "fresh optimizer": lambda: training(5, steps=0),
    "bfloat16": lambda: training(1, dtype=torch.bfloat16),
    "double": lambda: training(1, dtype=torch.float64, amsgrad=True),
    "wrapped": compiled,
    "tied": tied,
    "memory under two names": same_memory_twice,
    "views": views,
    "flat": flat,
    "nested": nested,
    "hidden in a set": hidden,
    "odd": odd,
    "channels last": channels_last,
}
MIXED = {
    "adamw": "fresh optimizer",
    "fresh optimizer": "adamw",
    "bfloat16": "adamw",
    "double": "bfloat16",
    "wrapped": "adamw",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("into", ["the same", "others"])
def test_it_is_what_a_load_of_all_gives(kind: str, into: str) -> None:
    saved, live = KINDS[kind], KINDS[MIXED.get(kind, kind) if into == "others" else kind]
    store = MemoryStore()
    torch.manual_seed(0)
    save(store, saved())
    found = []
    for atomic in (False, True):
        torch.manual_seed(1)
        state = live()
        with opened(store, state) as ckpt:
            assert ckpt.restore(atomic=atomic) == 1
        found.append(plain(state))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["tied", "memory under two names", "views", "hidden in a set"])
def test_ties_are_those_of_a_load_of_all(kind: str) -> None:
    """A write through one name is seen through the same others."""
    store, found = MemoryStore(), []
    save(store, KINDS[kind]())
    for atomic in (False, True):
        state = KINDS[kind]()
        with opened(store, state) as ckpt:
            ckpt.restore(atomic=atomic)
        with torch.no_grad():
            (
                state["m"].get_parameter("a.weight" if kind == "tied" else "weight")
                if "m" in state
                else state["d"]["a"]
            ).zero_()
        found.append({key: plain(value) for key, value in state.items() if key != "m"})
        found[-1]["zeros"] = [int(not t.any()) for t in state["m"].state_dict().values()] if "m" in state else []
    assert str(found[0]).count("zeros") == str(found[1]).count("zeros")


def test_live_tensors_keep_their_memory(went_straight: list[str]) -> None:
    store, state = MemoryStore(), training(1)
    save(store, training(2))
    before, versions = addresses(state), [p._version for p in state["m"].parameters()]
    with opened(store, state) as ckpt:
        ckpt.restore()
    assert addresses(state) == before
    assert set(went_straight) >= {"m.0.weight", "m.1.running_mean", "m.1.num_batches_tracked", "o.state.0.exp_avg"}
    assert all(p._version > v for p, v in zip(state["m"].parameters(), versions, strict=True)), "autograd is told"


def test_memory_that_is_somebody_elses_is_not_written(went_straight: list[str]) -> None:
    memory = torch.zeros(40)
    for n_own, straight in ((30, {"m.weight", "m.bias"}), (40, set())):
        model = nn.Linear(5, 5)
        model.weight.data, model.bias.data = memory[:25].view(5, 5), memory[25:30]
        if n_own == 30:
            model.weight.data, model.bias.data = (own := torch.zeros(30))[:25].view(5, 5), own[25:]
        store = MemoryStore()
        save(store, {"m": model})
        memory[30:] = 7
        with opened(store, {"m": model}) as ckpt:
            went_straight.clear()
            ckpt.restore()
        assert set(went_straight) == straight
        assert memory[30:].tolist() == [7.0] * 10


def test_a_state_that_autograd_needs_is_not_changed_in_silence() -> None:
    store, state = MemoryStore(), training(1)
    save(store, state)
    loss = state["m"](torch.randn(4, 8)).pow(2).sum()
    with opened(store, state) as ckpt:
        ckpt.restore()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_is_taken_for_nothing_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    new = window._new_memory
    monkeypatch.setattr(window, "_new_memory", lambda n: taken.append(n) or new(n))
    store, state = MemoryStore(), {**training(1), "d": {"ema": torch.zeros(1 << 18)}, "t": torch.zeros(1 << 18)}
    save(store, state)
    with opened(store, state) as ckpt:
        ckpt.restore()
        assert sum(taken) == 0
        ckpt.restore(atomic=True)
        assert sum(taken) > 2 << 20


def test_hooks_and_overrides_get_loaded_tensors(went_straight: list[str]) -> None:
    class Swaps(nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            state["weight"], state["twin"] = state["twin"], state["weight"]
            super()._load_from_state_dict(state, prefix, *rest)

    def made() -> Any:
        module = Swaps(3, 3)
        module.twin = nn.Parameter(torch.randn(3, 3))
        return module

    def swaps(_: Any, state: dict[str, Any]) -> None:
        state["state"][0], state["state"][2] = state["state"][2], state["state"][0]

    first, store = training(1), MemoryStore()
    save(store, {"m": made(), "o": first["o"]})
    for atomic in (False, True):
        state, other = {"m": made()}, training(2)
        other["o"].register_load_state_dict_pre_hook(swaps)
        with opened(store, {**state, "o": other["o"]}) as ckpt:
            ckpt.restore(atomic=atomic)
        assert not torch.equal(state["m"].weight, state["m"].twin)
        assert torch.equal(
            other["o"].state_dict()["state"][0]["exp_avg"], first["o"].state_dict()["state"][2]["exp_avg"]
        )
    assert not went_straight


# -- damage and stores that fail ---------------------------------------------------------------------------------------


class TwoSteps:
    """Steps 1 and 2 of a training, what they hold, and objects to restore into."""

    def __init__(self) -> None:
        self.store = ReadStore()
        state = {**training(1), "d": {"n": torch.arange(3), "set": {1}}}
        self.held: dict[int, Any] = {}
        with opened(self.store, state) as ckpt:
            for step in (1, 2):
                ckpt.save_now(step).wait()
                self.held[step] = plain(copy.deepcopy(state))
                for parameter in state["m"].parameters():
                    parameter.grad = torch.randn_like(parameter)
                state["o"].step()
        self.live = {**training(3), "d": {"n": torch.zeros(3, dtype=torch.int64), "set": {1}}}

    def opened(self) -> Checkpointer:
        return opened(self.store, self.live)

    @property
    def live_step(self) -> int | None:
        """The step that all objects have the state of."""
        return next((step for step, held in self.held.items() if held == plain(self.live)), None)


@pytest.fixture
def two() -> TwoSteps:
    return TwoSteps()


@pytest.mark.parametrize("name", ["m.0.weight", "m.1.running_var", "o.state.0.exp_avg", "o.state.5.exp_avg_sq"])
def test_a_bit_in_a_tensor(two: TwoSteps, name: str) -> None:
    before = plain(copy.deepcopy(two.live))
    flip(two.store, *place_of(two.store, 2, name))
    with two.opened() as ckpt:
        with pytest.raises(CorruptCheckpointError):
            ckpt.restore(atomic=True)
        assert plain(two.live) == before, "nothing was changed"
        with pytest.raises(PartialRestoreError, match=r"(?s)crc.*restore\(step=1\).*latest-valid") as caught:
            ckpt.restore()
        assert "Nothing was" not in str(caught.value)
        cause = caught.value.__cause__
        assert isinstance(cause, CorruptCheckpointError)
        assert any(name in damage.tensors for damage in cause.damage)
        for call in (ckpt.step, ckpt.save_now):
            with pytest.raises(PartialRestoreError):
                call(3)
        assert ckpt.restore("latest-valid") == 1
        ckpt.save_now(3).wait()
    assert two.live_step == 1


def test_a_bit_in_small_state_or_in_the_index_changes_nothing(two: TwoSteps) -> None:
    two.live["d"]["n"] = None  # nothing there to be read into: it is loaded first
    before = plain(two.live)
    flip(two.store, *place_of(two.store, 2, "d.n"))
    for _ in range(2):
        with two.opened() as ckpt, pytest.raises(CorruptCheckpointError):
            ckpt.restore()
        assert plain(two.live) == before
        flip(two.store, next(key for key in keys_of(two.store, "votes/") if "000000000002" in key))


def test_a_lost_pack(two: TwoSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    take = storage_loader.StorageLoader.take

    def late(self: Any, number: int) -> Any:  # lost between the look at lengths and the reading
        for key in keys_of(two.store, "data/000001-000000000002-000/"):
            two.store.delete(key)
        return take(self, number)

    with two.opened() as ckpt:
        monkeypatch.setattr(storage_loader.StorageLoader, "take", late)
        with pytest.raises(PartialRestoreError, match=r"restore\(step=1\)"):
            ckpt.restore()
        monkeypatch.undo()
        assert ckpt.restore("latest-valid") == 1
    assert two.live_step == 1


def test_a_store_that_fails_at_any_read(two: TwoSteps) -> None:
    store, partly = two.store, 0
    with two.opened() as ckpt:
        store.reads = 0
        ckpt.restore()
        n_reads = store.reads
        for fails_at in range(1, n_reads + 1, 2):
            before = plain(two.live)
            store.reads, store.fails_at = 0, fails_at
            with pytest.raises(CheckpointError) as caught:
                ckpt.restore(1)
            store.fails_at = None
            if isinstance(caught.value, PartialRestoreError):
                partly += 1
            else:
                assert plain(two.live) == before
            assert ckpt.restore() == 2
            assert two.live_step == 2
    assert partly


def test_an_interrupt_leaves_no_state_to_save(two: TwoSteps, monkeypatch: pytest.MonkeyPatch) -> None:
    take = storage_loader.StorageLoader.take

    def interrupt(self: Any, number: int) -> Any:
        if self._window._given:
            raise KeyboardInterrupt
        return take(self, number)

    with two.opened() as ckpt:
        monkeypatch.setattr(storage_loader.StorageLoader, "take", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ckpt.restore()
        monkeypatch.undo()
        with pytest.raises(PartialRestoreError, match="KeyboardInterrupt"):
            ckpt.save_now(3)
        assert ckpt.restore() == 2
        ckpt.save_now(3).wait()
    assert two.live_step == 2


def test_what_a_failed_restore_has_written_is_not_left_so(two: TwoSteps) -> None:
    """An older checkpoint that lacks something is refused, also with strict=False, which would leave that as it is."""
    two.live["m"].extra = nn.Parameter(torch.zeros(4))
    with two.opened() as ckpt:
        ckpt.restore(strict=False)
        assert two.live["m"].extra.tolist() == [0] * 4
        two.live["m"].extra.data += 1
        ckpt.save_now(3).wait()
        flip(two.store, *place_of(two.store, 3, "m.0.weight"))
        with pytest.raises(PartialRestoreError):
            ckpt.restore()
        with pytest.raises(RestoreError, match=r"has nothing for m\.extra"):
            ckpt.restore(2, strict=False)
        with pytest.raises(PartialRestoreError):
            ckpt.step(4)


# -- hostile checkpoints -----------------------------------------------------------------------------------------------


@pytest.fixture
def rewritten() -> Callable[[MemoryStore, bytes, bytes], None]:
    """Replaces a part of the skeleton of step 1, in a checkpoint of its own whose every digest is right."""

    def rewrite(store: MemoryStore, old: bytes, new: bytes) -> None:
        reader = open_vote(store, commit_of(store, 1).vote(0))
        assert reader.skeleton.count(old) == 1, reader.skeleton
        reader.skeleton = reader.skeleton.replace(old, new)
        save_id = SaveId(1, 2, 0)
        place_vote(store, save_id, reader, parent=as_parent(commit_of(store, 1)))
        assert try_commit(store, save_id) is not None

    return rewrite


def test_a_tensor_past_the_end_of_its_storage_does_not_make_live_memory_longer(
    rewritten: Callable[[MemoryStore, bytes, bytes], None],
) -> None:
    store = MemoryStore()
    save(store, {"t": torch.arange(40.0)})
    rewritten(store, b"K\x28\x85", b"K\xc8\x85")
    live = torch.zeros(40)
    address = live.data_ptr()
    with opened(store, {"t": live}) as ckpt:
        with pytest.raises(CorruptCheckpointError):
            ckpt.restore()
        assert (live.untyped_storage().nbytes(), live.data_ptr(), live.tolist()) == (160, address, [0.0] * 40)
        assert ckpt.restore(1) == 1
    assert live.tolist() == list(range(40))


def test_a_tensor_over_the_storage_of_another_one(rewritten: Callable[[MemoryStore, bytes, bytes], None]) -> None:
    """The directory says where it lies, the skeleton says otherwise: that is what counts, however it is read."""
    store, found = MemoryStore(), []
    save(store, {"d": {"a": torch.arange(30.0), "b": torch.arange(30.0) + 1}})
    skeleton = open_vote(store, commit_of(store, 1).vote(0)).skeleton
    first, second = (skeleton.index(b"X\x01\x00\x00\x00" + digit) for digit in (b"0", b"1"))
    between = skeleton[first : second + 6]
    swapped = between[:5] + b"1" + between[6:-1] + b"0"
    rewritten(store, between, swapped)
    for atomic in (False, True):
        live = {"a": torch.zeros(30), "b": torch.zeros(30)}
        with opened(store, {"d": live}) as ckpt:
            assert ckpt.restore(2, atomic=atomic) == 2
        found.append(plain(live))
    assert found[0] == found[1]
    assert live["a"].tolist() == (torch.arange(30.0) + 1).tolist()


def test_no_thread_is_left() -> None:
    store, state = MemoryStore(), training(1)
    save(store, state)
    with opened(store, state) as ckpt:
        before = set(threading.enumerate())
        ckpt.restore()
        for thread in set(threading.enumerate()) - before:  # they are told to end, and nobody waits for it
            thread.join(60)
            assert not thread.is_alive()
