"""Where Triton kernels can be tested: on a GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1 in the environment)."""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MARKS = [pytest.mark.gpu, pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device, or Triton's interpreter")]
GPU_ONLY = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random(*shape, seed=0, dtype=torch.float32, device=DEVICE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(device, dtype)


def apart(mine, truth):
    mine, truth = mine.detach().cpu().double(), truth.detach().cpu().double()
    return ((mine - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def close(mine, truth, dtype):
    """Within one rounding of `dtype` of the truth, as a whole. (The interpreter cuts bfloat16 off instead of rounding.)"""
    assert mine.shape == truth.shape and mine.isfinite().all()
    assert apart(mine, truth) < {torch.float32: 2e-6, torch.bfloat16: 1e-2 if INTERPRETED else 4e-3, torch.float16: 6e-4}[dtype]
