"""Relative links in the Markdown files lead somewhere: to a file that exists and, with #anchor, to a heading in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|(?P<ticks>`+)[^`\n].*?(?P=ticks)", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)>\s]+)>?[^)]*\)|^\s*\[[^\]^][^\]]*\]:\s*<?([^\s>]+)", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", re.MULTILINE)
FENCED = re.compile(r"^(```+|~~~+).*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)


def markdown_files() -> list[Path]:
    """What git tracks or would track; outside a git checkout, everything beside the folders that begin with a dot."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.md"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        found = [ROOT / name for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = [p for p in ROOT.rglob("*.md") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
    return sorted({path for path in found if path.exists()})


def blank(match: re.Match[str]) -> str:
    """Keeps the line numbers of what follows."""
    return re.sub(r"[^\n]", " ", match[0])


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a document."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCED.sub(blank, text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.replace("*", "").replace("`", "").lower()).replace(" ", "-")
        count = 0
        while (name := f"{slug}-{count}" if count else slug) in found:
            count += 1
        found.add(name)
    return found


def broken_links(document: Path, root: Path) -> list[str]:
    text = CODE.sub(blank, document.read_text(encoding="utf-8"))
    problems = []
    for match in LINK.finditer(text):
        target = match[1] or match[2]
        if re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
            continue  # http:, mailto: …: not ours to check
        name, _, anchor = unquote(target).partition("#")
        path = (document.parent / name).resolve() if name else document
        if name.startswith("/") or not path.is_relative_to(root):
            reason = "leads out of the repository"
        elif not path.exists():
            reason = "there is no such file"
        elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text(encoding="utf-8")):
            reason = "the file has no such heading"
        else:
            continue
        line = text.count("\n", 0, match.start(match.lastindex or 0)) + 1
        problems.append(f"{document.relative_to(root)}:{line}: {target}: {reason}")
    return problems


@pytest.mark.parametrize("document", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in markdown_files()])
def test_relative_links_lead_somewhere(document: Path) -> None:
    assert not (problems := broken_links(document, ROOT)), "\n" + "\n".join(problems)


def test_the_checker_finds_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A *fine*, `code` heading\n\n```\n# not one\n```\n", encoding="utf-8")
    document = tmp_path / "doc.md"
    document.write_text(
        "[ok](other.md) [ok](other.md#a-fine-code-heading) [ok](https://example.org/x) `[code](gone.md)`\n"
        "```\n[code](gone.md)\n```\n"
        "[1](gone.md) and\n[2](other.md#not-one) and [3](/etc/passwd)\n"
        "[4](#nowhere)\n\n[ref]: ../above.md\n",
        encoding="utf-8",
    )
    assert broken_links(document, tmp_path) == [
        "doc.md:5: gone.md: there is no such file",
        "doc.md:6: other.md#not-one: the file has no such heading",
        "doc.md:6: /etc/passwd: leads out of the repository",
        "doc.md:7: #nowhere: the file has no such heading",
        "doc.md:9: ../above.md: leads out of the repository",
    ]
