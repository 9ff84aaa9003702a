"""Clocks that wait for the device, and where a step's kernel time went."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# first match wins; names of kernels as the libraries give them
KINDS = (
    ("communication", ("nccl",)),
    ("attention", ("fmha", "flash", "sdpa", "mha_", "attention")),
    ("gemm", ("gemm", "nvjet", "cutlass", "xmma", "wgmma", "cublas")),
    ("copies", ("memcpy", "memset", "copy", "catarray")),
)


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


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "elementwise")


def kernel_seconds(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of kernels of each kind on this GPU during `work`, longest first; those that overlap count in full."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize(device)
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:  # a named range spans kernels that are counted already
            kind = kind_of(event.key)
            found[kind] = found.get(kind, 0.0) + event.self_device_time_total / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))
