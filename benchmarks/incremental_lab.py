"""What all groups of benchmarks/incremental.py share: settings, cached states, and workers in processes of their own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import LIMIT, in_process
from benchmarks.workloads import changing


@dataclass
class Lab:
    """Settings of one run, and what is gathered beside the rows."""

    tasks: Sequence[str]
    forms: Sequence[str]
    gaps: Sequence[int]
    rounds: int
    saves: int
    """Of each long run."""
    jobs: int
    """Long runs at once."""
    run_s: float
    """After so many seconds a long run ends, with fewer saves."""
    stall_size: str
    """Of the model that trains while it is saved (benchmarks/workloads/gpt.py)."""
    quick: bool
    cache: Path
    """Where states lie that were trained before."""
    work: Path
    rivals: str
    """The Python that has moonclip."""
    show: Callable[[str], None]
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    load_averages: list[float] = field(default_factory=list)
    samples: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    """What was done → contender → answers of all rounds."""
    broken: list[str] = field(default_factory=list)

    def states(self, task: str) -> dict[str, str]:
        """Form → folder with the states of that task, made now if they are not there."""
        found: dict[str, str] = {}
        for form in changing.forms(task):
            if form not in self.forms:
                continue
            found[form] = str(changing.cached(task, changing.PRECISIONS[form], self.cache, self.quick))
        return found

    def empty(self, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def worker(self, module: str, asked: Mapping[str, Any], rival: bool = False, **variables: str) -> dict[str, Any]:
        """The answer of a module's worker. rival: it runs where moonclip is."""
        about = f"{module}, {asked.get('contender', '')} {asked.get('task', '')}"
        found = in_process(
            f"benchmarks.{module}",
            [about, json.dumps(asked)],
            self.work / f"{module}-{asked.get('task', '')}.json",
            python=self.rivals if rival else sys.executable,
            variables=variables,
            limit_s=LIMIT + self.run_s,
        )
        self.load_averages += [found["load_average"]] if "load_average" in found else []
        return found

    def keep(self, what: str, name: str, found: dict[str, Any]) -> None:
        """Keep an answer, and tell of it."""
        settings = found.pop("settings", {})
        if "version" in found:
            self.contenders[name] = {"version": found["version"], "settings": settings}
        if "error" in found:
            self.broken.append(f"{what}: {name}: {found['error']}")
        self.samples.setdefault(what, {}).setdefault(name, []).append(found)
        self.show(f"{what}: {name}: {found.get('error', 'done')}")
