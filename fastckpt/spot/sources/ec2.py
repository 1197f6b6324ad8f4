"""Notices of EC2, from its metadata service (`imds.py`)."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable

from fastckpt.spot.notice import Notice
from fastckpt.spot.sources.imds import ImdsClient, Reply

NOTICE_S = 120.0  # the time that EC2 gives for stop and terminate, at best
_SANE_SKEW_S = 600.0
_META = "latest/meta-data/"


class Ec2Source:
    """EC2's interruption notice, its rebalance recommendation, and the decision of an autoscaling group."""

    def __init__(self, client: ImdsClient, wall_clock: Callable[[], float] = time.time) -> None:
        self.name = "ec2"
        self.optional = False
        """True: not being on EC2 is expected, so it is logged only as information."""
        self._client = client
        self._wall_clock = wall_clock
        self._seen: set[tuple[str, str]] = set()

    def poll(self, now_s: float) -> list[Notice]:
        found = []
        action = self._client.get(_META + "spot/instance-action")
        if action is not None:
            found.append(self._action(action, now_s))
        else:
            old = self._client.get(_META + "spot/termination-time")
            left_s = None if old is None else self._left_s(old.text, old)
            # Times in the past stay there if EC2 failed to reclaim the machine.
            if old is not None and left_s is not None and left_s > 0:
                found.append(
                    ("terminate", old.text, Notice("terminate", self.name, now_s + min(left_s, NOTICE_S), old.text))
                )
        rebalance = self._client.get(_META + "events/recommendations/rebalance")
        if rebalance is not None:
            found.append(("rebalance", rebalance.text, Notice("rebalance", self.name, None, rebalance.text[:200])))
        state = self._client.get(_META + "autoscaling/target-lifecycle-state")
        if state is not None and state.text == "Terminated":
            found.append(
                (
                    "lifecycle",
                    "",
                    Notice("lifecycle", self.name, now_s + NOTICE_S, "the autoscaling group ends this machine"),
                )
            )
        fresh = [notice for kind, when, notice in found if (kind, when) not in self._seen]
        self._seen.update((kind, when) for kind, when, _ in found)
        return fresh

    def _action(self, reply: Reply, now_s: float) -> tuple[str, str, Notice]:
        try:
            value = json.loads(reply.text)
            action, when = str(value["action"]), str(value["time"])
        except (ValueError, KeyError, TypeError, RecursionError):
            # The item exists only if the machine will go. So it counts even if its content is cut short.
            action, when = "terminate", ""
        kind = action if action in ("terminate", "stop", "hibernate") else "terminate"
        left_s = self._left_s(when, reply)
        left_s = NOTICE_S if left_s is None else min(max(left_s, 0.0), NOTICE_S)
        if kind == "hibernate":  # hibernation begins at once
            left_s = 0.0
        return kind, when, Notice(kind, self.name, now_s + left_s, f"{action[:40]} at {when[:40]}")

    def _left_s(self, when: str, reply: Reply) -> float | None:
        """Seconds until a UTC time; None if the text is no time."""
        try:
            then = (
                datetime.datetime.strptime(when, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=datetime.timezone.utc).timestamp()
            )
        except ValueError:
            return None
        here_s = self._wall_clock()
        # Use the service's clock, because this machine's may have drifted by minutes; unless the difference is so large that the service's
        # clock must be wrong.
        if reply.date_s is not None and abs(reply.date_s - here_s) <= _SANE_SKEW_S:
            here_s = reply.date_s
        return then - here_s
