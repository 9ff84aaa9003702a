"""Layers that train in NVFP4 and FP8: their three products against the recipe in float64, gradients, noise, caching, shards (spec nvfp4 §6.3 item 111)."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from longlive.models.lora import attach
from longlive.models.spec import TINY, DiTDims
from longlive.models.wan_dit import WanDiT
from longlive.ops import fp4_training, nvfp4
from longlive.ops.fp4_training import DGRAD, WGRAD, Recipe, largest, weight_gradient
from longlive.ops.hadamard import hadamard
from longlive.ops.random_bits import counter_bits
from longlive.precision.backends import BACKENDS, FP8
from longlive.precision.converter import LinearConverter, Selection
from longlive.precision.training import FP8_TRAINED, NVFP4_FROZEN, NVFP4_TRAINED, TRAINED_AS, Fp8Trained, Moment, Nvfp4Frozen, Nvfp4Trained, TrainingConverter

K, N, M = 64, 48, 40
PLAIN = Recipe(stochastic=False)


def data(seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, M, K, generator=generator)
    x[..., 3] *= 8  # an outlier channel
    dy = torch.randn(batch, M, N, generator=generator)
    layer = nn.Linear(K, N)
    with torch.no_grad():
        layer.weight.normal_(generator=generator), layer.bias.normal_(generator=generator)
    return x, dy, layer


def run(layer, x, dy):
    x = x.clone().requires_grad_()
    for p in layer.parameters():
        p.grad = None
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, layer.weight.grad if "weight" in dict(layer.named_parameters()) else None, layer.bias.grad


def gradient_of_weight(dy, x, recipe, seed):
    return weight_gradient(dy, x, largest(dy, recipe)[1], largest(x, recipe)[1], recipe, seed, None)


def values(x, rule, tile=1, bits=None):
    return nvfp4.quantise(x, rule, tile=tile, bits=bits).dequantise(torch.float32).double()


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("rule", ["static_6", "mse"])
@pytest.mark.parametrize("tile", [1, 16])
def test_the_three_products_are_the_recipe_up_to_the_order_of_addition(rule, tile, stochastic):
    """Against products in float64 of operands that are quantised here, from their full-precision tensors in the direction of the sum."""
    x, dy, plain = data()
    recipe, moment = Recipe(weight_rule=rule, activation_rule="mse", gradient_rule=rule, tile=tile, stochastic=stochastic), Moment(seed=5)
    y, dx, dw, db = run(Nvfp4Trained(plain, moment, recipe), x, dy)
    w = plain.weight.detach()
    wq = values(w, rule, tile)
    wt = wq.t() if tile == 16 else values(w.t().contiguous(), rule)
    bits_d = counter_bits(moment.seed_of(0, DGRAD), dy.shape) if stochastic else None
    turned = [hadamard(torch.nn.functional.pad(t, (0, 0, 0, -M % 16)).transpose(1, 2).contiguous()) for t in (dy, x)]
    bits_w = counter_bits(moment.seed_of(0, WGRAD), turned[0].shape) if stochastic else None
    right_y = values(x, "mse") @ wq.t() + plain.bias.detach().double()
    right_dx = values(dy, rule, bits=bits_d) @ wt.t()
    right_dw = (values(turned[0], rule, bits=bits_w) @ values(turned[1], "mse").transpose(1, 2)).sum(0)
    for mine, right in ((y, right_y), (dx, right_dx), (dw, right_dw), (db, dy.double().sum((0, 1)))):
        assert (mine.double() - right).norm() <= 2e-6 * right.norm()


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_gradients_point_where_those_of_float32_point(kind):
    """Cosine per operand (item 111 v)."""
    x, dy, plain = data(batch=1)
    right = run(plain, x, dy)
    layer = Fp8Trained(plain, Moment()) if kind == "fp8" else Nvfp4Trained(plain, Moment(), Recipe())
    mine = run(layer, x, dy)
    least = (0.999,) * 3 if kind == "fp8" else (0.98, 0.95, 0.95)
    for a, b, cosine in zip(mine, right, least):
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > cosine
    torch.testing.assert_close(mine[3], right[3])


def test_hadamard_cancels_in_the_weight_gradient():
    """Without quantisation the turned product is the product (item 111 iii)."""
    x, dy, _ = data(batch=1)
    a, b = (hadamard(torch.nn.functional.pad(t[0], (0, 0, 0, -M % 16)).t().contiguous().double()) for t in (dy, x))
    right = dy[0].double().t() @ x[0].double()
    assert (a @ b.t() - right).norm() < 1e-6 * right.norm()


def test_stochastic_gradients_are_unbiased_and_nearest_ones_are_not_averaged_away():
    """The mean of many weight gradients approaches the one whose x alone is quantised; its slope on it is 1 (item 111 ii)."""
    x, dy, plain = data(batch=1)
    recipe, draws = Recipe(gradient_rule="mse"), 600
    x_turned = values(hadamard(torch.nn.functional.pad(x, (0, 0, 0, -M % 16)).transpose(1, 2).contiguous()), "mse")
    dy_turned = hadamard(torch.nn.functional.pad(dy, (0, 0, 0, -M % 16)).transpose(1, 2).contiguous()).double()
    right = (dy_turned @ x_turned.transpose(1, 2))[0]
    all_draws = torch.stack([gradient_of_weight(dy, x, recipe, seed).double() for seed in range(draws)])
    mean, sigma = all_draws.mean(0), all_draws.std(0) / draws**0.5
    assert ((mean - right).abs() < 5 * sigma).all() and ((mean - right) / sigma).square().mean() < 1.3
    assert abs((mean * right).sum() / right.square().sum() - 1) < 2e-3
    nearest = gradient_of_weight(dy, x, Recipe(gradient_rule="mse", stochastic=False), 0).double()
    assert ((nearest - right).abs() > 5 * sigma).float().mean() > 0.3


def test_samples_taken_in_turns_and_tokens_shared_out_add_up_to_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(3, 64, K, generator=generator), torch.randn(3, 64, N, generator=generator)
    whole = gradient_of_weight(dy, x, Recipe(), 7)
    monkeypatch.setattr(fp4_training, "PART_BYTES", 2 * 4 * N * K)
    monkeypatch.setattr(fp4_training, "SHARE_TOKENS", 16)
    assert fp4_training._shares(2, 64, N, K) == 4
    torch.testing.assert_close(gradient_of_weight(dy, x, Recipe(), 7), whole, rtol=1e-5, atol=1e-5)


def test_the_straight_through_gradient_is_that_of_the_dequantised_products():
    """Finite differences on a toy whose quantisation is exact: integers that every format holds (item 111 vi)."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(16, 16, bias=False)
    with torch.no_grad():
        plain.weight.copy_(torch.randint(-1, 2, (16, 16), generator=generator) * 6.0)
    x = torch.randint(-1, 2, (1, 16, 16), generator=generator) * 6.0
    layer = Nvfp4Trained(plain, Moment(), Recipe(stochastic=False, hadamard=False))
    dy = torch.randint(-1, 2, (1, 16, 16), generator=generator) * 6.0
    x.requires_grad_()
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ plain.weight.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(plain.weight.grad, (dy[0].t() @ x.detach()[0]), rtol=1e-6, atol=0)


def test_noise_is_a_function_of_seed_layer_and_product():
    x, dy, plain = data()
    moment = Moment()
    first, second = Nvfp4Trained(plain, moment, Recipe()), Nvfp4Trained(plain, moment, Recipe())

    def gradients(layer, seed):
        moment.begin(seed)
        return run(layer, x, dy)[1:3]

    again = [gradients(first, 7), gradients(first, 7)]
    assert all(torch.equal(a, b) for a, b in zip(*again))
    for other in (gradients(first, 8), gradients(second, 7)):
        assert all(not torch.equal(a, b) for a, b in zip(again[0], other))


def test_weights_are_packed_once_until_they_change():
    x, _, plain = data()
    moment = Moment()
    layer = Nvfp4Trained(plain, moment, Recipe())
    with torch.no_grad():
        before = layer(x)
        kept = layer.packed()
        assert layer.packed() is kept
        moment.weights_changed()
        assert layer.packed() is not kept and layer.packed() == kept
        plain.weight.mul_(-1)
        assert not torch.equal(layer(x), before)
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("tile", [1, 16])
def test_frozen_layers_without_masters_compute_as_trained_ones_do(tile):
    x, dy, plain = data()
    recipe = Recipe(tile=tile, weight_rule="static_6")
    frozen = Nvfp4Frozen(nvfp4.quantise(plain.weight.detach(), "static_6", tile=tile), plain.bias, recipe, Moment(seed=3))
    trained = Nvfp4Trained(plain, Moment(seed=3), recipe)
    mine, right = (run(layer, x, dy) for layer in (frozen, trained))
    assert torch.equal(mine[0], right[0]) and (tile == 1 or torch.equal(mine[1], right[1]))
    assert not [name for name, p in frozen.named_parameters() if p.requires_grad]


def test_shards_with_the_largest_value_of_all_quantise_as_the_whole_does():
    """Two halves of the tokens: outputs and input gradients are the whole's, weight gradients add up to it (item 111 viii)."""
    x, dy, plain = data(batch=1)
    x, dy = x[:, :32], dy[:, :32]
    whole = run(Nvfp4Trained(plain, Moment(), PLAIN), x, dy)
    largest = {}

    def record(name):
        return lambda value: largest.setdefault(name, []).append(value) or value

    run(Nvfp4Trained(plain, Moment(reduce=record("whole")), PLAIN), x, dy)
    answers = iter(largest["whole"] * 2)
    halves = []
    for part in (slice(0, 16), slice(16, 32)):
        halves.append(run(Nvfp4Trained(plain, Moment(reduce=lambda value: next(answers)), PLAIN), x[:, part], dy[:, part]))
    assert torch.equal(torch.cat([h[0] for h in halves], 1), whole[0]) and torch.equal(torch.cat([h[1] for h in halves], 1), whole[1])
    torch.testing.assert_close(halves[0][2] + halves[1][2], whole[2], rtol=1e-5, atol=1e-5)


DIMS = DiTDims(dim=32, ffn=64, layers=3, heads=2, text_dim=8, text_len=8, freq_dim=32, channels=4)


@pytest.mark.parametrize("kind, frozen", [(NVFP4_TRAINED, False), (NVFP4_FROZEN, True), (FP8_TRAINED, False)])
def test_a_network_is_converted_with_its_names_and_takes_lora(kind, frozen):
    dit = WanDiT(DIMS)
    before = set(dit.state_dict())
    converter = TrainingConverter(kind=kind, frozen=frozen)
    report = converter.convert(dit, TINY)
    assert len(report.converted) == (8 if kind == FP8_TRAINED else 10) * DIMS.layers and json.loads(converter.metadata()[TRAINED_AS])["kind"] == kind
    if not frozen:
        assert set(dit.state_dict()) == before
    assert len(attach(dit, TINY, rank=2)) == 20 * DIMS.layers
    x = torch.randn(1, 4, DIMS.dim)
    dit.blocks[0].ffn[0](x).sum().backward()
    assert dit.blocks[0].ffn[0].lora[0].b.grad is not None
    dit.to(torch.bfloat16)
    assert dit.blocks[0].ffn[0](x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("default", [True, False])
def test_fp8_trains_the_layers_that_it_generates_with(default):
    selection = Selection(filtered=("blocks.1.ffn.0",), default=default)
    trained = TrainingConverter(kind=FP8_TRAINED, selection=selection).convert(WanDiT(DIMS), TINY)
    served = LinearConverter(backend=BACKENDS[FP8], selection=selection).convert(WanDiT(DIMS), TINY)
    assert list(trained.converted) == list(served.converted) and ("blocks.0.cross_attn.k" in trained.converted) == (not default)


@pytest.mark.parametrize("kind", [NVFP4_TRAINED, FP8_TRAINED])
def test_compiled_blocks_compute_the_same_and_compile_once(kind):
    torch._dynamo.reset()
    dit = WanDiT(DIMS)
    converter = TrainingConverter(kind=kind)
    converter.convert(dit, TINY)
    ffn, x = dit.blocks[0].ffn, torch.randn(1, 16, DIMS.dim)
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(ffn, backend=backend)
    for seed in range(3):
        converter.moment.begin(seed)
        converter.moment.weights_changed()
        torch.testing.assert_close(compiled(x), ffn(x))
        if seed == 0:
            first = len(compiles)
    assert len(compiles) == first
