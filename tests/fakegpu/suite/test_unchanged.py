"""Chunks that still have the base's bytes are never copied, whatever the order of streams; all others are, and as they were at the call.

What a writer does with a snapshot is done here by hand: it asks for the digest of each chunk, else for its bytes.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt.errors import BaseLostError, SaveError, TornSnapshotError
from fastckpt.format.digest import digest
from fastckpt.snapshot import FencedTensors, KnownPrints, Snapshot, Stager, fingerprint_op, unchanged
from fastckpt.snapshot.side_stream import SideStream
from fastckpt.state import Captured, Recapturer
from fastckpt.state.chunks import KnownCuts
from tests.fakegpu import device
from tests.fakegpu.suite.models import inputs
from tests.fakegpu.suite.schedules import on
from tests.fakegpu.suite.tools import reports

MIB = 1 << 20


class Run:
    """A frozen backbone, which no optimizer has, and a head that is trained; saved against the newest save that was committed."""

    def __init__(self, where: torch.device, *, verify: str = "off", budget_mib: int = 64) -> None:
        torch.manual_seed(0)
        self.backbone = torch.nn.Sequential(torch.nn.Linear(32, 1100), torch.nn.Linear(1100, 1100)).to(where)
        self.backbone.requires_grad_(False)
        self.head = torch.nn.Linear(1100, 300).to(where)
        self.optim = torch.optim.SGD(self.head.parameters(), lr=1e-2, momentum=0.9)
        self.where, self.n_steps = where, 0
        self.stager = Stager(budget_mib * MIB, 1, "test", 20.0, verify, keeps=True)
        self.recapturer, self.cuts = Recapturer(), KnownCuts()
        self.known: KnownPrints | None = None
        self.expected: list[bytes] = []
        """The digests of all chunks at the last call of save."""
        self.captured: Captured | None = None
        self.step()

    def step(self) -> None:
        self.n_steps += 1
        self.head(self.backbone(inputs(self.n_steps, 4, 32).to(self.where))).square().mean().backward()
        self.optim.step()
        self.optim.zero_grad()

    def chunks_of(self, *tensors: torch.Tensor) -> list[int]:
        """The numbers of the chunks that have nothing but bytes of these tensors. (Small ones lie in a bundle with some of the head's.)"""
        assert self.captured is not None
        addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        storages = {n for n, address in enumerate(self.captured.addresses) if address in addresses}
        chunks = self.cuts.of(self.captured).chunks
        return [n for n, chunk in enumerate(chunks) if all(piece.storage in storages for piece in chunk.pieces)]

    def save(self, *, looks: bool = True) -> Snapshot:
        """Begin to copy the state. looks: see what it is first, which makes the host wait for the device."""
        state = {
            "backbone": self.backbone.state_dict(),
            "head": self.head.state_dict(),
            "optim": self.optim.state_dict(),
        }
        self.captured = captured = self.recapturer.capture(state)
        cuts = self.cuts.of(captured)
        if looks:
            pieces = [[captured.device_bytes(*piece).cpu() for piece in chunk.pieces] for chunk in cuts.chunks]
            self.expected = [digest(torch.cat(some).numpy()) for some in pieces]
        fenced = FencedTensors([self.optim])
        self.looked_bytes = device.bytes_to_host()
        snapshot = self.stager.begin(captured, cuts, fenced, self.n_steps, ring=True, known=self.known)
        assert snapshot is not None
        return snapshot

    def write(self, snapshot: Snapshot) -> list[int]:
        """What a save does with it. The numbers of the chunks that were not copied."""
        found, spared = [], []
        for number in range(len(snapshot.cuts.chunks)):
            known = snapshot.known(number)
            if known is None:
                found.append(digest(snapshot.raw(number, np.empty(4 * MIB, np.uint8))))
                snapshot.release(number)
            else:
                found.append(known)
                spared.append(number)
        snapshot.confirm()
        assert found == self.expected
        return spared

    def commit(self, snapshot: Snapshot) -> list[int]:
        """The same, and the next save has this one as its base."""
        spared = self.write(snapshot)
        prints = snapshot.prints()
        snapshot.close()
        self.known = None if prints is None else KnownPrints(prints, self.expected)
        return spared

    def train_and_save(self) -> list[int]:
        snapshot = self.save()
        with ThreadPoolExecutor(1) as pool:  # a ring advances only when somebody takes chunks out of it
            spared = pool.submit(self.commit, snapshot)
            self.step_behind(snapshot)
            return spared.result()

    def step_behind(self, snapshot: Snapshot) -> None:
        """One of training, whose optimizer waits for the snapshot."""
        hook = self.optim.register_step_pre_hook(lambda *_: snapshot.fence())
        self.step()
        hook.remove()


def frozen(run: Run) -> list[int]:
    found = run.chunks_of(*run.backbone.parameters())
    assert len(found) == 2
    return found


@pytest.mark.parametrize("way", ["kernel", "torch's operators"])
def test_a_frozen_backbone_is_copied_once(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way != "kernel":
        monkeypatch.setattr(unchanged, "fingerprints", lambda chunks, keys: fingerprint_op._on_any(chunks, *keys))
    run = Run(gpu)
    assert run.train_and_save() == []
    for _ in range(3):
        snapshot = run.save()
        run.step_behind(snapshot)
        assert run.commit(snapshot) == frozen(run)
        chunks = snapshot.cuts.chunks
        changed_bytes = sum(chunk.n_bytes for n, chunk in enumerate(chunks) if n not in frozen(run))
        assert changed_bytes < device.bytes_to_host() - run.looked_bytes <= 1.05 * changed_bytes


@on("eager", "copy_late", "starve_copies")
@pytest.mark.parametrize("verify", ["off", "always"])
def test_a_write_that_torch_does_not_count_is_found(gpu: torch.device, verify: str) -> None:
    run = Run(gpu, verify=verify)
    run.train_and_save()
    weight = run.backbone[1].weight
    weight.data[5, 7] = -weight.data[5, 7]
    _, second = frozen(run)
    assert run.train_and_save() == [second]
    assert run.train_and_save() == [second], "it was wrong about the first once"


def test_what_comes_back_to_the_bytes_of_the_base_is_unchanged_though_a_save_in_between_failed(
    gpu: torch.device,
) -> None:
    run = Run(gpu)
    run.train_and_save()
    run.train_and_save()
    for parameter in run.backbone.parameters():
        parameter.data.neg_()
    failed = run.save()
    run.step_behind(failed)
    assert run.write(failed) == []
    failed.fail(SaveError("the store is gone"))
    failed.close()
    for parameter in run.backbone.parameters():
        parameter.data.neg_()
    assert run.train_and_save() == frozen(run)


def test_the_state_may_change_as_soon_as_save_has_returned(gpu: torch.device) -> None:
    """The fingerprints were enqueued before that, and the compute stream waits for them."""
    run = Run(gpu)
    run.train_and_save()
    snapshot = run.save()
    with torch.no_grad():
        for parameter in run.backbone.parameters():
            parameter.add_(1)
    snapshot.fence()
    assert run.commit(snapshot) == frozen(run)
    assert not {*run.train_and_save()} & {*frozen(run)}


@on("eager", "compute_late", "starve_copies")
def test_a_chunk_that_has_changed_and_changes_again_is_torn(gpu: torch.device) -> None:
    """Nothing fences it, and torch has counted neither write: its copy is late, and has not the fingerprint of the call."""
    run = Run(gpu)
    run.train_and_save()
    weight = run.backbone[1].weight
    weight.data.mul_(2)
    snapshot = run.save()
    weight.data.mul_(2)
    snapshot.fence()
    with contextlib.suppress(TornSnapshotError):  # unless the copy came before the second write
        run.write(snapshot)
    snapshot.close()
    reports()  # of a copy that is not ordered with a write


@on("eager", "copy_late", "compute_late")
def test_a_state_larger_than_the_budget_goes_through_a_ring(gpu: torch.device) -> None:
    run = Run(gpu, budget_mib=8)
    run.optim.add_param_group({"params": [*run.backbone.parameters()]})  # so that the fence protects them, too
    assert run.train_and_save() == []
    assert run.train_and_save() == frozen(run)
    assert run.stager.pool.used_bytes == 0


@on("eager", "lazy")
def test_without_device_memory_all_is_copied(gpu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(gpu)
    run.train_and_save()
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("there is no memory")

        patch.setattr(unchanged, "fingerprints", full)
        assert run.train_and_save() == []
    assert [r.message for r in caplog.records if "fingerprints" in r.message] == [
        "no fingerprints of this snapshot's chunks, all of which are copied (OutOfMemoryError: there is no memory)"
    ]
    assert run.train_and_save() == [], "nothing to compare with"
    assert run.train_and_save() == frozen(run)


@on("eager")
def test_a_save_that_has_lost_its_base_ends(gpu: torch.device) -> None:
    run = Run(gpu)
    run.train_and_save()
    snapshot = run.save()
    snapshot.fence()
    assert run.write(snapshot) == frozen(run)
    with pytest.raises(BaseLostError, match="step 2 was not saved: a part of it was not copied"):
        snapshot.raw(frozen(run)[0], np.empty(4 * MIB, np.uint8))
    snapshot.close()


@on("eager", "starve_copies")
def test_a_fence_in_a_captured_graph_waits_on_the_host(gpu: torch.device) -> None:
    run = Run(gpu)
    run.train_and_save()
    snapshot = run.save()
    compute = torch.accelerator.current_stream(gpu)
    x = torch.zeros(8, device=gpu)
    with device.capture(compute):
        snapshot.fence()
        x.add_(1)
    device.replay(compute)
    assert run.commit(snapshot) == frozen(run)


@on("eager")
def test_a_state_that_is_trained_entirely_pays_only_while_it_is_learned(gpu: torch.device) -> None:
    run = Run(gpu)
    del run.backbone[1]
    run.backbone[0].requires_grad_(True)
    run.optim.add_param_group({"params": [*run.backbone.parameters()]})
    run.step()
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        take = unchanged.fingerprints
        patch.setattr(unchanged, "fingerprints", lambda *a: taken.append(run.n_steps) or take(*a))
        for _ in range(7):
            assert run.train_and_save() == []
    assert len(set(taken)) == 3


# -- bugs ----------------------------------------------------------------------------------------------------------------


def test_not_waiting_for_the_fingerprints(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(gpu)
    run.train_and_save()
    monkeypatch.setattr(unchanged, "wait_for", lambda event, is_over=None: True)
    snapshot = run.save()
    with contextlib.suppress(Exception):  # what was read may be poison
        run.step_behind(snapshot)
        assert run.commit(snapshot) == frozen(run)
    snapshot.close()
    assert any("HOST ACCESS" in text for text in reports())


def test_fingerprints_that_do_not_wait_for_the_compute_stream(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(gpu)
    run.train_and_save()
    monkeypatch.setattr(SideStream, "begin", lambda self: None)
    run.step()
    snapshot = run.save(looks=False)
    snapshot.close()
    assert any("RACE: read" in text for text in reports())


def test_the_compute_stream_does_not_wait_for_the_fingerprints(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(gpu)
    run.train_and_save()
    monkeypatch.setattr(SideStream, "hold_back", lambda self, event: None)
    # The thread that compares would order what the host does later with the fingerprints.
    monkeypatch.setattr(unchanged.Unchanged, "wait", lambda self, is_over: None)
    snapshot = run.save(looks=False)
    with torch.no_grad():
        run.backbone[1].weight.add_(1)
    snapshot.close()
    assert any("RACE: write" in text for text in reports())
