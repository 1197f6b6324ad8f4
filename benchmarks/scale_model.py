"""How long a node of 8 × 80 GB needs to save at 100 Gbit/s, and on how many cores: a model of costs that were measured. No pass or fail.

    python benchmarks/scale_model.py benchmarks/results/2026-11-28-storage.json [--json]

A save is a pipeline: copies off the devices, encoding and sending go on at once, so the slowest of them decides, and what comes before
and after is added. The costs of processors come from the result of `make bench-storage` (its row group `cpu`), everything else is assumed,
and each assumption is varied. `docs/scale.md` shows the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import tables

AIM_S, AIM_CORES = 95.0, 8


@dataclass(frozen=True)
class Node:
    """The inputs. Sizes in bytes, rates in bytes a second."""

    state_bytes: float = 8 * 80e9
    """All device memory: no job's state is larger."""
    cores: float = AIM_CORES
    encode_s_per_gib: float = 0.0
    """Processor seconds of the codec for a GiB of state. Measured."""
    other_s_per_gib: float = 0.0
    """Processor seconds of everything else of a save over TLS, for a GiB of state: copies, digests of packs, TLS, sockets. Measured."""
    ratio: float = 1.0
    """Stored bytes ÷ bytes of the state. Measured, of this workload: fp32 with AdamW."""
    core: float = 1.0
    """Speed of the node's cores, as a multiple of this machine's. Assumed."""
    link_bytes_per_s: float = 100e9 / 8
    goodput: float = 0.9
    """Share of the link that bodies get. Assumed; connections enough for it are."""
    copy_bytes_per_s: float = 8 * 20e9
    """Off all devices, to pinned memory. Assumed: PCIe 4 × 16 each."""
    before_s: float = 3.0
    """From the call to the first bytes on the link: agreement of the ranks, the first chunks. Assumed."""
    after_s: float = 1.5
    """From the last pack to the commit: its own put, votes, one conditional put. Assumed: 0.4 s and some 10 requests of 0.1 s."""


@dataclass(frozen=True)
class Save:
    """What the model says of one node."""

    link_s: float
    processor_s: float
    copy_s: float
    seconds: float
    cores_for_the_link: float
    """That the processors are no slower than the link."""

    @property
    def bound_by(self) -> str:
        parts = {"link": self.link_s, "processors": self.processor_s, "copies": self.copy_s}
        return max(parts, key=lambda name: parts[name])


def save_of(node: Node) -> Save:
    """The model."""
    core_s = node.state_bytes / 2**30 * (node.encode_s_per_gib + node.other_s_per_gib) / node.core
    link_s = node.state_bytes * node.ratio / (node.link_bytes_per_s * node.goodput)
    processor_s, copy_s = core_s / node.cores, node.state_bytes / node.copy_bytes_per_s
    seconds = node.before_s + max(link_s, processor_s, copy_s) + node.after_s
    return Save(link_s, processor_s, copy_s, seconds, core_s / link_s)


def node_of(result: dict[str, Any]) -> Node:
    """A node with the costs that a run of benchmarks/storage.py has measured. ValueError: it measured none."""
    samples = result["samples"]

    def middle(what: str, name: str, key: str) -> float:
        values = [one[key] for one in samples.get(what, {}).get(name, []) if key in one]
        if not values:
            raise ValueError(f"the result has no {key} of {name} ({what}): run `make bench-storage`, or its group cpu")
        return float(statistics.median(values))

    raw_bytes = middle("cpu", "encode alone", "raw_bytes")
    encode = middle("cpu", "encode alone", "encode_cpu")
    whole = middle("cpu, https", "Checkpointer", "cpu")
    gib = raw_bytes / 2**30
    return Node(
        encode_s_per_gib=encode / gib,
        other_s_per_gib=max(0.0, whole - encode) / gib,
        ratio=middle("cpu", "encode alone", "stored_bytes") / raw_bytes,
    )


def changed(node: Node, name: str, factor: float) -> Node:
    """The node with one input × factor; no share is larger than 1."""
    value = getattr(node, name) * factor
    return replace(node, **{name: min(value, 1.0) if name in ("ratio", "goodput") else value})


def lines(node: Node) -> list[str]:
    """What the model says, and what each input changes."""
    save = save_of(node)
    found = [
        f"{save.seconds:.0f} s on {node.cores:.0f} cores, bound by {save.bound_by}: link {save.link_s:.1f} s, processors "
        f"{save.processor_s:.1f} s, copies {save.copy_s:.1f} s, before and after {node.before_s + node.after_s:.1f} s. "
        f"{save.cores_for_the_link:.1f} cores keep up with the link. Aim: {AIM_S:.0f} s with {AIM_CORES} cores.",
        "",
        *tables.head(
            ["input", "value", "seconds with half", "with twice as much", "cores for the link with half", "with twice"]
        ),
    ]
    for field in fields(node):
        less, more = (save_of(changed(node, field.name, factor)) for factor in (0.5, 2.0))
        cells = [f"{less.seconds:.0f}", f"{more.seconds:.0f}"]
        cells += [f"{less.cores_for_the_link:.1f}", f"{more.cores_for_the_link:.1f}"]
        found.append(tables.row([field.name.replace("_", " "), f"{getattr(node, field.name):.4g}", *cells]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="of benchmarks/storage.py")
    parser.add_argument("--json", action="store_true", help="print the inputs and the model's answers")
    args = parser.parse_args(arguments)
    try:
        node = node_of(json.loads(args.result.read_text()))
    except (OSError, ValueError) as error:
        print(f"{args.result}: {error}", file=sys.stderr)
        return 1
    if args.json:
        found = {
            f"{field.name} x {factor:g}": asdict(save_of(changed(node, field.name, factor)))
            for field in fields(node)
            for factor in (0.5, 2.0)
        }
        print(json.dumps({"inputs": asdict(node), "saves": {"as given": asdict(save_of(node)), **found}}))
    else:
        print("\n".join(lines(node)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
