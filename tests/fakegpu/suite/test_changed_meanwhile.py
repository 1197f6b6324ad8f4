"""State that is viewed, loaded, freed or resized while a snapshot is under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastckpt.errors import SaveError, TornSnapshotError
from fastckpt.options import Options
from fastckpt.snapshot import snapshot as engine
from fastckpt.snapshot.side_stream import SideStream
from tests.fakegpu.suite.models import Job
from tests.fakegpu.suite.run import RING, SHORT_S, UNVERIFIED, VERIFIED, Run, compare, small, wide
from tests.fakegpu.suite.tools import host, reports


class Operations(TorchDispatchMode):
    """The names of this thread's operations since copies may run."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = False
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.begun:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [UNVERIFIED, VERIFIED], ids=["unverified", "verified"])
def test_views_of_storages_are_made_before_copies_may_run(
    late: torch.device, monkeypatch: pytest.MonkeyPatch, options: Options
) -> None:
    """`set_` counts as a write to the storage: CUDA's sanitizer reports it against the side stream's reads."""

    def make(where: torch.device) -> Job:
        job = small(where)
        part = torch.zeros(600, 600, device=where)[:300]  # a view that is not the whole of its storage
        model = job.state["model"]
        model.register_buffer("part", part)
        model.register_buffer("numbers", torch.zeros(300_000, dtype=torch.complex64, device=where))
        return job

    run = Run(late, make, options=options)
    operations, begin = Operations(), SideStream.begin

    def begun(self: SideStream) -> None:
        begin(self)
        operations.begun = True

    monkeypatch.setattr(SideStream, "begin", begun)
    for _ in range(3):
        run.step()
        operations.begun = False
        with operations:
            run.save()
        run.ckpt.wait(SHORT_S)
    assert any("copy_" in name for name in operations.names)
    assert not [name for name in operations.names if "set_" in name]
    run.check(1, 2, 3)


def test_restore_fences_a_save_that_is_under_way(late: torch.device) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    one = host(run.job.state["model"].state_dict())
    run.train_and_save()
    assert run.ckpt.restore(step=1) == 1, "the older one, although that of step 2 is newer by now"
    compare(one, host(run.job.state["model"].state_dict()))
    assert run.ckpt.restore(step=2) == 2
    run.check(1, 2)


def test_a_state_that_is_loaded_over_a_save_under_way_is_refused(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, raw = threading.Event(), engine.Snapshot.raw

    def after_that(self: engine.Snapshot, *arguments: Any) -> Any:
        assert loaded.wait(SHORT_S)
        return raw(self, *arguments)

    run = Run(gpu)
    run.train_and_save().wait(SHORT_S)
    run.step()
    monkeypatch.setattr(engine.Snapshot, "raw", after_that)  # or it might be committed by then
    run.save()
    model = run.job.state["model"]
    values = {name: value.to(gpu) for name, value in host(model.state_dict()).items()}
    model.load_state_dict(values)  # what it has: training does not see it
    loaded.set()
    with pytest.raises(TornSnapshotError, match=r"changed while it was copied.*Nothing was committed.*ckpt\.fence\(\)"):
        run.ckpt.wait(SHORT_S)
    assert run.committed() == [1]
    assert reports(), "nobody has asked for the fence: the writes are not ordered after the copies"
    run.check(1)


def test_a_state_that_is_loaded_after_the_fence_is_no_harm(gpu: torch.device) -> None:
    run = Run(gpu)
    run.train_and_save().wait(SHORT_S)
    run.train_and_save()
    run.ckpt.fence()
    model = run.job.state["model"]
    model.load_state_dict({name: value.to(gpu) for name, value in host(model.state_dict()).items()})
    run.check(1, 2)


def test_an_optimizers_state_that_is_loaded_meanwhile_takes_new_tensors(late: torch.device) -> None:
    run = Run(late)
    run.train_and_save().wait(SHORT_S)
    run.train_and_save()
    optim = run.job.state["optim"]
    optim.load_state_dict(optim.state_dict())
    run.check(1, 2)


def replaced(tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """By other values, until the snapshot is over: what the result is to be called for."""
    kept = [(tensor, tensor.data) for tensor in tensors]
    for tensor, data in kept:
        tensor.data = torch.full_like(data, 7.0)

    def back() -> None:
        for tensor, data in kept:
            tensor.data = data

    return back


def replace_parameters(run: Run) -> Callable[[], None]:
    return replaced(run.job.state["model"].parameters())


def moments(run: Run) -> list[torch.Tensor]:
    """Unlike parameters, those very tensors are what a snapshot holds."""
    return [
        value
        for state in run.job.state["optim"].state.values()
        for value in state.values()
        if value.device == run.where
    ]


def replace_moments(run: Run) -> Callable[[], None]:
    """In the bundles that a ring copies last, too."""
    return replaced(moments(run))


def free_storages(run: Run) -> Callable[[], None]:
    """As FSDP does with what it has gathered; they come back with the same values."""
    kept = [(tensor, tensor.data.clone(), tensor.untyped_storage().nbytes()) for tensor in moments(run)]
    for tensor, _, _ in kept:
        tensor.untyped_storage().resize_(0)

    def back() -> None:
        for tensor, values, n_bytes in kept:
            tensor.untyped_storage().resize_(n_bytes)
            tensor.data.copy_(values)

    return back


def grow_storages(run: Run) -> Callable[[], None]:
    """They move."""
    kept = [(tensor.untyped_storage(), tensor.untyped_storage().nbytes()) for tensor in moments(run)]
    for storage, n_bytes in kept:
        storage.resize_(2 * n_bytes)

    def back() -> None:
        for storage, n_bytes in kept:
            storage.resize_(n_bytes)

    return back


def delete(run: Run) -> Callable[[], None]:
    """Nobody but the snapshot has the moments any more."""
    optim = run.job.state["optim"]
    kept = [(p, {name: host(value) for name, value in state.items()}) for p, state in optim.state.items()]
    optim.state.clear()

    def back() -> None:
        for parameter, values in kept:
            optim.state[parameter] = {
                name: value.to(run.where) if value.dim() else value for name, value in values.items()
            }

    return back


CHANGES: list[Callable[[Run], Callable[[], None]]] = [
    replace_parameters,
    replace_moments,
    free_storages,
    grow_storages,
    delete,
]


@pytest.mark.parametrize("options", [UNVERIFIED, RING], ids=["whole", "ring"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_storages_that_are_freed_or_resized_before_the_fence(
    late: torch.device, change: Callable[[Run], Callable[[], None]], options: Options
) -> None:
    """What has been copied by then is whole; if anything has not, the save is whole or refused."""
    run = Run(late, wide if options is RING else small, options=options)
    run.train_and_save().wait(SHORT_S)
    run.step()
    run.store.open.clear()
    run.store.reached.clear()
    handle = run.save()
    assert run.store.reached.wait(SHORT_S)
    back = change(run)
    run.store.open.set()
    try:
        handle.wait(SHORT_S)
    except SaveError as error:
        print(f"refused: {error}")
        with pytest.raises(SaveError):
            run.ckpt.wait(SHORT_S)
        assert options is RING, "all copies had been given out"
        assert run.committed() == [1]
    back()
    run.check(1, 2, apart_from=(2,))
