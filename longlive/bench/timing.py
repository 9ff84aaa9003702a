"""Clocks that wait for the device, and where a step's kernel time went."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

# first match wins; names of kernels as the libraries give them
KINDS = (
    ("communication", ("nccl",)),
    ("attention", ("fmha", "flash", "sdpa", "mha_", "attention")),
    ("copies", ("memcpy", "memset", "copy", "catarray", "nchwtonhwc", "nhwctonchw", "converttensor")),
    ("convolution", ("fprop", "dgrad", "wgrad", "conv", "implicit")),
    ("gemm", ("gemm", "nvjet", "cutlass", "xmma", "wgmma", "cublas")),
    ("fused", ("fused_",)),
)


class Kernel(NamedTuple):
    """A kernel's launches taken together."""

    name: str
    kind: str
    seconds: float
    launches: int


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds by the host's clock, seconds by device events) of `work`, to the end of everything it launched. On a CPU the two are one."""
    synchronize(device)
    began = time.perf_counter()
    if device.type != "cuda":
        work()
        return (time.perf_counter() - began,) * 2
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began, first.elapsed_time(last) / 1000


def recorded(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `work` by device events; on a GPU of a graph of it, since a host takes longer to launch a small kernel than a GPU to run it."""
    work()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
        work()
    return median(timed(work, device)[1] for _ in range(repeats))


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "elementwise")


def kernels(work: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels on this GPU during `work`, by name, longest first; none on a CPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        work()
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize(device)
    found = [
        Kernel(event.key, kind_of(event.key), event.self_device_time_total / 1e6, event.count)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation  # a named range spans kernels that are counted already
    ]
    return sorted(found, key=lambda kernel: -kernel.seconds)


def by_kind(found: list[Kernel]) -> dict[str, float]:
    """Seconds of kernels of each kind, longest first; those that overlap count in full."""
    kinds: dict[str, float] = {}
    for kernel in found:
        kinds[kernel.kind] = kinds.get(kernel.kind, 0.0) + kernel.seconds
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))
