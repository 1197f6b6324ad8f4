"""Saves what can still be read of a damaged checkpoint: every tensor that verifies; and finds older versions of the others.

    votes (by the commit record, or by listing) ─→ every chunk read once ─→ good tensors → container, lost ones → report

`checkpoint.py` drives: `votes.py` finds the indexes, `chunks.py` reads and verifies, `tensors.py` writes, `elsewhere.py` searches other
checkpoints, `report.py` tells.
"""

from fastckpt.upkeep.salvage.checkpoint import salvage
from fastckpt.upkeep.salvage.report import FoundIn, LostTensor, SalvagedRank, SalvageReport, report_to_json
from fastckpt.upkeep.salvage.votes import choose_try, find_votes

__all__ = [
    "FoundIn",
    "LostTensor",
    "SalvageReport",
    "SalvagedRank",
    "choose_try",
    "find_votes",
    "report_to_json",
    "salvage",
]
