"""Whether the fused kernels can run. They are Triton, imported where they are used, so that nothing needs it to import LongLive.

What asks a device about itself breaks the graph of a compiler: ask `inference.fuses` first, which is False where something is being compiled.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

FP8_TILE_MAJORS = (9, 10)
INSTALLED = importlib.util.find_spec("triton") is not None  # a constant, which compilers can see through
GLUON = ("3", "6")  # the release of Triton whose Gluon our kernels are written in; Gluon is experimental, and changes between releases


def fused(x: torch.Tensor) -> bool:
    """Whether operations on `x` have a fused kernel here: a GPU, and Triton installed."""
    return x.is_cuda and INSTALLED


@cache
def _copies_tiles(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def fused_copies(x: torch.Tensor) -> bool:
    """The same for kernels that copy by tiles (TMA: Hopper, Blackwell), which older cards would do value by value, slower than the reference."""
    return fused(x) and _copies_tiles(x.device)


@cache
def _computes_e4m3(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def fused_fp8(x: torch.Tensor) -> bool:
    """The same for kernels that convert to or from E4M3, which cards before Ada cannot."""
    return fused(x) and _computes_e4m3(x.device)


@cache
def fp8_tiles_lack(device: torch.device) -> str | None:
    """Why the FP8 kernels of convolution and attention cannot run on this GPU; None: they can.

    Their tiles take up to 192 KiB of shared memory, which Hopper and datacentre Blackwell have; consumer Blackwell (12.x) has 99.
    """
    if not INSTALLED:
        return "Triton is not installed (pip install triton)"
    if torch.cuda.get_device_capability(device)[0] not in FP8_TILE_MAJORS:
        return f"its kernels are for Hopper and datacentre Blackwell, and this is {torch.cuda.get_device_name(device)}"
    return None


def fused_fp8_tiles(x: torch.Tensor) -> bool:
    """The same for products of FP8 tiles."""
    return x.is_cuda and fp8_tiles_lack(x.device) is None


def fused_tiles(x: torch.Tensor) -> bool:
    """The same for products of tiles as large in half precision."""
    return fused_fp8_tiles(x)


@cache
def _gives_roles(device: torch.device) -> bool:
    if not INSTALLED or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    import triton

    return tuple(triton.__version__.split(".")[:2]) == GLUON


def fused_roles(x: torch.Tensor) -> bool:
    """The same for kernels in Gluon whose warps have roles: Hopper, with the release of Triton that they are written in."""
    return x.is_cuda and _gives_roles(x.device)
