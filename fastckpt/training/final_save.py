"""The last save of a run whose machine is about to go: it makes the newest step durable for which there is time."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastckpt import events
from fastckpt.errors import SaveError
from fastckpt.events import logger
from fastckpt.host.deadline import Deadline
from fastckpt.host.threads import hurried
from fastckpt.spot import Notice
from fastckpt.spot.ladder import Rung, rung_of
from fastckpt.training.save_queue import CommitHandle, SaveQueue
from fastckpt.training.saver import OutOfTime, Saver
from fastckpt.writing.rank import SaveAsked


def final_save(
    begin: Callable[[SaveAsked, Deadline], CommitHandle],
    saver: Saver,
    queue: SaveQueue,
    notice: Notice,
    rung: Rung | None,
    asked: SaveAsked,
    target: str,
) -> None:
    """Have the newest step durable that the time allows; blocks until it is.

    Args:
        begin: begins a save.
        rung: what the time allows; None: this finds out.
        asked: the newest step; its save begins here, unless it is under way or was the last.

    Raises:
        SaveError: no step could be made durable in time; or the save's own error.
    """
    left_s = notice.seconds_left(time.monotonic())
    events.emit(events.FinalSave(target=target, step=asked.step, source=notice.source, seconds_left=left_s))
    logger.warning(
        "%s: final save at step %d, %s seconds left",
        notice.source,
        asked.step,
        "?" if left_s is None else f"{left_s:.0f}",
    )
    saved = saver.is_saved(asked.step)
    if saved:
        decision = Rung.FRESH
    elif rung is not None:
        decision = rung
    else:
        estimate = queue.measured_s
        decision = rung_of(left_s, estimate, estimate if len(queue) else 0.0)
    if decision in (Rung.FRESH, Rung.FINISH_THEN_FRESH):
        if decision is Rung.FRESH and not saved:
            queue.cancel()  # the upload of an older step would only take bandwidth from this one
        try:
            handle = begin(asked, notice.deadline)
        except OutOfTime as error:
            raise _too_late(queue, notice, asked.step) from error
        _wait_for(handle, queue, notice)
    elif decision is Rung.FINISH and queue.jobs:
        _wait_for(queue.jobs[0].handle, queue, notice)
    for failure in queue.take_failures():
        logger.warning("an earlier save had failed: %s", failure)


def _too_late(queue: SaveQueue, notice: Notice, step: int) -> SaveError:
    """Give up the saves under way, and make the error that says so and names the newest durable step."""
    queue.cancel()
    last = queue.last_commit
    stands = "no checkpoint of this run" if last is None else f"step {last.save.step}"
    return SaveError(f"{notice.source}: step {step} was not durable when the time was over. What stands is {stands}")


def _wait_for(handle: CommitHandle, queue: SaveQueue, notice: Notice) -> None:
    try:
        with hurried():
            handle.wait(notice.deadline.left_s())
    except TimeoutError as error:
        if handle.done():  # raises the save's own error
            queue.mark_raised(error)
            raise
        raise _too_late(queue, notice, handle.step) from error
    except BaseException as error:
        queue.mark_raised(error)
        raise
