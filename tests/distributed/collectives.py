"""Counts everything in torch.distributed that communicates, in all threads of one rank.

So that nothing is missed, it is counted at several depths: functions of torch.distributed, functional collectives, operators of c10d,
methods of process groups, and what a store offers to wait for others.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.distributed import programs

FUNCTIONS = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "new_subgroups",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
)
OF_GROUPS = (
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "recv_anysource",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
    "_allgather_base",
    "_reduce_scatter_base",
)
WAITS_OF_STORES = ("wait", "barrier", "get", "watch_key", "queue_pop")
"""What blocks until somebody else writes. The project asks for keys that are there, and never waits for one."""
OPERATORS = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "c10d_functional")
LIMIT_S = 60.0


class Counting:
    """Counts while `open`; what is counted goes on."""

    def __init__(self) -> None:
        self.open = False
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            if self.open:
                with self._lock:
                    self.seen[f"{name} in {threading.current_thread().name}"] += 1
            return function(*arguments, **settings)

        return call

    def install(self, stack: contextlib.ExitStack) -> None:
        """Wrap all there is of these names in this torch."""
        import torch.distributed._functional_collectives as functional
        import torch.distributed.distributed_c10d as c10d

        modules = [dist, c10d]
        for name in FUNCTIONS:
            for module in modules:
                self._wrap(stack, module, name)
        for name in dir(functional):
            found = getattr(functional, name)
            if (
                callable(found)
                and not isinstance(found, type)
                and getattr(found, "__module__", "") == functional.__name__
            ):
                self._wrap(stack, functional, name)
        for kind in {dist.ProcessGroup, *self._kinds_of_groups()}:
            for name in OF_GROUPS:
                self._wrap(stack, kind, name)
        for kind in (dist.Store, dist.TCPStore, dist.PrefixStore, dist.HashStore, dist.FileStore):
            for name in WAITS_OF_STORES:
                self._wrap(stack, kind, name)
        self._wrap(stack, dist, "rendezvous")
        import torch.distributed.elastic.utils.store as elastic

        for name in ("barrier", "synchronize", "get_all"):
            self._wrap(stack, elastic, name)
        self._count_operators(stack)

    def _kinds_of_groups(self) -> list[type]:
        names = (
            "ProcessGroupGloo",
            "ProcessGroupNCCL",
            "ProcessGroupMPI",
            "ProcessGroupWrapper",
            "_ProcessGroupWrapper",
        )
        return [kind for kind in (getattr(dist, name, None) for name in names) if isinstance(kind, type)]

    def _wrap(self, stack: contextlib.ExitStack, owner: Any, name: str) -> None:
        found = getattr(owner, name, None)
        if found is not None:
            where = getattr(owner, "__name__", str(owner))
            stack.enter_context(mock.patch.object(owner, name, self.counted(f"{where}.{name}", found)))

    def _count_operators(self, stack: contextlib.ExitStack) -> None:
        """Operators are looked up by their packets: code that holds one calls it through this."""
        kind = torch._ops.OpOverload
        original = kind.__call__
        packet = torch._ops.OpOverloadPacket
        of_packet = packet.__call__
        counting = self

        def call(self: Any, /, *arguments: Any, **settings: Any) -> Any:
            if counting.open and self.namespace in OPERATORS:
                counting.counted(f"torch.ops.{self.namespace}.{self.__name__}", lambda: None)()
            return original(self, *arguments, **settings)

        def call_packet(self: Any, /, *arguments: Any, **settings: Any) -> Any:
            if counting.open and self._qualified_op_name.partition("::")[0] in OPERATORS:
                counting.counted(f"torch.ops.{self._qualified_op_name}", lambda: None)()
            return of_packet(self, *arguments, **settings)

        stack.enter_context(mock.patch.object(kind, "__call__", call))
        stack.enter_context(mock.patch.object(packet, "__call__", call_packet))


@contextlib.contextmanager
def counting() -> Iterator[Counting]:
    with contextlib.ExitStack() as stack:
        found = Counting()
        found.install(stack)
        yield found


def saves(url: str, mode: str) -> dict[str, Any]:
    """Train, and save: on a call of save_now, when steps are due, and after a wish; what was counted during each."""
    from fastckpt import Every

    found: dict[str, Any] = {}
    with counting() as counted:
        training = programs.Training(mode)
        with programs.checkpointer(url, training, every=Every(steps=1)) as ckpt:
            ckpt.restore()
            training.step(0)
            counted.open = True
            ckpt.save_now(1).wait()
            found["save_now"], counted.open = dict(counted.seen), False
            counted.seen.clear()
            training.step(1)
            counted.open = True
            ckpt.step(2)
            end_s = time.monotonic() + LIMIT_S
            while ckpt.stats.durable_step != 2:
                assert time.monotonic() < end_s
                time.sleep(0.01)
            found["step"], counted.open = dict(counted.seen), False
            counted.seen.clear()
            counted.open = True
            ckpt.wait()
            found["wait"], counted.open = dict(counted.seen), False
    return found


def seen_of_each_kind(_: str) -> list[str]:
    """What is counted where ranks do communicate: a test that counts nothing would be content with everything."""
    import torch.distributed._functional_collectives as functional

    one = torch.ones(2)
    with counting() as counted:
        counted.open = True
        dist.all_reduce(one)
        dist.barrier()
        dist.all_gather_object([None, None], 1)
        functional.all_reduce(one, "sum", dist.group.WORLD).sum().item()
        torch.ops._c10d_functional.wait_tensor(
            torch.ops._c10d_functional.all_reduce(one, "sum", dist.group.WORLD.group_name)
        )
        dist.group.WORLD.allreduce([one]).wait()
        if dist.get_rank():
            dist.send(one, 0)
        else:
            dist.recv(one, 1)
        store = dist.distributed_c10d._get_default_store()
        store.set("there", "1")
        store.wait(["there"])
        thread = threading.Thread(target=dist.barrier, name="beside")
        thread.start()
        thread.join()
    return sorted(name.partition(" in ")[0] for name in counted.seen) + [
        name for name in counted.seen if name.endswith("in beside")
    ]
