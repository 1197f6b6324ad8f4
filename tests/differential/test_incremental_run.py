"""Every checkpoint of a run with differences, restored and compared with `torch.save`; results/incremental_run.json has the long one."""

from __future__ import annotations

import json
from pathlib import Path

import fastckpt
from tests.differential.incremental_run import CHANGES, Story

RESULT = Path(__file__).parent / "results" / "incremental_run.json"


def test_every_checkpoint_is_what_torch_saves() -> None:
    """Fourteen steps in which everything happens once: some 8 s."""
    story = Story(14, seed=1)
    with fastckpt.events.subscribe(story.seen.look):
        seen = story.tell()
    assert seen.compared == seen.steps == 14
    assert story.form == len(CHANGES)
    assert min(seen.failed_saves, seen.restarts, seen.rewinds) >= 1
    assert {"SUBPACK", "REF", "ROT"} <= seen.transforms.keys(), "all kinds of chunks were there to go wrong"


def test_the_long_run_is_recorded() -> None:
    found = json.loads(RESULT.read_text())
    assert found["compared"] == found["steps"] == 300
    assert found["failed_saves"] >= 40
    assert min(found["restarts"], found["rewinds"]) >= 8
