"""The training loop's object over a memory store: real training, real threads, a store that can be held and broken."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt import Checkpointer, Every, Keep, Options, RNGState, events
from fastckpt.errors import (
    SaveError,
)
from fastckpt.format import keys
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.file_tables import packs_of
from fastckpt.repository.incarnation import Incarnation
from fastckpt.repository.repository import Repository
from fastckpt.store.memory import MemoryStore
from tests.support.repositories import commit_of
from tests.support.states import sealed
from tests.support.stores import GivenNotices, HeldStore
from tests.support.training import SHORT_S, Training, checkpointer, living, losses


def test_a_restored_run_goes_on_bit_for_bit(store: HeldStore) -> None:
    expected = losses(12)
    first = Training()
    with checkpointer(store, first) as ckpt:
        assert ckpt.restore() == 0
        for step in range(7):
            assert first.step() == expected[step]
            ckpt.step(step + 1, metrics={"loss": expected[step]})
            ckpt.wait()
    second = Training()
    second.step()  # whatever it did before, restore undoes
    with checkpointer(store, second) as ckpt:
        start = ckpt.restore()
        assert start == 7
        assert ckpt.restored is not None
        assert ckpt.restored.metrics == {"loss": expected[6]}
        assert [second.step() for _ in range(5)] == expected[7:]


def test_parameters_are_restored_into_the_same_memory(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training) as ckpt:
        ckpt.save_now(1).wait(SHORT_S)
    other = Training()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(1)
    before = [p.data_ptr() for p in other.model.parameters()]
    with checkpointer(store, other) as ckpt:
        assert ckpt.restore() == 1
    assert before == [p.data_ptr() for p in other.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(training.model.parameters(), other.model.parameters(), strict=True))


def test_tensors_dicts_and_lists_are_restored_in_place(store: HeldStore) -> None:
    tensor, mapping, values = torch.arange(5.0), {"position": 3, "t": torch.ones(2)}, [1, 2]
    with Checkpointer(store, {"t": tensor, "d": mapping, "l": values}, spot=None) as ckpt:
        ckpt.save_now(4).wait(SHORT_S)
        tensor.zero_()
        mapping.clear()
        values.append(9)
        assert ckpt.restore() == 4
    assert tensor.tolist() == [0, 1, 2, 3, 4]
    assert mapping["position"] == 3
    assert values == [1, 2]


def test_every_and_keep(store: HeldStore) -> None:
    training = Training()
    keep = Keep(last=2, every=8, best="loss")
    with checkpointer(store, training, every=Every(steps=2), keep=keep, grace_s=0.0) as ckpt:
        for step in range(1, 21):
            training.step()
            ckpt.step(step, metrics={"loss": 0.5 if step == 6 else 1.0})
            ckpt.wait()
    assert living(store) == [20, 18, 16, 8, 6]
    packs = {keys.parse_pack(info.key) for info in store.list(keys.DATA)}
    assert {save.step for save in packs if save is not None} >= {20, 18, 16, 8, 6}
    named = {keys.parse_pack(key) for step in living(store) for key in packs_of(store, commit_of(store, step))}
    assert len(packs) <= len(named) + 1  # what was retired by the last pass is collected by the next


def test_a_save_that_is_due_waits_without_keeping_training(store: HeldStore) -> None:
    training = Training()
    seen: list[events.SaveDeferred] = []
    with (
        checkpointer(store, training) as ckpt,
        events.subscribe(lambda e: seen.append(e) if isinstance(e, events.SaveDeferred) else None),
    ):
        store.open.clear()
        for step in range(1, 6):  # 1 uploads, 2 is staged, 3 to 5 find no room
            training.step()
            assert ckpt.step(step) is False
        assert ckpt.stats.deferred == 3
        assert [event.step for event in seen] == [3, 4, 5]
        store.open.set()
        ckpt.wait()
        training.step()
        ckpt.step(6)
        ckpt.wait()
    assert living(store)[:3] == [6, 2, 1]


def test_what_is_committed_is_the_state_at_the_call_of_step(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training) as ckpt:
        store.open.clear()
        training.step()
        ckpt.step(1)
        then = {name: value.clone() for name, value in training.model.state_dict().items()}
        for _ in range(3):
            training.step()
        store.open.set()
        ckpt.wait()
    other = Training()
    with checkpointer(store, other) as ckpt:
        ckpt.restore()
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, then[name]), name


def test_the_optimizers_step_waits_for_copies_that_were_left_to_it(
    store: HeldStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastckpt.state import Captured

    training = Training()
    copying, go = threading.Event(), threading.Event()
    original = Captured.read
    fenced = {p.untyped_storage().data_ptr() for p in training.model.parameters()}

    def slow(self: Captured, pieces: Any, out: Any) -> None:
        if threading.current_thread().name.startswith("fastckpt-stage") and self.addresses[pieces[0][0]] in fenced:
            copying.set()
            assert go.wait(SHORT_S)
        original(self, pieces, out)

    monkeypatch.setattr("fastckpt.snapshot.host_copies._INLINE_BYTES", 1)  # these tensors would not be worth a thread
    monkeypatch.setattr(
        "fastckpt.state.chunking.BUNDLE_BYTES", 1
    )  # and would be bundled with others that may change at any time
    with checkpointer(store, training, every=Every(steps=2)) as ckpt:
        training.step()
        ckpt.save_now(1).wait(SHORT_S)
        ckpt.step(1)
        training.step()  # the hook has fired between two steps, and nothing else has changed anything: from here on it is trusted
        monkeypatch.setattr(Captured, "read", slow)
        then = [p.detach().clone() for p in training.model.parameters()]
        ckpt.step(2)
        assert copying.wait(SHORT_S)
        loss = training.model(torch.randn(16, 20)).square().mean()  # forward and backward go on
        loss.backward()
        timer = threading.Timer(0.0, go.set)
        timer.start()
        training.optimizer.step()
        timer.join()
        assert go.is_set(), "the optimizer did not wait"
        ckpt.wait()
    other = Training()
    with checkpointer(store, other) as ckpt:
        assert ckpt.restore() == 2
    assert all(torch.equal(a, b) for a, b in zip(other.model.parameters(), then, strict=True))


def test_without_a_hook_that_fires_everything_is_copied_before_step_returns(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training) as ckpt:
        ckpt.step(1)  # no optimizer step before: the hook is not trusted
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.zero_()
        ckpt.wait()
    other = Training()
    with checkpointer(store, other) as ckpt:
        assert ckpt.restore() == 1
    assert any(p.abs().sum() > 0 for p in other.model.parameters())


def test_a_step_is_saved_once(store: HeldStore) -> None:
    training = Training()
    with checkpointer(store, training) as ckpt:
        ckpt.step(3)
        first = ckpt.save_now(3).wait(SHORT_S)
        assert ckpt.save_now(3).wait(SHORT_S) == first
        with pytest.raises(SaveError, match="comes after step 3"):
            ckpt.step(2)
        with pytest.raises(SaveError, match="comes after step 3"):
            ckpt.save_now(1)
    with checkpointer(store, training) as ckpt:
        ckpt.restore()
        with pytest.raises(SaveError):
            ckpt.save_now(1)


def test_memory_stays_in_its_budget(store: HeldStore) -> None:
    state = {"t": torch.randn(6_000_000)}
    options = Options(threads=1, connections=1, host_budget_bytes=16 << 20)  # no room for a copy of 24 MB
    with Checkpointer(store, state, every=Every(steps=1), spot=None, options=options) as ckpt:
        ckpt.step(1)
        assert ckpt.stats.snapshot_bytes == 0
        assert ckpt.stats.durable_step == 1, "training waits until the upload is done"
    assert living(store) == [1]


def test_staged_buffers_are_used_again(store: HeldStore) -> None:
    with checkpointer(store) as ckpt:
        ckpt.save_now(1).wait(SHORT_S)
        ckpt.wait()
        assert ckpt.stats.snapshot_bytes == 0
        pool = ckpt._engine.stager.pool
        of_one = pool.held_bytes
        assert of_one > 0
        for step in range(
            2, 6
        ):  # from the second one on the newest checkpoint's bytes are kept beside the next snapshot's memory
            ckpt.save_now(step).wait(SHORT_S)
            ckpt.wait()
            assert pool.held_bytes == 2 * of_one
            assert pool.bases.n_bytes == pool.free_bytes == of_one


@pytest.mark.parametrize(
    ("state", "problem"),
    [({}, "mapping"), ({"x": 3}, "'x' is int"), ({1: torch.ones(1)}, "expected a name"), ([1], "mapping")],
)
def test_a_state_that_cannot_be_restored_is_refused_at_once(store: HeldStore, state: Any, problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        Checkpointer(store, state, spot=None)


def test_metrics_and_meta_are_checked_at_the_call(store: HeldStore) -> None:
    with checkpointer(store) as ckpt:
        with pytest.raises(TypeError, match="metrics"):
            ckpt.step(1, metrics={"loss": "low"})  # type: ignore[dict-item]
        with pytest.raises(TypeError, match="meta"):
            ckpt.step(1, meta={"x": object()})
        ckpt.step(1, metrics={"loss": float("nan")}, meta={"run": "a", "tags": [1, None]})
        ckpt.wait()
        commit = Catalog(Repository(store)).choose()
        assert commit is not None
        assert commit.commit.meta == {"run": "a", "tags": [1, None]}


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"steps": 0},
        {"steps": -1},
        {"steps": 2.0},
        {"steps": True},
        {"steps": "10"},
        {"minutes": 0},
        {"minutes": True},
        {"minutes": "10"},
        {"minutes": float("nan")},
        {"minutes": float("inf")},
        {"when": 3},
    ],
)
def test_a_schedule_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Every"):
        Every(**wrong)


@pytest.mark.parametrize(("wrong", "words"), [({"every": 100}, r"Every\(steps"), ({"keep": 3}, r"Keep\(last")])
def test_rules_of_another_type_are_refused_at_once(store: HeldStore, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        checkpointer(store, **wrong)


def test_a_mistyped_metric_is_told_once_and_deletes_nothing(store: HeldStore, caplog: pytest.LogCaptureFixture) -> None:
    keep = Keep(last=1, best="val_los")
    with Checkpointer(store, {"x": torch.ones(2)}, every=None, keep=keep, spot=None, grace_s=0.0) as ckpt:
        for step, loss in enumerate((0.9, 0.1, 0.8, 0.7), 1):
            ckpt.save_now(step, metrics={"val_loss": loss}).wait(SHORT_S)
    assert living(store) == [4, 3, 2, 1]
    assert sum("Did you mean 'val_loss'?" in record.message for record in caplog.records) == 1


def test_schedules() -> None:
    assert [s for s in range(1, 21) if Every(steps=5).due(s - 1, s, 0, {})] == [5, 10, 15, 20]
    assert [s for s in range(3, 31, 3) if Every(steps=5).due(s - 3, s, 0, {})] == [6, 12, 15, 21, 27, 30]
    assert Every(minutes=1).due(None, 7, 60.0, {})
    assert not Every(minutes=1).due(None, 7, 59.9, {})
    assert Every(when=lambda step, metrics: metrics["loss"] < 1).due(1, 2, 0, {"loss": 0.5})


def test_all_generators_are_restored() -> None:
    state = RNGState().state_dict()
    expected = (random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist())
    RNGState().load_state_dict(state)
    assert (random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist()) == expected


def test_saving_and_watching_draw_from_no_generator_of_the_training(store: HeldStore) -> None:
    source = GivenNotices()
    before = RNGState().state_dict()
    with checkpointer(store, spot=[source]) as ckpt:  # Training() seeds all generators
        before = RNGState().state_dict()
        ckpt.restore()
        for step in range(1, 4):
            ckpt.step(step)
            ckpt.wait()
    after = RNGState().state_dict()
    assert torch.equal(before["python"]["words"], after["python"]["words"])
    assert torch.equal(before["numpy"]["words"], after["numpy"]["words"])
    assert before["numpy"]["position"] == after["numpy"]["position"]
    assert torch.equal(before["torch"], after["torch"])


def test_no_module_draws_from_the_global_generator() -> None:
    import re
    from pathlib import Path

    draws = re.compile(r"(?<![\w.])random\.(?!Random\b|getstate\b|setstate\b)\w+")
    package = Path(fastckpt.__file__).parent
    found = {p.name: draws.findall(p.read_text()) for p in package.rglob("*.py") if "testing" not in p.parts}
    assert not {name: calls for name, calls in found.items() if calls}


def test_another_store_class_is_accepted_and_left_open(store: HeldStore) -> None:
    closed = []
    store.close = lambda: closed.append(1)  # type: ignore[method-assign]
    with checkpointer(store):
        pass
    assert not closed


def test_an_incarnation_that_saved_is_seen_by_one_that_claims_meanwhile(store: HeldStore) -> None:
    """Row 14 of docs/guarantees.md: a commit between choice and claim is not left behind."""
    options = Options(threads=1, connections=1)
    old = Incarnation(Repository(store), options)
    old.save(sealed({"t": torch.tensor([1.0])}), 1)
    put_if_absent = store.put_if_absent

    def commit_first(key: str, data: Any) -> None:
        if key == keys.epoch_key(2):
            store.put_if_absent = put_if_absent  # type: ignore[method-assign]
            assert (
                old.save(sealed({"t": torch.tensor([2.0])}), 2).save.step == 2
            )  # acknowledged: no newer epoch in sight
        put_if_absent(key, data)

    store.put_if_absent = commit_first  # type: ignore[method-assign]
    new = Incarnation(Repository(store), options)
    choice = new.choose_and_claim()
    assert choice is not None
    assert choice.commit.save.step == 2


@pytest.mark.parametrize(
    "bad",
    [
        {"metrics": {"loss": "low"}},
        {"metrics": {"loss": 10**400}},
        {"metrics": {"\ud800": 1.0}},
        {"meta": {"a": object()}},
        {"meta": {"a": float("nan")}},
        {"meta": {"a": "\ud800"}},
    ],
)
def test_what_no_record_can_hold_is_refused_at_once(tmp_path: Path, bad: dict[str, Any]) -> None:
    model = torch.nn.Linear(2, 2)
    with fastckpt.Checkpointer(tmp_path / "run", {"model": model}, spot=None) as ckpt:
        with pytest.raises(TypeError, match=next(iter(bad))):
            ckpt.save_now(1, **bad)
        assert ckpt.save_now(1).wait().save.step == 1


@pytest.mark.parametrize("setting", ["fresh", "read_only"])
@pytest.mark.parametrize("value", ["false", "no", "", None, 1])
def test_a_switch_that_is_none_is_refused(setting: str, value: Any) -> None:
    """A text out of a configuration is true, and would begin a new history."""
    with pytest.raises(TypeError, match=f"{setting} is {value!r}: expected True or False"):
        Checkpointer(MemoryStore(), {"t": torch.ones(3)}, **{setting: value})


@pytest.mark.parametrize("setting", ["grace_s", "close_timeout_s"])
@pytest.mark.parametrize("value", [-1, float("nan"), "1", None])
def test_a_time_that_is_none_is_refused(setting: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{setting} is {value!r}: expected a number of seconds"):
        Checkpointer(MemoryStore(), {"t": torch.ones(3)}, **{setting: value})


def test_times_without_end_can_be_waited_for(tmp_path: Path) -> None:
    """A state larger than the budget: the fence waits for as long as it is told."""
    forever = float("inf")
    options = Options(max_stall_s=forever, max_order_wait_s=forever, host_budget_bytes=64 << 20, threads=1)
    model = torch.nn.Linear(3000, 3000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(
        MemoryStore(), state, every=Every(steps=1), spot=None, close_timeout_s=forever, options=options
    ) as ckpt:
        for step in (1, 2, 3):
            model(torch.ones(1, 3000)).sum().backward()
            optimizer.step()
            ckpt.step(step)
        ckpt.wait(forever)
        ckpt.save_now(4).wait(forever)
    assert fastckpt.save_async(model.state_dict(), tmp_path / "x", options=options).wait(forever) > 0
