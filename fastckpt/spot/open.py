"""What a Checkpointer is told about notices → sources."""

from __future__ import annotations

import os
from typing import Any

from fastckpt.spot.imds import ImdsClient
from fastckpt.spot.sources import Ec2Source, FileSource, NoticeSource, SignalSource


def open_sources(spec: Any) -> list[NoticeSource]:
    """None, False or "off": none. "auto": EC2's metadata service unless it is disabled, SIGTERM, and the file that FASTCKPT_NOTICE_FILE
    names. "ec2", "signal", "file:/path", joined by commas; or a list of sources. ValueError names what is wrong.
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
    found: list[NoticeSource] = []
    if spec == "auto":
        ec2 = _ec2()
        if ec2 is not None:
            ec2.optional = True
            found.append(ec2)
        found.append(SignalSource())
        path = os.environ.get("FASTCKPT_NOTICE_FILE")
        return [*found, FileSource(path)] if path else found
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
        elif word.startswith("file:") and len(word) > len("file:"):
            found.append(FileSource(word.removeprefix("file:")))
        else:
            problems.append(f"{word!r}: expected auto, off, ec2, signal or file:/path")
    if problems:
        raise ValueError("spot: " + "; ".join(problems))
    return found


def _ec2() -> Ec2Source | None:
    client = ImdsClient.from_env()
    return None if client is None else Ec2Source(client)
