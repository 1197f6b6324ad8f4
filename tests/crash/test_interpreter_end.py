"""The end of a real interpreter: what was accepted before it, and what is called while it ends, is there afterwards, or was refused aloud.

Each test starts a Python, which imports torch: three seconds or more.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

import fastckpt
from fastckpt import Checkpointer
from fastckpt.repository.catalog import Catalog
from fastckpt.repository.repository import Repository
from fastckpt.store.local import LocalStore
from fastckpt.trace import read
from tests.support.interpreter import CALLS, IMPORT, USUAL, is_own, run


def saved(path: Path, n: int) -> bool:
    return is_own(fastckpt.load(path), n)


def history(path: Path) -> list[int]:
    """Steps, each of them restored and compared."""
    steps = [found.step for found in Catalog(Repository(LocalStore(path))).history()]
    for step in steps:
        state = {"n": torch.zeros((), dtype=torch.int64), "t": torch.zeros(3_000_000, dtype=torch.int64)}
        with Checkpointer(path, {"s": state}, every=None, spot=None) as ckpt:
            assert ckpt.restore(step=step) == step
        assert is_own(state, step)
    return steps


# -- accepted before -----------------------------------------------------------------------------------------------------

# What is registered last is called first: nothing is written before the end has begun, whatever the machine's pace.
HOLD = """
    from fastckpt.store.local import LocalStore
    from fastckpt.writing import background
    ended, put, write = threading.Event(), LocalStore.put, background.write
    def late_put(self, key, data):
        if key.startswith("data/"):
            ended.wait()
        put(self, key, data)
    def late_write(*arguments):
        ended.wait()
        return write(*arguments)
    LocalStore.put, background.write = late_put, late_write
    threading._register_atexit(ended.set)
"""


@pytest.mark.parametrize("leave", ["", "sys.exit(3)", "raise KeyError('mine')"], ids=["end", "exit", "error"])
def test_all_that_is_pending(tmp_path: Path, leave: str) -> None:
    """Files and a URL, two queued saves with retention behind them, a recording: all in the background when the main thread ends."""
    said = run(
        tmp_path,
        USUAL,
        IMPORT,
        HOLD,
        """
        fastckpt.save_async(own(1), "a")
        fastckpt.save_async(own(2), "b")
        fastckpt.save_async(own(3), f"file://{os.getcwd()}/c")
        state = own(1)
        settings = {"every": None, "spot": None, "options": fastckpt.Options(background_nice=2)}
        ckpt = fastckpt.Checkpointer("run", {"s": state}, keep=fastckpt.Keep(last=1), **settings)
        ckpt.save_now(1)
        state["n"] += 1
        state["t"] += 1
        ckpt.save_now(2)
        """,
        leave,
        code={"": 0, "sys.exit(3)": 3}.get(leave, 1),
        FASTCKPT_TRACE="trace.jsonl",
    )
    assert said == "" if "raise" not in leave else said.endswith("KeyError: 'mine'\n")
    for n, name in enumerate("abc", 1):
        assert saved(tmp_path / name, n)
    assert history(tmp_path / "run") == [2]  # step 1 is retired
    found = read(tmp_path / "trace.jsonl")
    kinds = [event.kind for event in found.events]
    assert (kinds.count("SaveFinished"), kinds.count("CheckpointDurable")) == (5, 2)
    assert not found.notes


def test_a_store_of_somebodys_own_that_uses_an_executor(tmp_path: Path) -> None:
    """Its threads are there, and it is shut down after our wait."""
    said = run(
        tmp_path,
        USUAL,
        IMPORT,
        HOLD,
        """
        from concurrent.futures import ThreadPoolExecutor
        class Store(LocalStore):
            executor = ThreadPoolExecutor(1)
            def put(self, key, data):
                if key.startswith("data/"):
                    ended.wait()
                self.executor.submit(put, self, key, data).result()
        ckpt = fastckpt.Checkpointer(Store("run"), {"s": own(1)}, every=None, spot=None)
        ckpt.save_now(1)
        """,
    )
    assert said == ""
    assert history(tmp_path / "run") == [1]


def test_a_state_larger_than_the_budget_on_its_way_through_a_disk(tmp_path: Path) -> None:
    run(
        tmp_path,
        USUAL,
        IMPORT,
        HOLD,
        """
        options = fastckpt.Options(host_budget_bytes=64 << 20, spill_dir=".", threads=2, connections=1)
        model = torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(14)])  # 68 MB
        optim = torch.optim.SGD(model.parameters())
        ckpt = fastckpt.Checkpointer("run", {"m": model, "o": optim}, every=None, spot=None, options=options)
        torch.save(model.state_dict(), "expected")
        ckpt.save_now(1)
        """,
    )
    expected = fastckpt.load(tmp_path / "expected")
    model = torch.nn.Sequential(*[torch.nn.Linear(1100, 1100) for _ in range(14)])
    optim = torch.optim.SGD(model.parameters())
    with Checkpointer(tmp_path / "run", {"m": model, "o": optim}, every=None, spot=None) as ckpt:
        assert ckpt.restore() == 1
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# -- called while it ends ------------------------------------------------------------------------------------------------


def check_calls(folder: Path, prefix: str = "") -> None:
    assert saved(folder / f"{prefix}a", 1)
    assert saved(folder / f"{prefix}b", 2)
    assert history(folder / f"{prefix}run") == [2, 1]


def test_handlers_of_atexit(tmp_path: Path) -> None:
    """Registered before and after the import: called after and before we have waited for the last time."""
    said = run(
        tmp_path,
        USUAL,
        CALLS,
        "import torch",
        "atexit.register(lambda: calls('early-'))",
        IMPORT,
        "atexit.register(lambda: calls('late-'))",
        FASTCKPT_TRACE="trace.jsonl",
    )
    assert said == ""
    for prefix in ("early-", "late-"):
        check_calls(tmp_path, prefix)
    found = read(tmp_path / "trace.jsonl")
    assert [event.kind for event in found.events].count("CheckpointDurable") >= 2
    assert not found.notes


def test_a_checkpointer_that_atexit_closes(tmp_path: Path) -> None:
    said = run(
        tmp_path,
        USUAL,
        IMPORT,
        HOLD,
        """
        state = own(1)
        ckpt = fastckpt.Checkpointer("run", {"s": state}, every=None, spot=None)
        atexit.register(ckpt.close)
        ckpt.save_now(1)
        """,
    )
    assert said == ""
    assert history(tmp_path / "run") == [1]


def test_the_import_itself(tmp_path: Path) -> None:
    """A handler that is the first to want us."""
    said = run(
        tmp_path,
        USUAL,
        CALLS,
        "import torch",
        """
        @atexit.register
        def last():
            global fastckpt
            import fastckpt
            calls()
        """,
    )
    assert said == ""
    check_calls(tmp_path)


def test_finalizers(tmp_path: Path) -> None:
    """weakref's are called by atexit, `__del__` when modules are gone: by then torch itself pickles nothing, and that is said."""
    said = run(
        tmp_path,
        USUAL,
        CALLS,
        IMPORT,
        """
        class Owner:
            def __del__(self):
                fastckpt.save_async(own(9), "gone")
        owner = Owner()
        weakref.finalize(owner.__class__, calls)
        """,
    )
    check_calls(tmp_path)
    if (tmp_path / "gone").exists():
        assert saved(tmp_path / "gone", 9)
    else:
        assert "Exception ignored in: <function Owner.__del__" in said
    assert not list(tmp_path.glob(".*"))


def test_a_thread_that_trains_on(tmp_path: Path) -> None:
    """The interpreter waits for it, and then for what it has saved last."""
    said = run(
        tmp_path,
        USUAL,
        CALLS,
        IMPORT,
        """
        def train():
            threading.main_thread().join()
            calls(spot=None)  # handlers of signals are the main thread's
        threading.Thread(target=train).start()
        """,
        FASTCKPT_TRACE="trace.jsonl",
    )
    assert said == ""
    check_calls(tmp_path)
    found = read(tmp_path / "trace.jsonl")
    assert [event.kind for event in found.events].count("CheckpointDurable") == 2
    assert not found.notes


def test_a_process_that_others_forked(tmp_path: Path) -> None:
    """multiprocessing ends its children without atexit: they wait for their own saves, and not for the parent's."""
    said = run(
        tmp_path,
        USUAL,
        IMPORT,
        HOLD,
        """
        import multiprocessing, warnings
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        def child():
            global ended
            ended = threading.Event()
            threading._register_atexit(ended.set)
            fastckpt.save_async(own(2), "child")
        if __name__ == "__main__":
            torch.set_num_threads(1)
            fastckpt.save_async(own(1), "parent")
            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join(60)  # the parent's save is held until its own end
            assert process.exitcode == 0, process.exitcode
        """,
    )
    assert said == ""
    assert saved(tmp_path / "parent", 1)
    assert saved(tmp_path / "child", 2)


# -- nothing to wait for -------------------------------------------------------------------------------------------------


def test_an_idle_process_waits_for_nobody(tmp_path: Path) -> None:
    """With no time to wait, whatever there was to wait for would be told."""
    said = run(
        tmp_path,
        USUAL,
        CALLS,
        IMPORT,
        """
        calls()
        ckpt = fastckpt.Checkpointer("other", {"s": own(1)}, every=None)  # stays open
        ckpt.save_now(1)
        ckpt.wait()
        from fastckpt.host import threads
        for thread in list(threads._unfinished):  # has told its outcome, and is about to end
            thread.join()
        """,
        FASTCKPT_EXIT_TIMEOUT_S="0",
    )
    assert said == ""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_somebody_who_does_not_wait(tmp_path: Path) -> None:
    """Ctrl-C ends the wait for a store that hangs, at once and for good, and it is said what is lost."""
    said = run(
        tmp_path,
        USUAL,
        IMPORT,
        """
        import signal
        from fastckpt.store.memory import MemoryStore
        class Hanging(MemoryStore):
            def put(self, key, data):
                if key.startswith("data/"):
                    threading.Event().wait()
                super().put(key, data)
        ckpt = fastckpt.Checkpointer(Hanging(), {"s": own(1)}, every=None, spot=None)
        ckpt.save_now(1)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        threading._register_atexit(signal.setitimer, signal.ITIMER_REAL, 0.3)  # just before we begin to wait
        """,
    )
    assert said.count("the process ends with saves under way, interrupted by KeyboardInterrupt (fastckpt-") == 1
