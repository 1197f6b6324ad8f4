"""A device that is lost for good, as a CUDA context is: what was committed stays, and the job can end and start again."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from fastckpt.errors import SaveError
from fastckpt.options import Options
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from fastckpt.training.checkpointer import Checkpointer
from tests.fakegpu import device
from tests.fakegpu.suite.models import Job, inputs
from tests.fakegpu.suite.tools import equal, host

SHORT_S = 20.0  # no wait comes near it
OPTIONS = Options(threads=1, connections=1, compress=False, host_budget_bytes=128 << 20, verify_snapshot="off")


def job(where: torch.device) -> Job:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 520), torch.nn.GELU(), torch.nn.Linear(520, 520)).to(where)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> None:
        model(inputs(number, 16, 32).to(where)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


@pytest.mark.parametrize("after", [0, 3])
def test_a_lost_device_fails_the_save_and_lets_go_of_the_job(
    gpu: torch.device, after: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = job(gpu)
    ckpt = Checkpointer(str(tmp_path), running.state, every=None, keep=None, spot=None, options=OPTIONS)
    try:
        running.step(1)
        ckpt.save_now(1).wait(SHORT_S)
        ckpt.step(1)
        saved = {name: host(one.state_dict()) for name, one in running.state.items()}
        running.step(2)
        device.fail_copy(after, sticky=True)
        raised = []
        try:
            ckpt.save_now(2).wait(SHORT_S)
        except SaveError as error:  # at the call, or in the background: whoever synchronised first
            raised.append(error)
        try:
            ckpt.step(2)
        except SaveError as error:
            raised.append(error)
        assert raised
        assert all("copy engine" in str(error) for error in raised)
        assert all(isinstance(error.__cause__, RuntimeError) for error in raised)
        with pytest.raises(RuntimeError, match="copy engine"):  # training's own: no step of this process ends any more
            running.step(3)
        with pytest.raises(SaveError, match="copy engine"):
            ckpt.save_now(2)
    finally:
        with caplog.at_level(logging.CRITICAL):
            try:
                ckpt.close()  # ends, whatever it says
            except SaveError as error:
                print(f"close: {error}")
        device.mend()
    torch.accelerator.synchronize()
    store = LocalStore(str(tmp_path))
    assert [found.step for found in Catalog(Repository(store)).history()] == [1]

    again = job(gpu)
    with Checkpointer(str(tmp_path), again.state, every=None, keep=None, spot=None, options=OPTIONS) as ckpt:
        assert ckpt.restore() == 1
        assert equal({name: host(one.state_dict()) for name, one in again.state.items()}, saved)
        again.step(2)
        ckpt.save_now(2).wait(SHORT_S)
