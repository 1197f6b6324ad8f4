"""What ranks run in these tests. Functions of this module are called in processes of their own (`tests.support.ranks`)."""

from __future__ import annotations

import contextlib
import logging
import os
import runpy
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fastckpt
from fastckpt import Every, Options

OPTIONS = {"threads": 1, "connections": 2, "host_budget_bytes": 256 << 20}


TRAINS_FSDP2 = hasattr(torch.cpu.Stream, "record_event")
"""Whether FSDP2 of this torch trains on a CPU: that of 2.6 does not."""
NEEDS_FSDP2 = ("fsdp", "hsdp", "fsdp_tp")


class Block(nn.Module):
    """What is sharded together."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.b(torch.relu(self.a(x)))
        return found


class Net(nn.Module):
    """A few layers that every kind of parallelism can divide, evenly and not."""

    def __init__(self, width: int = 30, hidden: int = 50, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)


class WithOwnExpert(nn.Module):
    """A part that ranks hold alike, and one that each has for itself."""

    def __init__(self, shared: nn.Module, width: int) -> None:
        super().__init__()
        self.shared = nn.parallel.DistributedDataParallel(shared)
        self.expert = nn.Linear(width, width)
        with torch.no_grad():
            self.expert.weight.add_(dist.get_rank())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.shared(x) + self.expert(x)
        return found


class Training:
    """A model under some parallelism, with AdamW; `mode`: plain, ddp, fsdp, tp, fsdp_tp, hsdp, pipeline, experts."""

    def __init__(self, mode: str, seed: int = 0, **sizes: int) -> None:
        torch.manual_seed(seed)
        rank, world = dist.get_rank(), dist.get_world_size()
        # Ranks that hold parts of one layer see the same data.
        self.data_rank = {"tp": 0, "fsdp_tp": rank // max(1, world // 2)}.get(mode, rank)
        self.model = parallel(Net(**sizes), mode)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.state = {"model": self.model, "optimizer": self.optimizer, "rng": fastckpt.RNGState()}

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(1000 * number + self.data_rank)
        first = next(m for m in self.model.modules() if isinstance(m, nn.LayerNorm))
        x = torch.randn(8, first.normalized_shape[0], generator=generator)
        self.optimizer.zero_grad()
        self.model(x).pow(2).mean().backward()
        self.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's own bytes of everything."""
        found = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for number, one in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": t for name, t in one.items()}
        return {name: local(t).detach().clone() for name, t in found.items()}

    def wholes(self) -> dict[str, torch.Tensor]:
        """Everything, as it would be on one rank without wrappers."""
        found = {f"model.{name.removeprefix('module.')}": t for name, t in self.model.state_dict().items()}
        for number, one in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{name}": t for name, t in one.items()}
        return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in found.items()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def parallel(model: nn.Module, mode: str) -> nn.Module:
    if mode == "plain":
        return model
    if mode == "pipeline":  # each rank has other layers
        model.layers = nn.ModuleList([*model.layers][: 1 + dist.get_rank()])
        return model
    if mode == "experts":
        return WithOwnExpert(model, 30)
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    world = dist.get_world_size()
    blocks: Any = model.layers

    def tensor_parallel(mesh: Any) -> None:
        for block in blocks:
            parallelize_module(block, mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})

    if mode == "fsdp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif mode == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s"))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif mode == "tp":
        tensor_parallel(init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))
    elif mode == "fsdp_tp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        tensor_parallel(mesh["tp"])
        for block in blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def checkpointer(url: str, training: Training, **settings: Any) -> fastckpt.Checkpointer:
    logging.basicConfig(level=logging.INFO)
    settings = {"every": Every(steps=5), "spot": None, "options": Options(**OPTIONS), **settings}
    return fastckpt.Checkpointer(url, training.state, **settings)


def train(
    url: str, mode: str, steps: int, every: int, seed: int, sizes: dict[str, int] | None = None, cache_dir: str = ""
) -> dict[str, Any]:
    """Train from what was saved, if there is anything: this rank's tensors at the end, and where it began."""
    training = Training(mode, seed=seed, **(sizes or {}))
    options = Options(**OPTIONS, cache_dir=cache_dir)
    with checkpointer(url, training, every=Every(steps=every), options=options) as ckpt:
        start = ckpt.restore()
        for step in range(start, steps):
            training.step(step)
            ckpt.step(step + 1)
    return {"start": start, "tensors": training.tensors(), "rng": torch.get_rng_state()}


def by_modulus(key: str, states: Any, rank: int, world: int) -> Any:
    """What was a saved rank's own goes to the ranks of its number, and again to later ones."""
    return states[rank % len(states)]


def save_whole(url: str, mode: str) -> None:
    """Train two steps and save. All tensors, whole, lie beside it then."""
    training = Training(mode)
    with checkpointer(url, training, every=None) as ckpt:
        ckpt.restore()
        for step in range(2):
            training.step(step)
            ckpt.step(step + 1)
        ckpt.save_now(2).wait()
    wholes = training.wholes()
    if dist.get_rank() == 0:
        torch.save(wholes, f"{url}.pt")


def load_wholes(urls: list[str], mode: str) -> list[list[str]]:
    """Restore each of several runs into another training, every second one into an optimizer that has a state already, and train on. What
    `save_whole` returned lies beside each. Returns the names of tensors that came back otherwise.
    """
    wrong = []
    for number, url in enumerate(urls):
        training = Training(mode, seed=99)
        if number % 2:
            training.step(77)
        with checkpointer(url, training, every=None, read_only=True, reassign=by_modulus) as ckpt:
            assert ckpt.restore() == 2
        saved, found = torch.load(f"{url}.pt"), training.wholes()
        assert found.keys() == saved.keys()
        wrong.append([name for name, tensor in saved.items() if not same(tensor, found[name])])
        training.step(2)
    return wrong


def fill_wholes(sources: list[str], saved: str, mode: str) -> list[str]:
    """Load the model of each of several checkpoints into another training's. What `save_whole` returned lies at `saved`. Returns the names
    of tensors that came back otherwise.
    """
    wrong = []
    for source in sources:
        training = Training(mode, seed=99)
        with fastckpt.open(source) as reader:
            reader.load_into({"model": training.model})
        wholes, found = torch.load(saved), training.wholes()
        wrong += [n for n, tensor in wholes.items() if n.startswith("model.") and not same(tensor, found[n])]
    return wrong


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


class Loader:
    """As a data loader that says where it is, and that nobody else can tell what to make of."""

    def __init__(self, position: int) -> None:
        self.position = position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def own_things(number: float) -> dict[str, Any]:
    """What ranks hold alike, and what each has for itself."""
    rank = dist.get_rank()
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, number)
    return {
        "model": nn.parallel.DistributedDataParallel(model),
        "alike": {"list": [1, "x"], "t": torch.ones(3), "nan": float("nan")},
        "own": {"place": torch.full((2,), float(rank))},
        "loader": Loader(10 * rank),
        "kept": Loader(5 + rank),
        "rng": fastckpt.RNGState(),
    }


def save_own_things(url: str) -> None:
    state = own_things(2.5)
    torch.manual_seed(1000 + dist.get_rank())
    options = Options(**OPTIONS)
    with fastckpt.Checkpointer(url, state, every=None, spot=None, options=options) as ckpt:
        ckpt.restore()
        ckpt.save_now(1).wait()


def restore_own_things(url: str, what: str) -> str:
    rank = dist.get_rank()
    state = own_things(0.0)
    state["alike"] = {}
    state["kept"].position = 7

    def reassign(key: str, states: Any, rank: int, world: int) -> Any:
        assert (len(states), world) == (2, 3)
        return None if key == "kept" else states[rank % 2]

    settings: dict[str, Any] = {"reassign": reassign} if what == "reassigned" else {}
    if what == "declared":
        settings = {"reassign": reassign, "replicated": ("own", "loader.position")}
    options = Options(**OPTIONS)
    with fastckpt.Checkpointer(url, state, every=None, spot=None, options=options, **settings) as ckpt:
        try:
            assert ckpt.restore() == 1
        except fastckpt.CheckpointError as error:
            return f"{type(error).__name__}: {error}"
    torch_state = torch.get_rng_state()
    torch.manual_seed(1000 + rank % 2)
    rng = rank % 2 if torch.equal(torch_state, torch.get_rng_state()) else None
    weight = state["model"].module.weight
    return (
        f"model {float(weight.detach().unique())}, alike {state['alike']['list']}, own {float(state['own']['place'][0])}, "
        f"position {state['loader'].position}, rng {rng}, kept {state['kept'].position}"
    )


def stage(number: int) -> Net:
    """The first has the first layer, the second has the second one; both have what is around them."""
    torch.manual_seed(3)
    model = Net()
    model.layers[1 - number] = nn.Identity()
    return model


def save_stages(url: str) -> None:
    model = stage(dist.get_rank())
    state = {"model": model, "optimizer": torch.optim.AdamW(list(model.parameters())[: 4 + dist.get_rank()])}
    with fastckpt.Checkpointer(url, state, every=None, spot=None, options=Options(**OPTIONS)) as ckpt:
        ckpt.restore()
        ckpt.save_now(1).wait()


def restore_stages(url: str) -> dict[str, Any]:
    model = Net()
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    found = {}
    for keys in (("model", "optimizer"), ("model",)):
        with fastckpt.Checkpointer(
            url, {key: state[key] for key in keys}, every=None, spot=None, read_only=True
        ) as ckpt:
            try:
                ckpt.restore(strict=False)
                pairs = [(model.layers[n].a.weight, stage(n).layers[n].a.weight) for n in range(2)]  # type: ignore[union-attr]
                found["model"] = f"{sum(torch.equal(one, other) for one, other in pairs)} layers equal"  # type: ignore[arg-type]
            except fastckpt.CheckpointError as error:
                found["error"] = str(error)
    return found


def hurry(silent_s: float = 2.5) -> None:
    """Ranks are taken for dead sooner: a test cannot wait as long as people can."""
    from fastckpt.ranks import pulse

    pulse.BEAT_S, pulse.SILENT_S = 0.3, silent_s


def leave_at_once() -> None:
    """Rank 0 waits for no farewell of others, where none needs the store in its process. A killed rank never says farewell."""
    from fastckpt.ranks import team

    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True" or dist.get_world_size() == 2:
        team.FAREWELL_S = 0.0


def restored_step(url: str, mode: str) -> int:
    training = Training(mode)
    with checkpointer(url, training, every=None) as ckpt:
        return ckpt.restore()


def save_and_tell(url: str, mode: str, changed_on: int | None, settings: dict[str, Any]) -> str:
    """One save. changed_on: on this rank a replicated parameter has another value. The error, or "" if it is durable."""
    training = Training(mode)
    training.step(0)
    if changed_on == dist.get_rank():
        with torch.no_grad():
            next(p for p in training.model.parameters() if p.dim() == 1).add_(1e-6)
    try:
        with checkpointer(url, training, every=None, **settings) as ckpt:
            ckpt.restore()
            ckpt.save_now(1).wait()
    except fastckpt.CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def begin_otherwise(url: str, what: str) -> str:
    """Ranks that do not begin alike. Returns the error of each."""
    rank = dist.get_rank()
    training = Training("plain")
    settings: dict[str, Any] = {"every": Every(steps=5)}
    options = dict(OPTIONS, join_timeout_s=5.0)
    hurry(2.0)
    seed = 1 if what == "every" and rank == 1 else 0
    training.state["data"] = fastckpt.ElasticSampler(100, 10, seed=seed, automatic=False)
    if what == "keys" and rank == 1:
        training.state["ema"] = torch.zeros(3)
    if what == "every" and rank == 1:
        settings["every"] = Every(steps=6)
    if what == "repository":
        url = f"{url}-of-node-{rank}"
    if what == "never comes" and rank == 1:
        time.sleep(12)
        return ""
    try:
        with checkpointer(url, training, options=Options(**options), **settings) as ckpt:
            ckpt.restore()
            ckpt.step(4)
            if what == "step":
                ckpt.step(5 + rank)
                ckpt.wait()
            if what == "never saves" and rank == 0:
                ckpt.save_now(4).wait(20)
    except (fastckpt.CheckpointError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def save_two(url: str) -> None:
    training = Training("plain")
    with checkpointer(url, training, every=None) as ckpt:
        ckpt.restore()
        for step in (1, 2):
            training.step(step)
            ckpt.save_now(step).wait()


def restore_as(url: str, which: str) -> str:
    """What `restore(which)` comes to, and whether it has changed anything."""
    training = Training("plain", seed=7)
    before = training.tensors()
    with checkpointer(url, training, every=None) as ckpt:
        try:
            return f"step {ckpt.restore(which)}"  # type: ignore[arg-type]
        except fastckpt.CheckpointError as error:
            after = training.tensors()
            unchanged = all(torch.equal(before[name], after[name]) for name in before)
            return f"{type(error).__name__}, {'unchanged' if unchanged else 'changed'}: {error}"


def go_back(url: str) -> list[int]:
    """Save steps 2 and 4, go back to 2, and train on. Returns the steps of the history."""
    from fastckpt.repository.catalog import Catalog
    from fastckpt.repository.repository import Repository
    from fastckpt.store.local import LocalStore

    training = Training("plain")
    with checkpointer(url, training, every=Every(steps=2), keep=None) as ckpt:
        for step in range(ckpt.restore(), 5):
            training.step(step)
            ckpt.step(step + 1)
        ckpt.wait()
        assert ckpt.restore(step=2) == 2
        for step in range(2, 4):
            training.step(step)
            ckpt.step(step + 1)
    return [checkpoint.step for checkpoint in Catalog(Repository(LocalStore(url))).history()]


def save_when_told(url: str, told: str) -> str:
    """Save step 1; then, once a file is there, step 2. What the second save comes to."""
    training = Training("plain")
    try:
        with checkpointer(url, training, every=None) as ckpt:
            ckpt.restore()
            ckpt.save_now(1).wait()
            print("saved", flush=True)
            while not os.path.exists(told):
                time.sleep(0.02)
            ckpt.save_now(2).wait()
    except fastckpt.CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def run_script(*command: str) -> None:
    """A script in this process, which is in the process group already that the script would make."""
    dist.init_process_group = lambda *_, **__: None  # type: ignore[assignment]
    sys.argv = [*command]
    with contextlib.suppress(SystemExit):
        runpy.run_path(command[0], run_name="__main__")
