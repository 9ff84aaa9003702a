"""Several ranks on this machine over gloo: `run_ranks` starts them once, each test reads what they found."""

import multiprocessing
import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as torch_multiprocessing


def run_ranks(function, size: int, folder: Path, *arguments) -> list:
    """[function(*arguments) of every rank], run by `size` processes that torchrun could have started."""
    multiprocessing.set_forkserver_preload(["pytest", "torch.distributed.device_mesh", "longlive.train.compiled", "longlive.train.sharded"])
    start = (function, size, _free_port(), folder, arguments)
    torch_multiprocessing.start_processes(_rank, start, nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank, function, size, port, folder, arguments):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.save(function(*arguments), folder / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
