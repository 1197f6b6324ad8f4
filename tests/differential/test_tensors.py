"""Every kind of tensor comes back as torch.save and torch.load bring it back, bit for bit."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.differential.tools import describe, same

NAMES = (
    "float64 float32 float16 bfloat16 complex32 complex64 complex128 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 bits8 bits16 bits1x8 bits2x4 bits4x2"
)
DTYPES = [getattr(torch, name) for name in NAMES.split() if hasattr(torch, name)]


def raw(dtype: torch.dtype, n: int, seed: int = 0) -> torch.Tensor:
    """Elements of random bytes: NaN payloads, denormals, negative zeros (but true booleans)."""
    generator = torch.Generator().manual_seed(seed)
    width = dtype.itemsize
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (n * width,), dtype=torch.uint8, generator=generator)
    return torch.empty(0, dtype=dtype).set_(data.untyped_storage(), 0, (n,), (1,))


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 7, 40_000])
def test_dtypes(dtype: torch.dtype, n: int, tmp_path: Path) -> None:
    x = raw(dtype, n)
    zero_dim = raw(dtype, 1, 1).as_strided((), ())
    same({"x": x, "tie": x, "view": x[: n // 2], "zero": zero_dim, "step": x[::2]}, tmp_path)


def test_special_values() -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x003FFFFF, -0x80000000, 1, 0], dtype=torch.int32)
    _, found = same([bits.view(torch.float32).clone(), bits.clone().view(torch.float32)])
    assert found[1].view(torch.int32).tolist() == bits.tolist()


def base() -> torch.Tensor:
    return torch.arange(24.0).reshape(4, 6)


def autograd() -> Any:
    leaf = torch.randn(3, requires_grad=True)
    return [leaf, leaf * 2, leaf.detach()]


def attributes() -> Any:
    tensor, parameter = torch.randn(3), torch.nn.Parameter(torch.randn(2), requires_grad=False)
    tensor.note, parameter.partition = "n", {"dim": 1, "mate": tensor}  # type: ignore[attr-defined]
    return [tensor, parameter]


def views() -> Any:
    x = base()
    return [x, x.t(), x[::2], x[1, 2:], x.view(-1), x[:, None].expand(4, 5, 6), x.as_strided((5, 4), (2, 1), 3), x]


CASES: dict[str, Callable[[], Any]] = {
    "views": views,
    "small view of much": lambda: torch.arange(1000.0)[3:5],
    "view first": lambda: (lambda x: [x[2:], x])(torch.arange(30)),
    "typed bytes views": lambda: (lambda x: [x, x.clone()])(raw(torch.uint8, 64)),
    "equal but apart": lambda: [torch.zeros(5000), torch.zeros(5000), torch.ones(()), torch.ones(())],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expand": lambda: torch.randn(1, 3).expand(7, 3),
    "conj": lambda: (lambda x: [x, x.conj(), x.conj()[::2]])(torch.randn(4, dtype=torch.cfloat)),
    "neg": lambda: torch.randn(4, dtype=torch.cfloat).conj().imag,
    "empty": lambda: [torch.empty(0), torch.empty(3, 0, 2), torch.empty(0).expand(4, 0), torch.randn(4)[4:]],
    "zero dim": lambda: [torch.tensor(1.5), torch.tensor(True), torch.tensor(7), base()[1, 2]],
    "autograd": autograd,
    "attributes": attributes,
    "buffer": lambda: torch.nn.Buffer(torch.randn(3)),
    "tied": lambda: (lambda p: OrderedDict(a=p, b=p, c=p.data, d=p.detach()[:1]))(torch.nn.Parameter(base())),
    "quantized": lambda: torch.quantize_per_tensor(base(), 0.3, 4, torch.qint8),
    "quantized 32": lambda: torch.quantize_per_tensor(base(), 0.3, 4, torch.qint32).t(),
    "quantized channel": lambda: torch.quantize_per_channel(
        base(), torch.rand(4, dtype=torch.float64), torch.tensor([0, 1, 2, 3]), 0, torch.quint8
    ),
    "quantized channel float": lambda: torch.quantize_per_channel(
        base(), torch.rand(4), torch.rand(4), 0, torch.quint4x2
    ),
    "coo": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0, 2]]), torch.randn(3, 2), (4, 2)),
    "coo coalesced": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0, 2]]), torch.randn(3), (4,)).coalesce(),
    "coo empty": lambda: torch.sparse_coo_tensor(size=(3, 4)),
    "csr": lambda: base().to_sparse_csr(),
    "csc": lambda: base().to_sparse_csc(),
    "bsr": lambda: base().to_sparse_bsr((2, 3)),
    "bsc": lambda: base().to_sparse_bsc((2, 3)),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)]),
    "meta": lambda: (lambda x: [x, x.t(), x])(torch.empty(3, 4, device="meta")),
    "mixed meta": lambda: {"m": torch.empty(0, device="meta"), "c": torch.empty(2)},
}


@pytest.mark.filterwarnings("ignore")  # torch warns about prototypes: sparse CSR, quantization, nested
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weights_only", [True, False])
def test_cases(name: str, weights_only: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    same(CASES[name](), tmp_path, weights_only=weights_only)


@pytest.mark.filterwarnings("ignore")
def test_jagged() -> None:
    import torch._dynamo

    parts = [torch.randn(2, 3), torch.randn(4, 3)]
    same(torch.nested.nested_tensor(parts, layout=torch.jagged), weights_only=False)
    same(torch.nested.nested_tensor(parts, layout=torch.jagged))


class Plain(torch.Tensor):
    pass


class Wrapper(torch.Tensor):
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(func))


def test_subclasses() -> None:
    plain = torch.randn(4).as_subclass(Plain)
    plain.note = [1, plain]  # type: ignore[attr-defined]
    x = torch.randn(3)
    state = {"plain": plain, "of plain": plain[1:], "x": x, "wrapper": Wrapper(x), "again": Wrapper(x[:2])}
    same(state, weights_only=False)
    with torch.serialization.safe_globals([Plain]):
        same(x.as_subclass(Plain))


def test_dtensor(tmp_path: Path) -> None:
    from torch import distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            state = {
                "s": distribute_tensor(base(), mesh, [Shard(0)]),
                "r": distribute_tensor(base(), mesh, [Replicate()]),
            }
            expected, found = same(state)
            for name in state:
                assert describe(found[name]._local_tensor) == describe(expected[name]._local_tensor)
                assert found[name]._spec == expected[name]._spec
                assert torch.equal(found[name].to_local(), base())
        finally:
            dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages() -> None:
    x = torch.arange(5.0)
    _, found = same(
        {"typed": x.storage(), "tensor": x, "bytes": torch.randn(3).untyped_storage(), "e": torch.UntypedStorage(0)}
    )
    found["typed"][0] = 9.0
    assert found["tensor"][0] == 9.0
