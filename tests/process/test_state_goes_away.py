"""Storages that are freed or resized before they have been copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.forked import run_forked

CHANGES = {
    "other data": "weight.data = torch.zeros_like(weight)",
    "deleted": "model = weight = None; optim.state.clear(); optim.param_groups[0]['params'] = []",
    "freed": "weight.untyped_storage().resize_(0)",
    "grown": "weight.untyped_storage().resize_(64 << 20)",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_state_that_goes_away_before_it_has_been_copied(tmp_path: Path, change: str) -> None:
    """Whole, or refused; never torn, and never the end of the process. In one of its own, for that reason."""
    script = """
        import sys, threading, torch, fastckpt
        from fastckpt.snapshot.host_copies import HostCopies
        torch.manual_seed(0)
        model = torch.nn.Linear(2000, 2000)
        optim = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        weight = model.weight
        def step():
            model(torch.ones(2, 2000)).square().mean().backward()
            optim.step()
            optim.zero_grad()
        copying, go, copy = threading.Event(), threading.Event(), HostCopies._copy_in_thread
        def held(self, *arguments):
            copying.set()
            assert go.wait(20)
            copy(self, *arguments)
        options = fastckpt.Options(threads=1, connections=1, compress=False, verify_snapshot="off")
        ckpt = fastckpt.Checkpointer(sys.argv[1], {"m": model, "o": optim}, every=None, spot=None, options=options)
        step()
        ckpt.save_now(1).wait(20)
        ckpt.step(1)
        step()
        expected = model.weight.detach().clone()
        HostCopies._copy_in_thread = held
        handle = ckpt.save_now(2)
        assert copying.wait(20)
        CHANGE
        go.set()
        ckpt.fence()
        try:
            handle.wait(20)
        except fastckpt.SaveError as error:
            print(f"refused: {error}")
            try:
                ckpt.wait(20)
            except fastckpt.SaveError:
                pass
        ckpt.close()
        other = torch.nn.Linear(2000, 2000)
        optim = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
        with fastckpt.Checkpointer(sys.argv[1], {"m": other, "o": optim}, every=None, spot=None) as ckpt:
            if ckpt.restore() == 2:
                assert torch.equal(other.weight, expected)
                print("whole")
    """
    done = run_forked(script.replace("CHANGE", change), str(tmp_path / "run"), timeout_s=60)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    assert "whole" in done.stdout or "refused" in done.stdout
    if change in (CHANGES["other data"], CHANGES["deleted"]):
        assert "whole" in done.stdout, "the snapshot has the memory"
