"""What fused operations fall back to, and what must be true wherever they run: joined projections are the layers', other layers are left alone."""

import pytest
import torch
from tiny_pipeline import random_pipeline
from torch import nn

from longlive.cache.attend import Cached
from longlive.cache.pages import Pages
from longlive.cache.policy import Window, WindowPolicy
from longlive.core.tokens import Tokens
from longlive.models.joint import join_projections
from longlive.models.lora import attach
from longlive.ops import residual
from longlive.ops.heads import Heads, attend_heads
from longlive.ops.linear import is_plain, joint_linear, lay_side_by_side, linear_gelu
from longlive.ops.modulate import gated_add, modulate
from longlive.ops.norm import layer_norm


def layers(count=3, features=6):
    torch.manual_seed(0)
    return [nn.Linear(features, features).double().requires_grad_(False) for _ in range(count)]


def test_joined_projections_are_one_product_and_the_same_parameters():
    three, x = layers(), torch.randn(2, 5, 6, dtype=torch.float64)
    before, identities = [layer(x) for layer in three], [id(layer.weight) for layer in three]
    assert joint_linear(x, *three)[0].stride(1) == 6  # apart in memory: each by itself
    lay_side_by_side(three)
    after = joint_linear(x, *three)
    assert after[0].stride(1) == 18 and [id(layer.weight) for layer in three] == identities
    for one, two, layer in zip(before, after, three):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(layer(x), one)
    k, v = joint_linear(x, *three[1:])
    assert k.stride(1) == 12
    torch.testing.assert_close(v, after[2])
    three[1].weight.mul_(2)  # what is written in place is seen
    torch.testing.assert_close(joint_linear(x, *three)[1], three[1](x))


@pytest.mark.parametrize("change", ["moved", "hook", "other class", "gradients"])
def test_what_is_no_plain_layer_is_called(change):
    three, x = layers(), torch.randn(2, 5, 6, dtype=torch.float64)
    lay_side_by_side(three)
    if change == "moved":
        three[1].weight.data = three[1].weight.data.clone()
    elif change == "hook":
        three[1].register_forward_hook(lambda layer, args, y: y + 1)
    elif change == "other class":
        three[1] = nn.Sequential(three[1], nn.Tanh())
    else:
        x.requires_grad_()
    for one, two in zip(joint_linear(x, *three), [layer(x) for layer in three]):
        torch.testing.assert_close(one, two)
        assert one.stride(1) == 6
    assert not is_plain(nn.Linear(2, 2, bias=False))


def test_a_generator_with_lora_keeps_its_layers_apart():
    pipeline = random_pipeline()
    assert join_projections(pipeline.dit) == 2
    names = set(pipeline.dit.state_dict())
    attach(pipeline.dit, pipeline.spec, 2)
    assert join_projections(pipeline.dit) == 0 and names < set(pipeline.dit.state_dict())


def test_gelu_after_a_layer():
    (layer,), x = layers(1), torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(linear_gelu(x, layer), nn.functional.gelu(layer(x), approximate="tanh"))
    layer.register_forward_hook(lambda layer, args, y: y + 1)
    torch.testing.assert_close(linear_gelu(x, layer), nn.functional.gelu(layer(x), approximate="tanh"))


def test_residual_operations():
    x, y = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    shift, scale, gate = torch.randn(3, 2, 3, 4, dtype=torch.float64)
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(residual.norm_modulate(x, shift, scale, 1e-6), modulate(layer_norm(x, 1e-6), shift, scale))
    total, normed = residual.add_norm(x, y, gate, weight, bias, 1e-6)
    torch.testing.assert_close(total, gated_add(x, y, gate))
    torch.testing.assert_close(normed, layer_norm(total, 1e-6, weight, bias))
    total, normed = residual.add_norm_modulate(x, y, shift, scale, 1e-6)
    torch.testing.assert_close((total, normed), (x + y, modulate(layer_norm(x + y, 1e-6), shift, scale)))
    torch.testing.assert_close(residual.add_gated(x, y, gate), gated_add(x, y, gate))


@pytest.mark.parametrize("relative", [False, True])
def test_bare_projections_reach_the_pages_as_normalised_heads_do(relative):
    policy, tokens_of_page, heads, d = WindowPolicy(pages=3, anchor=True, pin=True), 4, 2, 6
    stores = [Pages(1, 2, 3, tokens_of_page, heads, d, device=torch.device("cpu"), dtype=torch.float64) for _ in range(2)]
    windows = [policy.open(w, 1) for w in [policy.open(Window(), 0)] * 2]
    tokens = Tokens(
        torch.tensor([[8.0, 9.0], [10.0, 11.0]], dtype=torch.float64), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool),
        torch.zeros(2, 1, dtype=torch.int64), 1, 2,
    )  # fmt: skip
    q, k, v = torch.randn(3, 2, tokens_of_page, heads * d, dtype=torch.float64)
    bare = Heads(q, k, v, *torch.rand(2, heads * d, dtype=torch.float64), 1e-6, d)
    strategies = [Cached(store, windows, 1, tokens, d, relative=relative) for store in stores]
    with torch.no_grad():
        assert strategies[0].takes(bare)
        read = attend_heads(strategies[0], bare, 0)
        torch.testing.assert_close(read, strategies[1](*bare.normalised(), 0))
    for one, two in zip(stores[0].snapshot(), stores[1].snapshot()):
        assert torch.equal(one, two) and one.abs().sum() > 0
    assert not strategies[0].takes(bare)  # gradients are on: nothing may be written in place
