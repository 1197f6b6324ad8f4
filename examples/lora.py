"""Fine-tuning with LoRA: the frozen weights travel once, and every later checkpoint is as small as what is trained.

    python examples/lora.py [URL] [--steps N]

Trains small adapters beside a frozen network, and saves all of it, base included, every few steps: each checkpoint can be restored alone,
also on a machine that has never seen the base. Kill it and start it again: it goes on. At the end it lists what each save has stored.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastckpt
from fastckpt import events

WIDTH, LAYERS, RANK = 512, 4, 4
SAVE_EVERY = 5


class Adapted(nn.Module):
    """A frozen linear layer, and a low-rank correction that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def train(url: str, steps: int) -> list[events.CheckpointDurable]:
    """Train up to `steps`, from wherever the newest checkpoint is. Returns what was saved."""
    torch.manual_seed(7)
    model = nn.Sequential(*[layer for _ in range(LAYERS) for layer in (Adapted(), nn.Tanh())])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    saved: list[events.CheckpointDurable] = []

    def note(event: events.Event) -> None:
        if isinstance(event, events.CheckpointDurable):
            saved.append(event)

    # The whole model is given, not its adapters alone: what is frozen is named again by every save, and costs nothing.
    with (
        events.subscribe(note),
        fastckpt.Checkpointer(
            url, {"model": model, "optim": optimizer}, every=fastckpt.Every(steps=SAVE_EVERY)
        ) as ckpt,
    ):
        done = ckpt.restore() or 0
        data = torch.Generator().manual_seed(done)
        for step in range(done + 1, steps + 1):
            x = torch.randn(16, WIDTH, generator=data)
            loss = functional.mse_loss(model(x), x.roll(1, dims=1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if ckpt.step(
                step, metrics={"loss": loss.item()}
            ):  # a notice: the machine will be taken away, and all is saved
                break
        else:
            if steps > done:
                ckpt.save_now(steps)
        ckpt.wait()
    return saved


def main() -> None:
    parser = argparse.ArgumentParser(description="LoRA with small checkpoints")
    parser.add_argument("url", nargs="?", default="lora-run", help="a directory, or s3://bucket/prefix")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    for one in train(arguments.url, arguments.steps):
        print(f"step {one.step}: {one.stored_bytes / 1e6:7.3f} MB stored for {one.raw_bytes / 1e6:.1f} MB of state")
    print(f"fastckpt ls {arguments.url}  # which of them need packs of earlier saves")


if __name__ == "__main__":
    main()
