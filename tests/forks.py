"""Processes that have imported torch and what optimizers import of it already, which takes three seconds: forked from
a server that did it once.

kdkernels is not in the server, so such a process finds, builds and loads the native library as a new one does.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "accelerate"])
    return context


def start_ranks(work: Callable[..., None], args: tuple[Any, ...], size: int = 2, join: bool = True) -> Any:
    """``work(rank, *args)`` in ``size`` processes."""
    forkserver()
    return mp.start_processes(work, args, size, join=join, start_method="forkserver")


def be_rank(rank: int, size: int, folder: str) -> None:
    """A process as torchrun makes it, in a gloo group that needs no port: those who ask find it there."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)


class Fork:
    """``python -c code`` as subprocess.Popen would run it: an environment of its own, all output in one pipe."""

    def __init__(self, code: str, environment: dict[str, str]) -> None:
        context = forkserver()
        self._output, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(code, environment, theirs))
        self._process.start()
        theirs.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        with open(os.dup(self._output.fileno())) as file:
            said = file.read()
        self._process.join(timeout)
        return said, None


def _run(code: str, environment: dict[str, str], output: Any) -> None:
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    os.chdir("/")
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, environment["PYTHONPATH"])
    torch.set_num_threads(1)
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
