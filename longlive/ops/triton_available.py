"""Whether the fused kernels can run. They are Triton, imported where they are used, so that nothing needs it to import LongLive."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def fused(x: torch.Tensor) -> bool:
    """Whether operations on `x` have a fused kernel here: a GPU, and Triton installed."""
    return x.is_cuda and _installed()


@cache
def _computes_e4m3(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def fused_fp8(x: torch.Tensor) -> bool:
    """The same for kernels that convert to or from E4M3, which cards before Ada cannot."""
    return fused(x) and _computes_e4m3(x.device)
