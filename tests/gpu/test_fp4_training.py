"""Kernels of NVFP4 training give the bits of their torch references, and a layer on a GPU the products of the same layer on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longlive.ops import fp4_matmul, fp4_training, nvfp4
from longlive.ops.fp4_training import Recipe, largest, of_packed, turned
from longlive.ops.random_bits import counter_bits
from longlive.precision.capability import FP8_FAMILIES, probe
from longlive.precision.training import Moment, Nvfp4Frozen, Nvfp4Trained

FP8 = torch.cuda.is_available() and probe("cuda").family in FP8_FAMILIES
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not FP8, reason="needs a CUDA device with FP8")]
SEEDS = (None, 3, 2**40 + 17)


def data(*shape, seed=0, spread=2.0, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device="cuda")
    return (x * torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator, device="cuda"))).to(dtype)


def same(mine, theirs):
    """Equal bits, NaN for NaN."""
    kind = {2: torch.int16, 4: torch.int32}[mine.element_size()]
    theirs = theirs.to(mine.dtype)
    broken = theirs.isnan()
    return torch.equal(mine.isnan(), broken) and torch.equal(mine.view(kind)[~broken], theirs.contiguous().view(kind)[~broken])


def noise(seed, shape):
    return None if seed is None else counter_bits(seed, shape, device="cuda")


@pytest.mark.parametrize("rule", list(nvfp4.RULES))
@pytest.mark.parametrize("shape, dtype", [((2, 333, 256), torch.bfloat16), ((3, 40, 48), torch.float32), ((1, 70, 80), torch.float16)])
def test_operands(rule, shape, dtype):
    x = data(*shape, spread=0.5 if dtype == torch.float16 else 2.0, dtype=dtype)
    x[0, 3], x[..., 5] = 0, -1e-30
    for broken in (False, True):
        if broken:
            x[-1, 7, 9] = torch.nan
        for turn in (True, False):
            recipe = Recipe(hadamard=turn)
            rows, tokens = largest(x, recipe)
            assert torch.equal(largest(x, recipe, tokens=False)[0], rows)
            along = turned(x, recipe)
            for seed in SEEDS:
                right = nvfp4.quantise(x, rule, bits=noise(seed, x.shape), on_nonfinite="nan")
                assert torch.equal(rows, right.amax) and same(fp4_training.coded(x, rule, rows, None, seed).values, right.products())
                right = nvfp4.quantise(along, rule, bits=noise(seed, along.shape), on_nonfinite="nan")
                mine = fp4_training.coded_tokens(x, rule, recipe, tokens, None, seed)
                assert torch.equal(tokens, right.amax) and same(mine.values, right.products().transpose(1, 2))
                assert torch.equal(mine.decode_scale, right.decode_scale)


@pytest.mark.parametrize("rule", list(nvfp4.RULES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 1024), (48, 80)])
def test_weights(rule, dtype, shape):
    w = data(*shape, spread=1.0, dtype=dtype)
    w[:16, :16] = 0
    for tile in nvfp4.TILES:
        assert fp4_matmul.quantised_weight(w, rule, tile) == nvfp4.quantise(w, rule, tile=tile)
    w[20, 20] = torch.inf
    for tile in nvfp4.TILES:
        mine, theirs = fp4_matmul.quantised_weight(w, rule, tile), nvfp4.quantise(w, rule, tile=tile, on_nonfinite="nan")
        assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.scales, theirs.scales) and torch.equal(mine.amax, theirs.amax)


def gradients(layer, x, dy, seed):
    """y and the gradients of x and of the parameters, as copies: `layer.cuda()` takes along every gradient that it finds, whoever else holds it."""
    layer.moment.begin(seed)
    x = x.clone().requires_grad_()
    for p in layer.parameters():
        p.grad = None
    y = layer(x)
    y.backward(dy)
    return [t.detach().clone() for t in (y, x.grad, *(p.grad for p in layer.parameters())) if t is not None]


@pytest.mark.parametrize("rule", ["static_6", "mse"])
@pytest.mark.parametrize("tile", nvfp4.TILES)
@pytest.mark.parametrize("tokens", [40, 4096])
def test_products_are_those_of_a_cpu(rule, tile, tokens, monkeypatch):
    """4096 tokens are shared out, three samples are taken in two turns.

    Codes are equal, and float32 holds every sum of their products in any order: they are multiples of 4 and at most 2^24.6, or of 64 and at most 2^25.2.
    What differs is the order in which shares, samples and the gradients of the bias are added, some 1e-7 in all.
    """
    monkeypatch.setattr(fp4_training, "PART_BYTES", 2 * 4 * 64 * 48)
    torch.manual_seed(0)
    recipe, x, dy = Recipe(weight_rule=rule, activation_rule="mse", gradient_rule=rule, tile=tile), torch.randn(3, tokens, 64), torch.randn(3, tokens, 48)
    layer = Nvfp4Trained(nn.Linear(64, 48), Moment(), recipe)
    right = gradients(layer, x, dy, 5)
    mine = gradients(layer.cuda(), x.cuda(), dy.cuda(), 5)
    for a, b in zip(mine, right, strict=True):
        assert (a.cpu() - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_in_bfloat16_never_waits_for_the_device(frozen):
    x, dy, plain = data(2, 300, 256, spread=0.5), data(2, 300, 1024, seed=1, spread=0.5), nn.Linear(256, 1024).cuda()
    moment, recipe = Moment(), Recipe(gradient_rule="mse")
    layer = Nvfp4Frozen(nvfp4.quantise(plain.weight.detach(), "mse"), plain.bias, recipe, moment) if frozen else Nvfp4Trained(plain, moment, recipe)
    with torch.autocast("cuda", torch.bfloat16):
        first = gradients(layer, x, dy, 7)
        moment.weights_changed()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = gradients(layer, x, dy, 7)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and first[0].dtype == torch.bfloat16
    close = F.linear(x.float(), plain.weight, plain.bias)
    assert F.cosine_similarity(first[0].float().flatten(), close.flatten(), dim=0) > 0.98


def test_ends_of_products_are_those_of_torch():
    """Bit for bit: alpha and bias in float32, one rounding."""
    x, w, bias = data(3, 70, 64), data(48, 64, seed=1), data(48, 1, seed=2)[:, 0]
    a, b = nvfp4.quantise(x, "mse"), nvfp4.quantise(w, "static_6", tile=16)
    total = fp4_matmul.wide_product(fp4_matmul.products(a).reshape(-1, 64), fp4_matmul.products(b)).unflatten(0, (3, -1))
    for dtype in (torch.bfloat16, torch.float32):
        right = (total * (a.decode_scale * b.decode_scale)[:, None, None] + bias.float()).to(dtype)
        assert torch.equal(fp4_training.times(of_packed(a), of_packed(b), bias, dtype), right)
