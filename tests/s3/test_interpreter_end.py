"""The end of a real interpreter with saves to S3: boto3 runs programs. Each test starts a Python, 5 s."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import pytest
import torch

import fastckpt
from fastckpt import Checkpointer
from tests.s3server import S3Server
from tests.support.interpreter import CALLS, IMPORT, USUAL, is_own, run

pytestmark = pytest.mark.s3


def check(prefix: str) -> None:
    assert is_own(fastckpt.load(f"{prefix}a"), 1)
    assert is_own(fastckpt.load(f"{prefix}b"), 2)
    for step in (1, 2):
        state = {"n": torch.zeros((), dtype=torch.int64), "t": torch.zeros(3_000_000, dtype=torch.int64)}
        with Checkpointer(f"{prefix}run", {"s": state}, every=None, spot=None) as ckpt:
            assert ckpt.restore(step=step) == step
        assert is_own(state, step)


@pytest.mark.parametrize("registered", ["before the import", "after it"])
def test_handlers_of_atexit(aws: pytest.MonkeyPatch, bucket: str, tmp_path: Path, registered: str) -> None:
    """Nothing of boto3 has been imported until then."""
    script = [IMPORT, f"atexit.register(lambda: calls('s3://{bucket}/x-'))"]
    if registered == "before the import":
        script = ["import torch", script[1], IMPORT]
    assert run(tmp_path, USUAL, CALLS, *script) == ""
    check(f"s3://{bucket}/x-")


def test_pending_saves_whose_keys_a_program_gives(
    aws: pytest.MonkeyPatch, s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    """Each key is about to expire, so that the program runs before every request: those of the end too."""
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5)
    keys = {"AccessKeyId": s3_server.access_key, "SecretAccessKey": s3_server.secret_key}
    answer = tmp_path / "keys.json"
    answer.write_text(json.dumps({"Version": 1, "Expiration": soon.isoformat(), **keys}))
    program = tmp_path / "program.py"
    program.write_text(f"open({str(tmp_path / 'calls')!r}, 'a').write('.')\nprint(open({str(answer)!r}).read())\n")
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {sys.executable} -S -E {program}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws.delenv(name)
    said = run(
        tmp_path,
        USUAL,
        CALLS,
        IMPORT,
        f"""
        from fastckpt.store.cloud import S3Store
        ended, put = threading.Event(), S3Store.put
        def late(self, key, data):
            if "x-run" not in self.url or key.startswith("data/"):
                ended.wait()
                ends.append(key)
            put(self, key, data)
        ends = []
        S3Store.put = late
        def end():
            global ran
            ran = os.path.getsize("calls")
            ended.set()
        threading._register_atexit(end)
        atexit.register(lambda: print(len(ends), os.path.getsize("calls") - ran, file=sys.stderr))
        state = own(1)
        ckpt = fastckpt.Checkpointer("s3://{bucket}/x-run", {{"s": state}}, every=None, spot=None)
        fastckpt.save_async(own(1), "s3://{bucket}/x-a")
        fastckpt.save_async(own(2), "s3://{bucket}/x-b")
        ckpt.save_now(1)
        state["n"] += 1
        state["t"] += 1
        ckpt.save_now(2)
        """,
        AWS_CONFIG_FILE=str(config),
    )
    puts, runs = map(int, said.split())
    assert puts >= 4
    assert runs >= puts, "the program ran at the end, too"
    aws.setenv("AWS_CONFIG_FILE", str(config))
    check(f"s3://{bucket}/x-")
