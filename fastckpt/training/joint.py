"""Which parts a Checkpointer is made of: those of a process that trains alone, or those of one rank of several."""

from __future__ import annotations

from fastckpt.training.decisions import Decisions, OwnDecisions
from fastckpt.training.ending import Ending
from fastckpt.training.engine import Engine
from fastckpt.training.joint_decisions import JointDecisions
from fastckpt.training.joint_restorer import JointRestorer
from fastckpt.training.restore_asked import Reassign
from fastckpt.training.restorer import Restorer
from fastckpt.training.saver import Saver
from fastckpt.training.schedule import Every


def restorer_of(engine: Engine, *, read_only: bool, reassign: Reassign | None) -> Restorer:
    """What restores for this process."""
    if engine.team is None:
        return Restorer(engine, read_only=read_only, reassign=reassign)
    return JointRestorer(engine, engine.team, read_only=read_only, reassign=reassign)


def decisions_of(engine: Engine, saver: Saver, ending: Ending, every: Every | None) -> Decisions:
    """What decides for this process at each call."""
    made = OwnDecisions if engine.team is None else JointDecisions
    return made(engine, saver, ending, every)
