"""Activations are quantised once for all layers that read them, and never where somebody else reads them too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longlive.models.spec import DiTDims
from longlive.models.wan_dit import Block
from longlive.ops import fp8_matmul, intake, nvfp4
from longlive.ops.fp8 import RowFP8, quantise_rows
from longlive.ops.intake import intake_of, prepared
from longlive.ops.linear import joint_linear, linear_gelu
from longlive.ops.residual import add_norm, add_norm_modulate, norm_modulate
from longlive.precision.linear import EmulatedLinear, Fp8Linear, W4A8Linear, W4A16Linear

DIM = 32


def layer(kind, seed=0, out=48):
    plain = nn.Linear(DIM, out)
    torch.manual_seed(seed)
    with torch.no_grad():
        nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    weight, bias = plain.weight.detach(), plain.bias
    if kind is Fp8Linear:
        return Fp8Linear.of(weight, bias)
    packed = nvfp4.quantise(weight)
    return EmulatedLinear(packed, bias, "mse") if kind is EmulatedLinear else kind(packed, bias)


@pytest.mark.parametrize("kind", [Fp8Linear, W4A8Linear, EmulatedLinear])
def test_three_readers_share_one_quantisation_and_get_what_they_got_alone(kind, monkeypatch):
    layers = [layer(kind, seed) for seed in range(3)]
    x = torch.randn(2, 5, DIM)
    with torch.no_grad():
        alone = [one(x) for one in layers]
        calls = []
        for name in ("quantised_rows", "quantised_activation"):
            real = vars(intake)[name]
            monkeypatch.setattr(intake, name, lambda *a, real=real: calls.append(1) or real(*a))
        joint = joint_linear(x, *layers)
    assert len(calls) == 1 and all(torch.equal(a, b) for a, b in zip(alone, joint))


def test_who_gets_the_plain_tensor():
    x = torch.randn(1, 2, DIM)
    eight, four = layer(Fp8Linear), layer(EmulatedLinear)
    with torch.no_grad():
        assert isinstance(prepared(x, eight, layer(W4A8Linear)), RowFP8)
        assert prepared(x, eight, four) is x and prepared(x, eight, nn.Linear(DIM, 4)) is x and prepared(x, layer(W4A16Linear)) is x
        eight.register_forward_hook(lambda *_: None)
        assert intake_of(x, eight) is None
    assert intake_of(x.requires_grad_(), layer(Fp8Linear)) is None


def test_producers_write_what_the_reader_takes():
    torch.manual_seed(0)
    reader = layer(Fp8Linear)
    x, y, shift, scale = torch.randn(1, 6, DIM), torch.randn(1, 6, DIM), torch.randn(1, 3, DIM), torch.randn(1, 3, DIM)
    with torch.no_grad():
        for made, plain in (
            (norm_modulate(x, shift, scale, 1e-6, (reader,)), norm_modulate(x, shift, scale, 1e-6)),
            (add_norm_modulate(x, y, shift, scale, 1e-6, (reader,))[1], add_norm_modulate(x, y, shift, scale, 1e-6)[1]),
            (add_norm(x, y, scale, shift[0, 0], scale[0, 0], 1e-6, (reader,))[1], add_norm(x, y, scale, shift[0, 0], scale[0, 0], 1e-6)[1]),
            (linear_gelu(x, first := layer(Fp8Linear, out=DIM), reader), linear_gelu(x, first)),
        ):
            assert isinstance(made, RowFP8) and made == quantise_rows(plain)


def test_a_block_quantises_each_distinct_input_once(monkeypatch):
    """Self-attention's input, its output's, cross-attention's query, its output's, and two of the feed-forward: 6, not 8; text keys and values aside."""
    dims = DiTDims(dim=DIM, ffn=48, layers=1, heads=2, text_dim=8, text_len=8, channels=4)
    torch.manual_seed(0)
    block = Block(dims).requires_grad_(False)
    nn.init.normal_(block.modulation)
    for module in (block.self_attn, block.cross_attn):
        for name in "qkvo":
            setattr(module, name, Fp8Linear.of(getattr(module, name).weight, getattr(module, name).bias))
    for i in (0, 2):
        block.ffn[i] = Fp8Linear.of(block.ffn[i].weight, block.ffn[i].bias)
    counted = []
    real = fp8_matmul.quantise_rows
    monkeypatch.setattr(fp8_matmul, "quantise_rows", lambda *a, **k: counted.append(tuple(a[0].shape)) or real(*a, **k))
    kv = (torch.randn(1, 4, 2, DIM // 2), torch.randn(1, 4, 2, DIM // 2))
    with torch.no_grad():
        block(torch.randn(1, 6, DIM), torch.randn(1, 1, 6, DIM), torch.zeros(1, 1, dtype=torch.int64), None, torch.zeros(1, 4), kv, lambda q, k, v, _: v, 0)
    assert len(counted) == 6
