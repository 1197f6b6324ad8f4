"""Events → a recording (`recorder.py`), and the views of a recording: a trace, a summary, a picture (docs/cli.md, trace).

recording ─→ parsing ─→ chrome: spans by thread, for Perfetto
                     └→ summary: saves and loads, seconds by stage ─→ picture: a lane for each stage

`import fastckpt` imports only the recorder. The modules that read recordings are imported on demand.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastckpt.trace.chrome import to_chrome
    from fastckpt.trace.parsing import Recorded, Recording, RecordingError, parse, read
    from fastckpt.trace.picture import draw
    from fastckpt.trace.summary import Load, Save, Summary, summarize

_MODULES = {
    "Load": "summary",
    "Recorded": "parsing",
    "Recording": "parsing",
    "RecordingError": "parsing",
    "Save": "summary",
    "Summary": "summary",
    "draw": "picture",
    "parse": "parsing",
    "read": "parsing",
    "summarize": "summary",
    "to_chrome": "chrome",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Load",
    "Recorded",
    "Recording",
    "RecordingError",
    "Save",
    "Summary",
    "draw",
    "parse",
    "read",
    "summarize",
    "to_chrome",
]
