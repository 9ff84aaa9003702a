"""Copies of a module on several ranks: one gradient, one decision, one set of weights."""

import os
import socket

import torch
from torch import multiprocessing, nn

from longlive.parallel.data_parallel import Replicas


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))


def _data(rank):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(rank))


def _rank(rank, size, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    replicas, module = Replicas.launch("cpu"), _network()
    module(_data(rank)).square().mean().backward()
    replicas.average_gradients(module)
    seconds, asked = replicas.maximum(1.0 + rank, float(rank == 0))
    torch.save({"gradients": [p.grad for p in module.parameters()], "agreed": (seconds, asked)}, folder / f"{rank}.pt")
    replicas.leave()


def test_two_ranks_average_their_gradients_and_agree(tmp_path):
    multiprocessing.spawn(_rank, (2, _free_port(), tmp_path), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = _network()
    torch.stack([alone(_data(rank)).square().mean() for rank in range(2)]).mean().backward()
    for gradients in (found[0]["gradients"], found[1]["gradients"]):
        torch.testing.assert_close(gradients, [p.grad for p in alone.parameters()])
    assert [f["agreed"] for f in found] == [(2.0, 1.0)] * 2


def test_one_process_needs_no_group():
    replicas = Replicas()
    module = _network()
    module(_data(0)).sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    replicas.average_gradients(module)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, module.parameters())) and replicas.maximum(3.0) == [3.0]
