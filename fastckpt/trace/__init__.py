"""What a recording of events (fastckpt/recording.py) shows: a trace, a summary, a picture (docs/cli.md, trace). Pure, but for reading.

recording ─→ reading ─→ chrome: spans by thread, for Perfetto
                     └→ summary: saves and loads, seconds by stage ─→ picture: a lane for each stage
"""

from fastckpt.trace.chrome import to_chrome
from fastckpt.trace.parsing import Recorded, Recording, RecordingError, parse, read
from fastckpt.trace.picture import draw
from fastckpt.trace.summary import Load, Save, Summary, summarize

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
