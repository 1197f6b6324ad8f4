"""Targets that another process holds, or that belong to another user."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastckpt
from tests.support.forked import run_forked
from tests.support.targets import linux, root, state, step_in


@linux
def test_a_descriptor_is_written_at_its_position_and_nothing_is_cut_off(tmp_path: Path) -> None:
    """What a shell's `> file` makes of /dev/stdout."""
    out = tmp_path / "out"
    script = "import fastckpt; print('before', flush=True); fastckpt.save({'step': 7}, '/dev/stdout')"
    with out.open("wb") as f:
        subprocess.run([sys.executable, "-c", script], stdout=f, check=True, timeout=120)
        inode = os.fstat(f.fileno()).st_ino
    assert out.stat().st_ino == inode
    assert out.read_bytes().startswith(b"before\n")
    with out.open("rb") as f:
        assert f.read(7) == b"before\n"
        assert step_in(f) == 7


@linux
def test_an_empty_file_that_another_process_has_open(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=tmp_path) as f:
        script = "import fastckpt, sys; fastckpt.save({'step': 9}, sys.argv[1])"
        run_forked(script, f.name).check_returncode()
        assert step_in(f) == 9


def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user without rights, if this is root. sys.argv[1:] are the words."""
    script = (
        "import os, sys, fastckpt, torch\n"
        "torch.save({}, os.devnull)\n"  # imports what torch imports late, while it may be read
        "fastckpt.save({}, os.devnull)\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    )
    return run_forked(script + words[0], *words[1:])


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach: pytest's own are closed."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        os.chmod(name, 0o755)


@pytest.mark.parametrize("mode", [0o555, pytest.param(0o1777, marks=root)], ids=oct)
def test_a_directory_that_is_closed(public: Path, mode: int) -> None:
    """An empty file in it is written in place; one that holds bytes is left alone, and the error says what would do."""
    path = public / "x"
    path.touch()
    path.chmod(0o666)
    public.chmod(mode)
    save = "fastckpt.save({'step': int(sys.argv[2])}, sys.argv[1])"
    done = as_nobody(save, str(path), "1")
    assert done.returncode == 0, done.stderr
    assert step_in(path) == 1
    again = as_nobody(save, str(path), "2")
    assert again.returncode == 1
    assert "PermissionError" in again.stderr
    assert "open(path, 'wb')" in again.stderr
    assert ("sticky" if mode & stat.S_ISVTX else "may not be written") in again.stderr
    assert step_in(path) == 1
    given = as_nobody("with open(sys.argv[1], 'wb') as f: fastckpt.save({'step': 3}, f)", str(path))
    assert given.returncode == 0, given.stderr
    assert step_in(path) == 3


@root
def test_rights_of_another_owner_are_not_taken_over(public: Path) -> None:
    """Who may not give the file back to its owner gets no program that runs with somebody's rights."""
    path = public / "x"
    fastckpt.save(state(1), path)
    os.chown(path, 1234, 65534)
    path.chmod(0o6666)
    public.chmod(0o777)
    done = as_nobody("fastckpt.save({'step': 2}, sys.argv[1])", str(path))
    assert done.returncode == 0, done.stderr
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (65534, 65534, 0o666)
