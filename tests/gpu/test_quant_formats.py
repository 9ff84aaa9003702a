"""The formats on a GPU give the bits that they give on the CPU."""

import pytest
import torch

from longlive.ops import mxfp4, nvfp4
from longlive.ops.fp8 import quantise_rows
from longlive.ops.hadamard import hadamard
from longlive.ops.kv_formats import FORMATS, dequantise_page, quantise_page
from longlive.ops.random_bits import counter_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def matrix(spread):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 333, generator=generator) * torch.exp(spread * torch.randn(200, 1, generator=generator))


@pytest.mark.parametrize("spread", [0.0, 5.0])
@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("rule", list(nvfp4.RULES))
def test_nvfp4(rule, tile, spread):
    x = matrix(spread)
    for place in (None, 7):
        here = nvfp4.quantise(x, rule, tile=tile, bits=None if place is None else counter_bits(place, x.shape))
        there = nvfp4.quantise(x.cuda(), rule, tile=tile, bits=None if place is None else counter_bits(place, x.shape, device="cuda"))
        assert there.to("cpu") == here
        assert torch.equal(there.dequantise(torch.bfloat16).cpu(), here.dequantise(torch.bfloat16))


def test_the_others():
    x = matrix(5.0)
    for function in (quantise_rows, mxfp4.quantise):
        assert function(x.cuda()).to("cpu") == function(x)
    turned = x[:, :320].bfloat16()
    assert torch.equal(hadamard(turned.cuda()).cpu(), hadamard(turned))


@pytest.mark.parametrize("format", FORMATS)
def test_pages(format):
    x = torch.randn(2, 130, 3, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    here, there = quantise_page(x, format), quantise_page(x.cuda(), format)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there.tensors().values(), here.tensors().values()))
    assert torch.equal(dequantise_page(there).cpu(), dequantise_page(here))
