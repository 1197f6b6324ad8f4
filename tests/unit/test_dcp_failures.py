"""What FastckptWriter and FastckptReader refuse, and what a failed save leaves behind."""

from __future__ import annotations

import datetime
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import fastckpt
from fastckpt.cli import main
from fastckpt.dcp import FastckptReader, FastckptWriter
from fastckpt.errors import (
    CorruptCheckpointError,
    NoCheckpointError,
    RefusedStateError,
    RepositoryError,
    SaveError,
    TooLargeError,
)
from fastckpt.format.directory import Directory, GlobalPlace, TensorEntry
from fastckpt.integrations.dcp import opened, turns, writer
from fastckpt.integrations.dcp.layout import Layout, layout_of
from fastckpt.integrations.dcp.nested import nested_state
from fastckpt.options import Options
from tests.support.dcp import IGNORED, cause, flip, load, packs, save

pytestmark = pytest.mark.filterwarnings(IGNORED)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_cannot_be_stored_is_listed_at_once(tmp_path: Path) -> None:
    state = {
        "fine": torch.ones(2),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "meta": torch.empty(3, device="meta"),
        "\ud800": torch.ones(1),
    }
    with pytest.raises(CheckpointException) as caught:
        save(tmp_path, state)
    error = cause(caught.value)
    assert isinstance(error, SaveError)
    assert all(f"{name}: " in str(error) for name in ("sparse", "quantized", "meta", r"'\ud800'"))
    assert "fine" not in str(error)
    assert not list(tmp_path.glob("commits/*"))


class Halted(Exception):
    """A process ends here."""


@pytest.mark.parametrize("place", ["begin", "upload", "commit"])
def test_an_overwritten_checkpoint_stays_until_the_new_one_is_committed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.rand(70_000) + 1
    save(tmp_path, {"x": weight})

    def halt(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named) if place != "commit" else None
        assert found is None or place in ("begin", "upload")
        raise Halted

    real = getattr(writer, place)
    with monkeypatch.context() as patched:
        patched.setattr(writer, place, halt)
        with pytest.raises(CheckpointException):
            save(tmp_path, {"x": -weight})
    assert torch.equal(load(tmp_path, {"x": torch.zeros(70_000)})["x"], weight)
    old = packs(tmp_path)
    save(tmp_path, {"x": 2 * weight})
    assert torch.equal(load(tmp_path, {"x": torch.zeros(70_000)})["x"], 2 * weight)
    assert not old[0].exists(), "what was replaced is deleted"
    assert len(packs(tmp_path)) == (2 if place != "begin" else 1)  # an unfinished save stays for its grace


def test_of_two_jobs_the_later_claim_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = turns.begin

    def begin(*arguments: Any) -> Any:
        found = real(*arguments)
        monkeypatch.setattr(writer, "begin", real)
        save(tmp_path, {"x": torch.full((50_000,), 2.0)})  # another job: claims, saves and commits
        return found

    monkeypatch.setattr(writer, "begin", begin)
    save(tmp_path, {"x": torch.rand(50_000)})
    assert (load(tmp_path, {"x": torch.zeros(50_000)})["x"] == 2).all()
    assert main(["check", str(tmp_path)]) == 0


def test_without_overwriting(tmp_path: Path) -> None:
    save(tmp_path, {"x": 1})
    with pytest.raises(CheckpointException) as caught:
        save(tmp_path, {"x": 2}, writer=FastckptWriter(overwrite=False))
    assert isinstance(cause(caught.value), RepositoryError)
    assert load(tmp_path, {"x": 0}) == {"x": 1}
    save(tmp_path / "new", {"x": 2}, writer=FastckptWriter(overwrite=False))


@pytest.mark.parametrize("folder", ["commits", "votes", "data"])
def test_a_damaged_checkpoint_can_be_replaced(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, {"x": torch.rand(70_000)})
    (path,) = (p for p in (tmp_path / folder).rglob("*") if p.is_file())
    flip(path, 100)
    save(tmp_path, {"x": torch.zeros(3)})
    assert load(tmp_path, {"x": torch.ones(3)})["x"].tolist() == [0, 0, 0]
    if folder != "data":
        assert caplog.records


@pytest.mark.parametrize("folder", ["commits", "votes", "data"])
def test_a_flipped_bit_is_an_error_that_names_the_tensor(folder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save(tmp_path, {"small": torch.ones(3), "model": {"weight": torch.randn(300_000)}})
    path = max((p for p in (tmp_path / folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointException) as caught:
        load(tmp_path, {"model": {"weight": torch.zeros(300_000)}})
    error = cause(caught.value)
    assert isinstance(error, CorruptCheckpointError)
    assert isinstance(pickle.loads(pickle.dumps(error)), CorruptCheckpointError)
    if folder == "data":
        assert "model.weight" in str(error)
    with pytest.raises(CorruptCheckpointError):
        FastckptReader(tmp_path).read_state_dict()


def test_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException) as caught:
        load(tmp_path / "nowhere", {"x": 1})
    assert isinstance(cause(caught.value), NoCheckpointError)
    with pytest.raises(NoCheckpointError):
        FastckptReader(tmp_path / "nowhere").read_state_dict()
    with pytest.raises(NoCheckpointError):
        FastckptReader(tmp_path / "nowhere").read_metadata()


def test_other_planners_data_are_refused(tmp_path: Path) -> None:
    class Planner(DefaultSavePlanner):
        def create_global_plan(self, all_plans: Any) -> Any:
            plans, metadata = super().create_global_plan(all_plans)
            metadata.planner_data = {"x": object()}
            return plans, metadata

    with pytest.raises(CheckpointException) as caught:
        save(tmp_path, {"x": torch.ones(2)}, planner=Planner())
    assert isinstance(cause(caught.value), SaveError)
    assert "planner_data" in str(cause(caught.value))
    with pytest.raises(NoCheckpointError):
        FastckptReader(tmp_path).read_metadata()


def test_what_was_not_planned_is_not_committed(tmp_path: Path) -> None:
    class Planner(DefaultSavePlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            new_plan.items.pop()
            return super().finish_plan(new_plan)

    with pytest.raises(CheckpointException, match="lost: nothing where"):
        save(tmp_path, {"x": torch.ones(2), "lost": torch.ones(3)}, planner=Planner())
    # All ranks have voted; but nobody can complete the save.
    main(["check", str(tmp_path), "--repair"])
    with pytest.raises(NoCheckpointError):
        FastckptReader(tmp_path).read_state_dict()
    save(tmp_path, {"x": torch.ones(2)})
    assert FastckptReader(tmp_path).read_state_dict()["x"].all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("damaged", [False, True])
def test_checkpoints_of_a_checkpointer_are_not_replaced(damaged: bool, tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    with fastckpt.Checkpointer(tmp_path, {"model": model}, spot=None) as ckpt:
        ckpt.save_now(1)
        ckpt.save_now(2)
    if damaged:
        flip(max(tmp_path.glob("commits/*")), 100)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointException) as caught:
        save(tmp_path, {"x": 1})
    assert isinstance(cause(caught.value), RepositoryError)
    assert "of a Checkpointer (step" in str(cause(caught.value))
    assert sorted(path for path in tmp_path.rglob("*") if "probe" not in path.parts) == before


def test_a_checkpointer_says_that_it_cannot_restore_one_of_dcp(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    save(tmp_path, {"model": model.state_dict()})
    with (
        fastckpt.Checkpointer(tmp_path, {"model": model}, spot=None) as ckpt,
        pytest.raises(fastckpt.CheckpointError, match="no object"),
    ):
        ckpt.restore()
    with pytest.raises(fastckpt.CheckpointError, match="no object to load"):
        fastckpt.load(tmp_path)


def test_errors_of_the_store_keep_their_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"x": 1})

    def refuse(url: Any) -> Any:
        raise fastckpt.StoreAccessError(f"{url}: no credentials")

    monkeypatch.setattr(opened, "open_store", refuse)
    monkeypatch.setattr(writer, "open_store", refuse)
    for use in (save, load):
        with pytest.raises(CheckpointException) as caught:
            use(tmp_path, {"x": 1})
        assert isinstance(cause(caught.value), fastckpt.StoreAccessError)


def row(name: str, shape: tuple[int, ...], place: GlobalPlace | None, dtype: str = "float32") -> TensorEntry:
    return TensorEntry((name,), dtype, shape, (1,) * len(shape), 0, 0, "tensor", False, place)


SAID = {"dcp": {"format": 1, "has_paths": True}}


@pytest.mark.parametrize(
    ("rows", "meta", "words"),
    [
        ([row("x", (4,), GlobalPlace((3,), (0,)))], SAID, "a block within"),
        ([row("x", (2,), GlobalPlace((3,), (2,)))], SAID, "a block within"),
        ([row("x", (2,), GlobalPlace((3, 1), (0, 0)))], SAID, "a block within"),
        ([row("x", (2,), GlobalPlace((4,), (0,))), row("x", (1,), GlobalPlace((4,), (0,)))], SAID, "one shape"),
        ([row("x", (2,), GlobalPlace((4,), (0,))), row("x", (2,), GlobalPlace((5,), (2,)))], SAID, "as other ranks"),
        (
            [row("x", (1,), GlobalPlace((1,), (0,))), row("x", (1,), GlobalPlace((2,), (1,)), "int8")],
            SAID,
            "as other ranks",
        ),
        ([], {"dcp": {"format": 1, "has_paths": True, "paths": []}}, "paths and empty places"),
        ([], {"dcp": {"format": 1, "has_paths": True, "paths": {"x": [1.5]}}}, "strings and integers"),
        ([], {"dcp": {"format": 1, "has_paths": True, "empty": [[]]}}, "strings and integers"),
    ],
)
def test_votes_that_contradict_are_damage(rows: list[TensorEntry], meta: Any, words: str) -> None:
    listed = Directory((), tuple(rows), meta=meta)
    with pytest.raises(CorruptCheckpointError, match=words):
        layout_of({0: listed}, "somewhere")


def test_a_newer_format_is_unsupported() -> None:
    with pytest.raises(fastckpt.UnsupportedFormatError, match="format 2"):
        layout_of({0: Directory((), (), meta={"dcp": {"format": 2}})}, "somewhere")


@pytest.mark.parametrize("blocks", [{(0,): 2}, {(0,): 2, (1,): 2}, {(0,): 3, (2,): 2}])
def test_a_whole_that_its_blocks_do_not_make_up_is_damage(blocks: dict[tuple[int, ...], int], tmp_path: Path) -> None:
    save(tmp_path, {"x": torch.zeros(4)})
    one = opened.open_checkpoint(str(tmp_path), "latest")
    (source,) = one.layout.tensors["x"].blocks.values()
    one.layout.tensors["x"].blocks = {at: source._replace(shape=(n,)) for at, n in blocks.items()}
    with pytest.raises(CorruptCheckpointError, match="blocks that make up all of it"):
        opened.wholes_of(one, Options(), None)
    one.close()


@pytest.mark.parametrize("paths", [[("a",), ("a", "b")], [("a", "b"), ("a",)], [("a",), ("a",)]])
def test_places_that_contradict_are_damage(paths: list[tuple[str, ...]]) -> None:
    one = Layout(paths={str(n): path for n, path in enumerate(paths)})
    values = {str(n): n for n in range(len(paths))}
    with pytest.raises(CorruptCheckpointError, match="a place of its own"):
        nested_state(values, one, "somewhere", with_empty=True)


def test_an_empty_dictionary_gives_way_to_what_another_rank_has_there() -> None:
    one = Layout(paths={"a.b": ("a", "b"), "l.0": ("l", 0)}, empty={("a",): None, ("l", 0, "x"): None, ("e", 1): None})
    found = nested_state({"a.b": 1, "l.0": 2}, one, "somewhere", with_empty=True)
    assert found == {"a": {"b": 1}, "l": [2], "e": [{}]}


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


def test_loading_runs_no_foreign_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, {"x": Evil(), "y": torch.ones(1)})
    reads: list[Any] = [lambda: load(tmp_path, {"x": None}), lambda: FastckptReader(tmp_path).read_state_dict()]
    for read in reads:
        with pytest.raises((CheckpointException, RefusedStateError)) as caught:
            read()
        error = cause(caught.value) if isinstance(caught.value, CheckpointException) else caught.value
        assert isinstance(error, RefusedStateError)
        assert "builtins.print" in str(error)
        assert "x of" in str(error)
    assert capsys.readouterr().out == ""
    assert load(tmp_path, {"y": torch.zeros(1)})["y"].all()
    load(tmp_path, {"x": None}, reader=FastckptReader(weights_only=False))
    assert capsys.readouterr().out == "code was run\n"


def test_bytes_that_torch_save_has_not_written_are_refused(tmp_path: Path) -> None:
    class Planner(DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            return io.BytesIO(object)

    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script) if torch.__version__ < "2.10" else None
    for data in (b"", b"junk", pickle.dumps(3), *([script.getvalue()] if script.getvalue() else [])):
        save(tmp_path, {"x": data}, planner=Planner())
        with pytest.raises(CheckpointException) as caught:
            load(tmp_path, {"x": None})
        assert isinstance(cause(caught.value), RefusedStateError), data[:10]


def test_harmless_objects_need_no_trust(tmp_path: Path) -> None:
    state = {
        "when": datetime.datetime(2026, 1, 2, 3, 4),
        "loss": np.float64(0.5),
        "nested": (1, {"a": torch.arange(3)}, b"x", Path("a/b")),
        "stream": io.BytesIO(b"abc"),
    }
    save(tmp_path, state)
    found = load(tmp_path, dict.fromkeys(state))
    assert found["when"] == state["when"]
    assert found["loss"] == 0.5
    assert found["stream"].getvalue() == b"abc"
    assert found["nested"][1]["a"].tolist() == [0, 1, 2]
    assert found["nested"][3] == Path("a/b")


def test_a_state_dict_that_is_too_large(tmp_path: Path) -> None:
    save(tmp_path, {"a": torch.zeros(1000)})
    with pytest.raises(TooLargeError):
        FastckptReader(tmp_path, options=Options(max_load_bytes=3999)).read_state_dict()


def all_errors(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    yield kind
    for more in kind.__subclasses__():
        yield from all_errors(more)


def test_every_error_travels_between_ranks() -> None:
    from fastckpt.errors import AbandonedError, CheckpointError, Damage

    made: dict[type, BaseException] = {
        CorruptCheckpointError: CorruptCheckpointError("x", [Damage("vote", "a", "b", "c", ("t",))], "advice"),
        AbandonedError: AbandonedError(3, "!why"),
    }
    for kind in dict.fromkeys(all_errors(CheckpointError)):
        if not kind.__module__.startswith("fastckpt"):
            continue
        error = made.get(kind) or kind("some words")
        error.__cause__ = OSError("a cause")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error)
        assert getattr(again, "damage", ()) == getattr(error, "damage", ())
