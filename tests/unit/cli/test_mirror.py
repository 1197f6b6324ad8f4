"""`fastckpt mirror` and `fastckpt cp`: what they print, refuse, and write."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastckpt
from fastckpt import cli
from fastckpt.reading.chunk_reader import Reader
from fastckpt.reading.object_source import BytesSource
from fastckpt.store.local import LocalStore
from fastckpt.upkeep.mirror import files
from tests.support.command_line import rewound, run, run_json
from tests.support.repositories import flip, history, keys_of, save_steps


def test_mirror_says_what_it_copied_and_the_copy_passes_the_check(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewound(store)
    copy = str(tmp_path / "copy")
    status, out, err = run(capsys, "mirror", url, copy)
    assert status == cli.OK
    assert "epoch 2, step 4: copied" in out
    assert "3 checkpoints copied, 0 were there" in out
    assert not err  # no terminal, no bar
    status, value = run_json(capsys, "mirror", url, copy, "--all")
    assert status == cli.OK
    assert value["schema"] == "fastckpt.mirror/1"
    assert value["copied"] == [{"epoch": 1, "step": 3}]
    assert len(value["present"]) == 3
    assert value["repository"] != value["origin"]
    assert run(capsys, "check", copy)[0] == cli.OK
    assert history(LocalStore(copy)) == history(store)
    assert f"a copy of {store.url}" in run(capsys, "ls", copy)[2]
    (listed,) = run_json(capsys, "ls", copy)[1]["repositories"]
    assert listed["origin"] == {"repository": value["origin"], "url": store.url}
    assert run_json(capsys, "ls", url)[1]["repositories"][0]["origin"] is None
    shown = listed["checkpoints"]
    assert [(c["step"], c["branch"]) for c in shown] == [
        (4, "history"),
        (3, "abandoned"),
        (2, "history"),
        (1, "history"),
    ]


def test_a_bar_is_drawn_where_it_is_asked_for(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1])
    assert "%" in run(capsys, "mirror", url, str(tmp_path / "copy"), "--progress")[2]


def test_cp_takes_one_checkpoint(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1, 2])
    newest, first = tmp_path / "newest", tmp_path / "first"
    assert run_json(capsys, "cp", url, str(newest))[1]["copied"] == [{"epoch": 1, "step": 2}]
    assert run_json(capsys, "cp", url, str(first), "--step", "1")[1]["copied"] == [{"epoch": 1, "step": 1}]
    assert run(capsys, "cp", url, str(tmp_path / "no"), "--step", "9")[0] == cli.BAD_CHECKPOINT
    assert not (tmp_path / "no").exists()


def test_damage_at_the_source_is_status_1_and_names_the_pack(
    store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_steps(store, [1, 2])
    pack = keys_of(store, "data/000001-000000000002-000/")[0]
    flip(store, pack)
    status, out, err = run(capsys, "mirror", url, str(tmp_path / "copy"))
    assert status == cli.FOUND_DAMAGE
    assert pack in err
    assert "1 checkpoints copied" in out


def test_wrong_usage(store: LocalStore, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(store, [1])
    file = tmp_path / "a.fckpt"
    fastckpt.save({"w": torch.zeros(3)}, file)
    assert run(capsys, "mirror", url, str(tmp_path / "copy"), "--last", "0")[0] == cli.USAGE
    assert run(capsys, "mirror", str(file), str(tmp_path / "copy"))[0] == cli.BAD_CHECKPOINT
    assert run(capsys, "cp", str(file), str(tmp_path / "b"), "--step", "1")[0] == cli.USAGE
    assert run(capsys, "mirror", url, url)[0] == cli.BAD_CHECKPOINT
    assert run(capsys, "mirror", str(tmp_path / "none"), str(tmp_path / "copy"))[0] == cli.OS_ERROR
    assert not (tmp_path / "copy").exists()


def container(n: int = 3_000_000) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"big": torch.randn(n), "small": torch.arange(7), "same": torch.zeros(2_000_000)}


def test_cp_of_a_container_is_byte_identical_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.fckpt", tmp_path / "b.fckpt"
    fastckpt.save(container(), source)
    status, value = run_json(capsys, "cp", str(source), str(target))
    assert (status, value["verified"], value["n_bytes"]) == (cli.OK, True, source.stat().st_size)
    assert target.read_bytes() == source.read_bytes()
    assert run(capsys, "cp", str(source), str(target))[0] == cli.USAGE  # it exists
    assert run(capsys, "cp", str(source), str(target), "--force")[0] == cli.OK
    (tmp_path / "folder").mkdir()
    assert run(capsys, "cp", str(source), str(tmp_path / "folder"))[0] == cli.OK
    assert (tmp_path / "folder" / "a.fckpt").read_bytes() == source.read_bytes()


def test_cp_to_an_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.fckpt"
    fastckpt.save(container(), source)
    assert run(capsys, "cp", str(source), "memory://cp-of-a-file/model.fckpt")[0] == cli.OK
    assert run(capsys, "cp", str(source), "memory://cp-of-a-file/model.fckpt")[0] == cli.USAGE
    back = tmp_path / "back.fckpt"
    assert run(capsys, "cp", "memory://cp-of-a-file/model.fckpt", str(back))[0] == cli.OK
    assert back.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("place", ["payload", "index", "header"])
def test_cp_of_a_damaged_container_writes_nothing(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.fckpt"
    fastckpt.save(container(), source)
    data = bytearray(source.read_bytes())
    data[{"payload": len(data) // 2, "index": len(data) - 300, "header": 20}[place]] ^= 1
    source.write_bytes(data)
    status, _, err = run(capsys, "cp", str(source), str(tmp_path / "b.fckpt"))
    assert status == cli.BAD_CHECKPOINT
    assert "big" in err or place != "payload"
    assert not (tmp_path / "b.fckpt").exists()


def test_cp_of_another_file_says_that_nothing_was_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.json", tmp_path / "b.json"
    source.write_text(json.dumps([1, 2]))
    status, out, err = run(capsys, "cp", str(source), str(target))
    assert status == cli.OK
    assert "verified" not in out
    assert "no fastckpt container" in err
    assert target.read_bytes() == source.read_bytes()


def test_blocks_cover_all_bytes_and_cut_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    fastckpt.save(container(300_000), written)
    reader = Reader.open(BytesSource(written.getvalue(), "a container"), alone=True)
    for most in (1, 4096, 1 << 20, 1 << 30):
        monkeypatch.setattr(files, "_BLOCK_BYTES", most)
        blocks = files.blocks_of(reader.footer.payload_end, reader.records)
        assert blocks[0].offset == 0
        ends = [block.offset + block.n_bytes for block in blocks]
        assert ends[:-1] == [block.offset for block in blocks[1:]]
        assert ends[-1] == reader.footer.payload_end
        found = sorted(number for block in blocks for number in block.chunks)
        assert found == np.flatnonzero(reader.records["stored_bytes"]).tolist()
        for block in blocks:
            for number in block.chunks:
                first = int(reader.records["offset"][number])
                assert block.offset <= first
                assert first + int(reader.records["stored_bytes"][number]) <= block.offset + block.n_bytes
