"""Whoever uploads takes a sealed state, and needs no torch for it: another process does it here, which has none."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastckpt
from fastckpt.format.keys import SaveId
from fastckpt.format.sealed_state import SealedState
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.commit import open_vote
from fastckpt.repository.repository import Repository
from fastckpt.store.memory import MemoryStore
from fastckpt.writing.rank import SaveAsked, SaveRequest, upload
from tests.support.repositories import OPTIONS, check_all, read
from tests.support.states import rich_state, same, sealed

UPLOADER = """
import pickle, sys, types

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("this process has no torch")

sys.meta_path.insert(0, Blocked())
package = types.ModuleType("fastckpt")  # its __init__ has what trainings use
package.__path__ = [sys.argv[1]]
sys.modules["fastckpt"] = package

from dataclasses import replace
from pathlib import Path
from fastckpt.errors import TornSnapshotError
from fastckpt.format.keys import SaveId
from fastckpt.options import Options
from fastckpt.repository.commit import try_commit
from fastckpt.repository.repository import Repository
from fastckpt.store.memory import MemoryStore
from fastckpt.writing.rank import SaveAsked, SaveRequest, upload

class Given:
    any_order = True

    def __init__(self, chunks, torn=False):
        self.chunks, self.torn, self.released = chunks, torn, []

    def raw(self, number, scratch):
        raw = scratch[: len(self.chunks[number])]
        raw[:] = memoryview(self.chunks[number])
        return raw

    def release(self, number):
        self.released.append(number)

    def confirm(self):
        assert self.released == [*range(len(self.chunks))]
        if self.torn:
            raise TornSnapshotError("the copies are of two states")

    def close(self):
        pass

form, chunks = pickle.loads(Path(sys.argv[2]).read_bytes())
store = MemoryStore()
repository = Repository(store)
repository.initialise()
epoch = repository.claim(None).number
options = Options(threads=2, connections=2)
for step, torn in ((1, True), (2, False)):
    save = SaveId(epoch, step, 0)
    request = SaveRequest(asked=SaveAsked(step), save=save, parent=None)
    try:
        upload(replace(form, source=Given(chunks, torn)), store, request, options)
    except TornSnapshotError:
        assert torn
        assert not list(store.list("votes/"))
    else:
        assert not torn
        assert try_commit(store, save)
assert not [name for name in sys.modules if name.partition(".")[0] == "torch"]
Path(sys.argv[3]).write_bytes(pickle.dumps({info.key: bytes(store.get(info.key)) for info in store.list("")}))
"""


def chunks_of(state: SealedState) -> list[bytes]:
    """The bytes of all chunks, as another process may be sent them."""
    scratch = np.empty(max(chunk.n_bytes for chunk in state.chunks), np.uint8)
    return [state.source.raw(number, scratch).tobytes() for number in range(len(state.chunks))]


def test_a_process_without_torch_uploads_votes_and_commits(tmp_path: Path) -> None:
    """And what the copies' owner does not confirm, it does not vote for. Takes 2 s: a Python of its own."""
    obj = {key: value for key, value in rich_state(1).items() if key != "array"}  # which needs weights_only=False
    state = sealed(obj)
    assert state.own_bytes == state.n_bytes == sum(map(len, chunks_of(state)))
    form: Any = replace(state, source=None)  # type: ignore[arg-type]
    given, out = tmp_path / "sealed", tmp_path / "objects"
    given.write_bytes(pickle.dumps((form, chunks_of(state))))
    package = str(Path(fastckpt.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", UPLOADER, package, str(given), str(out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    store = MemoryStore()
    for key, data in pickle.loads(out.read_bytes()).items():
        store.put(key, data)
    choice = Catalog(Repository(store)).choose()
    assert choice is not None
    assert choice.commit.save.step == 2
    assert same(read(store, choice.commit), obj)
    check_all(store)
    assert open_vote(store, choice.commit.vote(0)).directory.writer["torch"] == str(torch.__version__)
    here = MemoryStore()
    upload(state, here, SaveRequest(asked=SaveAsked(2), save=SaveId(1, 2, 0), parent=None), OPTIONS)
    assert packs(here, 2) == packs(store, 2), "the same bytes as an upload of the process that trains"


def packs(store: MemoryStore, step: int) -> list[bytes]:
    return [bytes(store.get(info.key)) for info in store.list("data/") if f"-{step:012}-" in info.key]
