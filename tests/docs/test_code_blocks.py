"""The Python code in README.md and docs/how-to/ runs as it stands there.

The blocks of one document run in order, in one namespace, in an empty directory: who types them in gets what
we get.
A block that cannot run here is fenced as "```python no-run: <reason>".
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))] if path.exists()]
BLOCK = re.compile(r"^```(?:python|py)\b[ \t]*(?P<rest>.*)\n(?P<code>(?:.*\n)*?)^```[ \t]*$", re.MULTILINE)
NO_RUN = re.compile(r"no-run: *\S")


def runnable_blocks(text: str, name: str) -> list[str]:
    """The blocks to run, each below as many empty lines as put it at its place in the document."""
    blocks = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if not match["rest"]:
            blocks.append("\n" * line + match["code"])
        elif not NO_RUN.match(match["rest"]):
            raise ValueError(f"{name}:{line}: after ```python comes nothing, or no-run: and a reason")
    return blocks


@pytest.mark.parametrize("document", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in DOCUMENTS])
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code in runnable_blocks(document.read_text(encoding="utf-8"), document.name):
        exec(compile(code, str(document), "exec", dont_inherit=True), namespace)


def test_blocks_are_found_at_their_lines() -> None:
    text = "# T\n\n```python\n1 / 0\n```\n```python no-run: needs a bucket\nx\n```\n```sh\nls\n```\n```python\ny\n```\n"
    assert runnable_blocks(text, "doc.md") == ["\n" * 3 + "1 / 0\n", "\n" * 12 + "y\n"]
    with pytest.raises(ValueError, match=r"doc\.md:1:"):
        runnable_blocks("```python no-run:\nx\n```\n", "doc.md")
