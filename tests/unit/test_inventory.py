"""What lies in a repository, by name."""

from __future__ import annotations

from fastckpt.format.keys import CheckpointId
from fastckpt.repository.inventory import inventory_of
from fastckpt.store.base import ObjectInfo


def test_an_inventory_is_by_form_alone() -> None:
    names = ["commits/000001-000000000002.json", "epochs/000001.json", "epochs/1.json", "fastckpt.json", "pins/a.json"]
    found = inventory_of(ObjectInfo(name, 5, 1.0) for name in names)
    assert found.epochs == (1,)
    assert found.commits == (CheckpointId(1, 2),)
    assert found.unknown == ("epochs/1.json",)
    assert list(found.pins) == ["a"]
    assert found.sizes == dict.fromkeys(names, 5)
