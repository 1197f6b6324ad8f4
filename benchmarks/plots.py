"""How the reports' plots look: four panels on a page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TITLE = {"fontsize": 10, "loc": "left"}  # of a panel
VALUE = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}  # at the end of a bar


@contextmanager
def panels(path: Path, title: str, height: float, **how: Any) -> Iterator[Any]:
    """Two by two axes to draw on; writes the image at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, height), **how)
    yield axes
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
