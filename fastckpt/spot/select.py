"""A Checkpointer's argument `spot` → sources of notices."""

from __future__ import annotations

import os
import signal
from typing import Any

from fastckpt.events import logger
from fastckpt.spot.machine import EC2, cloud
from fastckpt.spot.sources import Ec2Source, FileSource, NoticeSource, SignalSource, SlurmSource
from fastckpt.spot.sources.imds import ImdsClient

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")
"""Signals by which launchers announce an end. SIGINT is not among them: it comes from a person, who does not want to wait."""
_said: set[str] = set()
"""Clouds for which this process has already warned that their notices are not read."""


def open_sources(spec: Any, *, leads_node: bool = True) -> list[NoticeSource]:
    """leads_node: whether this process asks what tells the whole node. With "auto" the others only listen to their own signals.

    None, False or "off": none. "auto": EC2's metadata service unless it is disabled or this is another cloud, SIGTERM, under SLURM
    SIGUSR1, and the file that FASTCKPT_NOTICE_FILE names. "ec2", "signal" (SIGTERM), "SIGUSR1" and the like, "file:/path", joined by
    commas; or a list of sources. ValueError names what is wrong.
    """
    if spec is None or spec is False or spec == "off":
        return []
    if isinstance(spec, (list, tuple)):
        wrong = [
            repr(item)
            for item in spec
            if not callable(getattr(item, "poll", None)) or not isinstance(getattr(item, "name", None), str)
        ]
        if wrong:
            raise ValueError(f"spot: {', '.join(wrong)}: expected sources, with a name and a method poll")
        return list(spec)
    if not isinstance(spec, str):
        raise ValueError(
            f'spot is {spec!r}: expected "auto", "off", "ec2", "signal", "file:/path", or a list of sources'
        )
    if spec == "auto":
        return _auto() if leads_node else [source for source in _auto() if isinstance(source, SignalSource)]
    found: list[NoticeSource] = []
    problems = []
    for word in (part.strip() for part in spec.split(",")):
        if word == "ec2":
            ec2 = _ec2()
            if ec2 is None:
                problems.append("ec2, but AWS_EC2_METADATA_DISABLED is true")
            else:
                found.append(ec2)
        elif word == "signal":
            found.append(SignalSource())
        elif word in _SIGNALS and hasattr(signal, word):
            found.append(SignalSource((signal.Signals[word],)))
        elif word.startswith("file:") and len(word) > len("file:"):
            found.append(FileSource(word.removeprefix("file:")))
        else:
            problems.append(f"{word!r}: expected auto, off, ec2, signal, {', '.join(_SIGNALS)} or file:/path")
    if problems:
        raise ValueError("spot: " + "; ".join(problems))
    return found


def _auto() -> list[NoticeSource]:
    found: list[NoticeSource] = []
    signals: SignalSource
    if "SLURM_JOB_ID" in os.environ and hasattr(signal, "SIGUSR1"):
        signals = SlurmSource((signal.SIGTERM, signal.SIGUSR1))
    else:
        signals = SignalSource()
    found.append(signals)
    path = os.environ.get("FASTCKPT_NOTICE_FILE")
    if path:
        found.append(FileSource(path))
    here, told = cloud(), bool(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"))
    if here in (None, EC2) or told:
        ec2 = _ec2()
        if ec2 is None:
            logger.info("EC2's metadata service is not asked: AWS_EC2_METADATA_DISABLED is true")
        else:
            ec2.optional = here != EC2 and not told
            found.insert(0, ec2)
    elif here not in _said:
        _said.add(here)
        logger.warning(
            "this machine is on %s, whose notices are not read: only %s can tell of its end. Whatever reads them may make the file "
            'that FASTCKPT_NOTICE_FILE names (docs/spot.md). spot="signal" says that this is known',
            here,
            " and ".join(source.name for source in found),
        )
    return found


def _ec2() -> Ec2Source | None:
    client = ImdsClient.from_env()
    return None if client is None else Ec2Source(client)
