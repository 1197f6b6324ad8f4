"""Small models of the kinds that people train, each with its state and its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Job(NamedTuple):
    state: dict[str, Any]
    step: Callable[[int], None]


def inputs(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def mlp(where: torch.device, optimizer: Callable[[Any], torch.optim.Optimizer] | None = None) -> Job:
    torch.manual_seed(0)
    # 1 MiB and more in one storage: a chunk of its own.
    model = nn.Sequential(nn.Linear(32, 600), nn.GELU(), nn.Linear(600, 600), nn.GELU(), nn.Linear(600, 8)).to(where)
    optim = optimizer(model.parameters()) if optimizer else torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> None:
        model(inputs(number, 16, 32).to(where)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


def adamw_loop(where: torch.device) -> Job:
    return mlp(where, lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False))


def adamw_foreach(where: torch.device) -> Job:
    return mlp(where, lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True))


def adamw_fused(where: torch.device) -> Job:
    return mlp(where, lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True))


def sgd(where: torch.device) -> Job:
    return mlp(where, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9))


def batch_norm_cnn(where: torch.device) -> Job:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 144, 10),
    ).to(where)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> None:
        model(inputs(number, 4, 3, 16, 16).to(where)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


class Gpt(nn.Module):
    def __init__(self, vocabulary: int = 64, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(32, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length = tokens.shape
        x = self.tokens(tokens) + self.places(torch.arange(length, device=tokens.device))
        for qkv, out, norm in zip(self.qkv, self.out, self.norm, strict=True):
            q, k, v = (t.view(batch, length, 4, -1).transpose(1, 2) for t in qkv(norm(x)).chunk(3, -1))
            x = x + out(
                F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, -1)
            )
        return self.head(x)


def gpt(where: torch.device) -> Job:
    torch.manual_seed(0)
    model = Gpt().to(where)
    # With a small eps the first steps follow the gradients' signs, and so the rounding of whichever attention kernel runs.
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2)

    def step(number: int) -> None:
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(number)).to(where)
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()

    return Job({"model": model, "optim": optim}, step)


def mixed_precision(where: torch.device) -> Job:
    """Every second step has an infinite gradient: the scaler skips the optimizer's, and no hook fires."""
    job = mlp(where)
    model, optim = job.state["model"], job.state["optim"]
    scaler = torch.amp.GradScaler(where.type, growth_interval=2)

    def step(number: int) -> None:
        with torch.autocast(where.type, dtype=torch.bfloat16):
            loss = model(inputs(number, 16, 32).to(where)).float().square().mean()
        scaler.scale(loss).backward()
        if number % 2:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optim)
        scaler.update()
        optim.zero_grad()

    return Job({**job.state, "scaler": scaler}, step)


def accumulation(where: torch.device) -> Job:
    """Three backward passes for each step of the optimizer, and a save after each pass, too."""
    job = mlp(where)
    model, optim = job.state["model"], job.state["optim"]

    def step(number: int) -> None:
        model(inputs(number, 16, 32).to(where)).square().mean().backward()
        if number % 3 == 0:
            optim.step()
            optim.zero_grad()

    return Job(job.state, step)


def two_optimizers(where: torch.device) -> Job:
    torch.manual_seed(0)
    maker, judge = nn.Linear(32, 32).to(where), nn.Linear(32, 1).to(where)
    first, second = (
        torch.optim.AdamW(maker.parameters(), lr=1e-2),
        torch.optim.SGD(judge.parameters(), lr=1e-2, momentum=0.9),
    )

    def step(number: int) -> None:
        x = inputs(number, 16, 32).to(where)
        judge(maker(x)).mean().backward()
        first.step()
        first.zero_grad()
        judge(maker(x).detach()).square().mean().backward()
        second.step()
        second.zero_grad()

    return Job({"maker": maker, "judge": judge, "first": first, "second": second}, step)


def optimizer_in_backward(where: torch.device) -> Job:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 600), nn.GELU(), nn.Linear(600, 600)).to(where)
    optims = {name: torch.optim.AdamW([p], lr=1e-2) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():

        def update(p: torch.Tensor, optim: torch.optim.Optimizer = optims[name]) -> None:
            optim.step()
            optim.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)

    def step(number: int) -> None:
        model(inputs(number, 16, 32).to(where)).square().mean().backward()

    return Job({"model": model, **{name.replace(".", "_"): optim for name, optim in optims.items()}}, step)


def moving_average(where: torch.device) -> Job:
    """An average that is updated in forward: it changes outside of any optimizer's step."""
    job = mlp(where)
    model, optim = job.state["model"], job.state["optim"]
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))

    def step(number: int) -> None:
        average.update_parameters(model)
        model(inputs(number, 16, 32).to(where)).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({**job.state, "average": average}, step)


def closure(where: torch.device) -> Job:
    job = mlp(where)
    model, optim = job.state["model"], job.state["optim"]

    def step(number: int) -> None:
        def loss() -> torch.Tensor:
            optim.zero_grad()
            value = model(inputs(number, 16, 32).to(where)).square().mean()
            value.backward()
            return value

        optim.step(loss)

    return Job(job.state, step)


def lbfgs(where: torch.device) -> Job:
    job = mlp(where, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    model, optim = job.state["model"], job.state["optim"]

    def step(number: int) -> None:
        def loss() -> torch.Tensor:
            optim.zero_grad()
            value = model(inputs(number, 16, 32).to(where)).square().mean()
            value.backward()
            return value

        optim.step(closure=loss)

    return Job(job.state, step)


def mixed_devices(where: torch.device) -> Job:
    """One half on each of two devices (the same one twice where there is only one), and a part on the host."""
    torch.manual_seed(0)
    other = torch.device(where.type, min(1, torch.accelerator.device_count() - 1))
    first, second, third = nn.Linear(32, 600).to(where), nn.Linear(600, 600).to(other), nn.Linear(600, 600)
    optim = torch.optim.AdamW([*first.parameters(), *second.parameters(), *third.parameters()], lr=1e-2, foreach=False)

    def step(number: int) -> None:
        x = second(first(inputs(number, 16, 32).to(where)).to(other))
        third(x.cpu()).square().mean().backward()
        optim.step()
        optim.zero_grad()

    return Job({"first": first, "second": second, "third": third, "optim": optim}, step)


JOBS: dict[str, Callable[[torch.device], Job]] = {
    job.__name__: job
    for job in (
        adamw_loop,
        adamw_foreach,
        adamw_fused,
        sgd,
        batch_norm_cnn,
        gpt,
        mixed_precision,
        accumulation,
        two_optimizers,
        optimizer_in_backward,
        moving_average,
        closure,
        lbfgs,
        mixed_devices,
    )
}
