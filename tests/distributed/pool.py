"""Groups of processes that stay: joined once, they run job after job, each at its own layout."""

import importlib
import os
import socket
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _work(rank: int, world: int, port: int, jobs: Connection) -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # a rank that leaves earlier takes the store with it
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.")
    while True:
        try:
            module, name, arguments = jobs.recv()
        except EOFError:
            return
        try:
            jobs.send((True, getattr(importlib.import_module(module), name)(**arguments)))
        except Exception:
            jobs.send((False, traceback.format_exc()))


class Pool:
    """``world`` ranks on this machine, over gloo."""

    def __init__(self, world: int) -> None:
        context, port = get_context("spawn"), _free_port()
        self.world = world
        ends = [context.Pipe() for _ in range(world)]
        self.connections = [here for here, _ in ends]
        self.processes = [
            context.Process(target=_work, args=(rank, world, port, there)) for rank, (_, there) in enumerate(ends)
        ]
        for process, (_, there) in zip(self.processes, ends, strict=True):
            process.start()
            there.close()

    def run(self, module: str, name: str, *, seconds: float = 180.0, **arguments: Any) -> list[Any]:
        """What ``module.name(**arguments)`` returns on each rank.

        Raises:
            AssertionError: a rank raised (with its traceback), ended, or did not answer in ``seconds``. The ranks are
                gone then.
        """
        for connection in self.connections:
            connection.send((module, name, arguments))
        results: dict[int, Any] = {}
        while len(results) < self.world:
            waiting = [c for rank, c in enumerate(self.connections) if rank not in results]
            ready = wait(waiting, timeout=seconds)
            if not ready:
                self._fail(f"ranks {sorted(set(range(self.world)) - set(results))} did not answer in {seconds:.0f} s")
            for connection in ready:
                rank = self.connections.index(connection)  # type: ignore[arg-type]
                try:
                    done, result = self.connections[rank].recv()
                except EOFError:
                    self._fail(f"rank {rank} ended")
                if not done:
                    self._fail(f"rank {rank}: {result}")
                results[rank] = result
        return [results[rank] for rank in range(self.world)]

    def _fail(self, what: str) -> None:
        self.close()
        raise AssertionError(what)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.terminate()
            process.join(10)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)


class Pools:
    """The pools of a test session by their number of ranks; a broken one is made anew."""

    def __init__(self) -> None:
        self.pools: dict[int, Pool] = {}

    def __call__(self, world: int) -> Pool:
        if world not in self.pools or not self.pools[world].alive:
            self.pools[world] = Pool(world)
        return self.pools[world]


@contextmanager
def pools() -> Iterator[Pools]:
    everyone = Pools()
    try:
        yield everyone
    finally:
        for pool in everyone.pools.values():
            pool.close()
