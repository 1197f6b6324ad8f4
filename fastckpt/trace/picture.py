"""Draws a summary: each save has a lane for each stage, whose height is the number of working threads. Only this module imports
matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.trace.stages import COMMIT, ENCODE, STAGE, STAGES, STALL, UPLOAD, Span
from fastckpt.trace.summary import Save, Summary

MAX_SAVES = 8
"""Largest number of saves in one picture; the last ones are shown."""
_BINS = 1200
_COLORS = {STALL: "#c62828", STAGE: "#1565c0", ENCODE: "#2e7d32", UPLOAD: "#ef6c00", COMMIT: "#6a1b9a"}
_WORDS = {STALL: "training waits", STAGE: "stage", ENCODE: "encode", UPLOAD: "upload", COMMIT: "commit"}

F8 = npt.NDArray[np.float64]


def draw(summary: Summary, title: str) -> bytes:
    """A PNG. ImportError without matplotlib. Its size does not depend on the number of events."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    saves = summary.saves[-MAX_SAVES:]
    rows = max(1, len(saves))
    figure = Figure(figsize=(13, 1.1 + 1.75 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for panel, save in zip(panels, saves, strict=False):
        _draw_save(panel, save)
    if not saves:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no saves were recorded", ha="center", va="center")
    else:
        panels[-1].set_xlabel("seconds since the save began")
    if len(saves) < len(summary.saves):
        title += f": the last {len(saves)} of {len(summary.saves)} saves"
    figure.suptitle(_text(title), fontsize=11, parse_math=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw_save(panel: Any, save: Save) -> None:
    stretch = _stretch(save)
    for row, stage in enumerate(reversed(STAGES)):
        edges, busy = _busy(save.spans[stage], stretch)
        most = float(busy.max(initial=0.0))
        panel.axhline(row, color="#dddddd", linewidth=0.6, zorder=0)
        if most > 0:
            height = row + 0.82 * busy / most
            # The height shows how many threads are at work: one of eight gives a thin line.
            panel.fill_between(
                edges,
                row,
                np.append(height, height[-1:]),
                step="post",
                color=_COLORS[stage],
                linewidth=0.4,
                edgecolor=_COLORS[stage],
            )
        panel.text(1.005, row + 0.4, _numbers(save, stage), transform=_beside(panel), va="center", fontsize=7.5)
    panel.set_yticks([row + 0.4 for row in range(len(STAGES))], [_WORDS[stage] for stage in reversed(STAGES)])
    panel.tick_params(axis="y", length=0, labelsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_ylim(-0.1, len(STAGES))
    panel.set_xlim(0, max(stretch.seconds, 1e-6))
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
    panel.set_title(_text(_headline(save)), loc="left", fontsize=8.5, parse_math=False)


def _stretch(save: Save) -> Span:
    """The time to show: the save, and the stalls that it caused while it was under way, or before its first other event."""
    return Span(min([save.start_s, *(s.start_s for s in save.spans[STALL])]), save.end_s)


def _busy(spans: Sequence[Span], stretch: Span) -> tuple[F8, F8]:
    """Edges of bins, in seconds from the start, and the mean number of threads at work in each."""
    edges = np.linspace(0.0, max(stretch.seconds, 1e-6), _BINS + 1)
    if not spans:
        return edges, np.zeros(_BINS)
    # Seconds of work up to each edge: for a span from b to e, min(max(t - b, 0), e - b).
    starts = np.sort(np.array([span.start_s for span in spans]) - stretch.start_s)
    ends = np.sort(np.array([span.end_s for span in spans]) - stretch.start_s)
    done = _ramp(edges, starts) - _ramp(edges, ends)
    return edges, np.maximum(np.diff(done) / np.diff(edges), 0.0)


def _ramp(times: F8, starts: F8) -> F8:
    """The sum over starts of max(time - start, 0), for each time."""
    count = np.searchsorted(starts, times)
    sums = np.concatenate([[0.0], np.cumsum(starts)])
    result: F8 = count * times - sums[count]
    return result


def _beside(panel: Any) -> Any:
    return panel.get_yaxis_transform()


def _numbers(save: Save, stage: str) -> str:
    if not save.spans[stage]:
        return "–"
    text = f"{save.wall_s(stage):.3g} s"
    speed = save.speed(stage)
    if speed is not None:
        text += f", {speed / 1e9:.3g} GB/s"
    if stage in (ENCODE, UPLOAD, STAGE) and save.wall_s(stage) > 0:
        text += f", ×{save.busy_s(stage) / save.wall_s(stage):.1f}"
    return text


def _headline(save: Save) -> str:
    name = f"step {save.step}" if save.step is not None else save.target[-60:]
    parts = [f"{name} ({save.state})", f"{save.raw_bytes / 1e9:.3g} GB → {save.stored_bytes / 1e9:.3g} GB"]
    parts.append(f"{save.seconds:.3g} s, training waited {save.busy_s(STALL):.3g} s")
    if save.error:
        parts.append(save.error[:80])
    elif save.bottleneck:
        parts.append(f"bottleneck: {save.bottleneck}")
    return "; ".join([*parts, save.process[:60]])


def _text(text: str) -> str:
    """A text that any font can draw: a recording's text may hold any character."""
    return "".join(c if " " <= c <= "~" or c in "→×–" else "?" for c in text)
