"""What is around the tensors: NumPy, containers, modules, optimizers; and training goes on as if nothing had happened."""

from __future__ import annotations

import copy
import pickle
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.differential.tools import describe, same, through_ours

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
GENERATOR = np.random.default_rng(0)
BIG = 20_000


def big(dtype: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(GENERATOR.bytes(BIG * np.dtype(dtype).itemsize), dtype).copy()


ARRAYS: dict[str, Callable[[], Any]] = {
    **{
        code: lambda code=code: big(code)
        for code in ("<f8", ">f8", "<f4", "<f2", "<i8", ">i2", "<u4", "|u1", "<c8", ">c16")
    },
    "bool": lambda: GENERATOR.integers(0, 2, 100_000).astype(bool),
    "datetime": lambda: big("<i8").view("<M8[ns]"),
    "timedelta": lambda: big("<i8").view("<m8[s]"),
    "datetime without unit": lambda: big("<i8").view("<M8[25us]"),
    "text": lambda: np.array([f"text {i}" for i in range(BIG)]),
    "bytes": lambda: np.array([b"b%d" % i for i in range(BIG)]),
    "objects": lambda: np.array([{"a": i} for i in range(9000)], dtype=object),
    "records": lambda: np.zeros(BIG, [("a", "<i4"), ("b", ">f8")]),
    "longdouble": lambda: np.arange(BIG, dtype=np.longdouble),
    "fortran": lambda: np.asfortranarray(big("<f4").reshape(100, 200)),
    "c order 3d": lambda: big("<f4").reshape(10, 20, 100),
    "column": lambda: big("<f4").reshape(-1, 1),
    "non-contiguous": lambda: np.tile(big("<f4"), 3)[::3],
    "reversed": lambda: big("<f8")[::-1],
    "permuted": lambda: big("<f8").reshape(10, 20, 100).transpose(1, 0, 2),
    "broadcast": lambda: np.broadcast_to(np.arange(200.0), (300, 200)),
    "read-only": lambda: np.frombuffer(GENERATOR.bytes(100_000), "u1"),
    "small": lambda: [np.arange(3), np.asfortranarray(np.ones((2, 3))), np.array(5.0), np.empty((0, 3))],
    "huge empty": lambda: np.empty((0, 100_000)),
    "same twice": lambda: (lambda x: {"a": x, "b": x, "c": x.copy()})(big("<f8")),
    "scalars": lambda: [
        np.float32(1.5),
        np.int64(3),
        np.datetime64("2020-01-01"),
        np.str_("x"),
        np.bool_(True),
        np.complex64(1j),
    ],
    "random state": lambda: [np.random.get_state(), random.getstate()],
    "matrix subclass": lambda: np.ma.masked_array(big("<f8"), mask=False),
}


@pytest.mark.parametrize("name", list(ARRAYS))
def test_arrays(name: str, tmp_path: Path) -> None:
    same({"x": ARRAYS[name](), "t": torch.ones(3)}, tmp_path, weights_only=False)


def recursive() -> Any:
    inner: list[Any] = [torch.ones(2)]
    inner.append(inner)
    mapping: dict[str, Any] = {"l": inner, "t": (inner, inner)}
    mapping["self"] = mapping
    return mapping


CONTAINERS: dict[str, Callable[[], Any]] = {
    "recursive": recursive,
    "shared": lambda: (lambda c: {"a": c, "b": [c, c], 3: {"x": c}})([torch.ones(2), 1]),
    "order": lambda: OrderedDict(
        [("z", 1), ("a", torch.ones(1)), (5, 2), (-1, 3), (True, 0), ((1, "k"), None), (None, 1)]
    ),
    "plain": lambda: [
        None,
        True,
        2**100,
        -0.0,
        float("nan"),
        1j,
        "é\ud800",
        b"\x00",
        bytearray(b"x"),
        (),
        {},
        set(),
        {1, 2},
    ],
    "counter": lambda: Counter("abca"),
    "torch": lambda: [
        torch.Size([1, 2]),
        torch.float16,
        torch.device("cuda:1"),
        torch.strided,
        torch.per_tensor_affine,
    ],
    "names with dots": lambda: {
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "": torch.ones(2),
        "é/\n": torch.ones(3),
    },
    "int and str": lambda: {1: torch.ones(1), "1": torch.zeros(1)},
    "a tensor": lambda: torch.ones(3),
    "none": lambda: None,
}


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("weights_only", [True, False])
def test_containers(name: str, weights_only: bool, tmp_path: Path) -> None:
    same(CONTAINERS[name](), tmp_path, weights_only=weights_only)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 5)
        self.norm = torch.nn.BatchNorm1d(5)
        self.head = torch.nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(x)))  # type: ignore[no-any-return]


def test_state_dict(tmp_path: Path) -> None:
    state = Net().state_dict()
    _, found = same(state, tmp_path)
    assert found._metadata == state._metadata  # type: ignore[attr-defined]
    assert type(found) is OrderedDict


def test_whole_module(tmp_path: Path) -> None:
    _, found = same(Net(), tmp_path, weights_only=False)
    assert found.head.weight is found.embedding.weight


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
}


def train(net: Net, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:
        x = torch.randint(0, 7, (8,), generator=torch.Generator().manual_seed(step))

        def closure(x: torch.Tensor = x) -> float:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x), x)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
        scheduler.step()


def slower(step: int) -> float:
    return 0.9**step


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("to_path", [True, False])
def test_training_goes_on(name: str, to_path: bool, tmp_path: Path) -> None:
    def make() -> tuple[Net, torch.optim.Optimizer, Any]:
        torch.manual_seed(3)
        net = Net()
        optimizer = OPTIMIZERS[name](net.parameters())
        return net, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, slower)

    net, optimizer, scheduler = make()
    train(net, optimizer, scheduler, range(4))
    parts = (net, optimizer, scheduler)
    state = dict(zip("nos", (part.state_dict() for part in parts), strict=True))
    same(copy.deepcopy(state))
    found = through_ours(state, tmp_path / "x" if to_path else None)
    train(*parts, range(4, 8))
    others = make()
    for part, key in zip(others, "nos", strict=True):
        part.load_state_dict(found[key])
    train(*others, range(4, 8))
    for one, other in zip(parts, others, strict=True):
        # Loaded strings are not the interned ones: compare without their identity, as pickle does not keep it either.
        assert describe(pickle.loads(pickle.dumps(one.state_dict()))) == describe(
            pickle.loads(pickle.dumps(other.state_dict()))
        )
