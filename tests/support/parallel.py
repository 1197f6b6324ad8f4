"""How the tests share two processes (pytest-xdist, `make test`): which go together, which come first, which run alone.

Without `-n` nothing here has an effect.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

# These go to the processes first: a long one that starts last would leave the other processes idle. The S3 tests are one long scope;
# they and those of killed ranks mostly wait, which leaves the cores to the test device that runs beside them.
FIRST = (
    "tests/s3/",
    "tests/distributed/test_deaths.py",
    "tests/fakegpu/",
    "tests/distributed/",
    "tests/native/",
    "tests/faults/",
    "tests/crash/",
)
# All of it stays in one process, which starts one S3 server, and a second one would cost another 300 MB.
TOGETHER = ("tests/s3/",)
# Each test is a process of its own that takes up to minutes.
ONE_BY_ONE = ("tests/fakegpu/test_fakegpu.py", "tests/fakegpu/test_gpu_suite.py")
_NAME = "turns_folder"
_FOLDER = pytest.StashKey[str]()
_TURNS = pytest.StashKey["Turns"]()


def scope_of(nodeid: str) -> str:
    """Tests of one scope run in one process, one after the other: a file's, as they share what its fixtures make."""
    file = nodeid.partition("::")[0]
    if file in ONE_BY_ONE:
        return nodeid
    return next((folder for folder in TOGETHER if file.startswith(folder)), file)


class Turns:
    """Locks between the processes of a run: any number of tests at once, or one that runs alone."""

    def __init__(self, folder: Path) -> None:
        # Held for ever: each test takes a turn.
        self._gate = (folder / "gate").open("wb")
        self._running = (folder / "running").open("wb")

    @contextlib.contextmanager
    def turn(self, *, alone: bool) -> Iterator[None]:
        # Whoever waits for `running` holds the gate: else a test that waits to be alone would wait for as long as others begin.
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(self._running, fcntl.LOCK_UN)

    def close(self) -> None:
        self._gate.close()
        self._running.close()


def pytest_configure(config: pytest.Config) -> None:
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker is not None:
        turns = Turns(Path(worker[_NAME]))
        config.stash[_TURNS] = turns
        config.add_cleanup(turns.close)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """In the process that hands out tests, for each that will run them."""
    config = node.config
    if _FOLDER not in config.stash:
        config.stash[_FOLDER] = tempfile.mkdtemp(prefix="fastckpt-turns-")
        config.add_cleanup(lambda: shutil.rmtree(config.stash[_FOLDER], ignore_errors=True))
    node.workerinput[_NAME] = config.stash[_FOLDER]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    config.option.loadscopereorder = False  # the order is ours: how many tests a file has says little about its time
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _TURNS not in config.stash:
        return
    last = len(FIRST)
    items.sort(key=lambda item: next((n for n, folder in enumerate(FIRST) if item.nodeid.startswith(folder)), last))


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout's: waiting for a turn is no part of a test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    turns = item.config.stash.get(_TURNS, None)
    if turns is None:
        return (yield)
    with turns.turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)
