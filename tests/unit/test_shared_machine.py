"""Ranks of one machine share what it has."""

from __future__ import annotations

import pytest

from fastckpt import Options
from fastckpt.ranks.world import ALONE, World, current_world
from fastckpt.spot import open_sources
from fastckpt.spot.sources import FileSource, SignalSource
from tests.support.fake_ranks import as_rank


def test_what_was_left_to_the_defaults_is_shared() -> None:
    whole, part = Options(), Options().shared_by(8)
    assert part.threads == max(1, whole.threads // 8)
    assert part.host_budget_bytes == whole.host_budget_bytes // 8
    assert part.max_load_bytes == whole.max_load_bytes // 8
    assert part.connections == 4  # as few as keep a link busy while one of them syncs
    assert whole.shared_by(1) == whole


def test_what_was_asked_for_stays() -> None:
    asked = Options(threads=3, host_budget_bytes=1 << 30, connections=20)
    part = asked.shared_by(8)
    assert (part.threads, part.host_budget_bytes, part.connections) == (3, 1 << 30, 20)


def test_one_rank_of_a_node_asks_for_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCKPT_NOTICE_FILE", "/nowhere/notice")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert any(isinstance(source, FileSource) for source in open_sources("auto"))
    others = open_sources("auto", leads_node=False)
    assert others
    assert all(isinstance(source, SignalSource) for source in others)
    assert len(open_sources("file:/nowhere/notice", leads_node=False)) == 1  # who asks for it gets it


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 1, 2)),
        ({}, World(3, 4, 0, 1)),
        ({"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 0, 1)),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, World(3, 4, 0, 1)),
        ({"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "-1"}, World(3, 4, 0, 1)),
    ],
)
def test_who_this_process_is(variables: dict[str, str], expected: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert current_world() == ALONE
    with as_rank(3, 4):
        assert current_world() == expected
