"""Attention in bfloat16 on Hopper against attention in float64: pages of any length, whatever lies behind their keys; gradients go elsewhere."""

import pytest
import torch
from kernels_here import DEVICE, apart, random

from longlive.ops import attention as ops
from longlive.ops.attention import MANY_KEYS, attention
from longlive.ops.triton_available import fused_roles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not fused_roles(torch.zeros(1, device=DEVICE)), reason="needs Hopper, and Triton's Gluon of one release")]


def pages(batch, keys, heads, head_dim, seed):
    """The first keys of longer pages that nobody filled."""
    whole = torch.full((batch, keys + 40, heads, head_dim), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    whole[:, :keys] = random(batch, keys, heads, head_dim, seed=seed)
    return whole[:, :keys]


@pytest.mark.parametrize("batch, queries, keys, heads, head_dim", [(1, 1, 3, 1, 128), (2, 130, 193, 3, 128), (3, 127, 1000, 2, 64), (1, 300, 4000, 2, 128)])
@pytest.mark.parametrize("sharp", [1.0, 8.0])
def test_against_float64(batch, queries, keys, heads, head_dim, sharp):
    q = random(batch, queries, heads, head_dim, seed=1, dtype=torch.bfloat16) * sharp
    k, v = (pages(batch, keys, heads, head_dim, seed) for seed in (2, 3))
    found = attention(q, k, v, kernel="hopper")
    truth = attention(*(t.double() for t in (q, k, v)), kernel="math")
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and apart(found, truth) < 0.004
    alone = [attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], kernel="hopper") for b in range(batch)]
    assert torch.equal(found, torch.cat(alone))


def test_logits_that_keep_growing():
    q, v = random(1, 64, 1, 64, dtype=torch.bfloat16), random(1, 2000, 1, 64, seed=1, dtype=torch.bfloat16)
    for towards in (torch.linspace(-3, 3, 2000), torch.linspace(3, -3, 2000)):
        k = q[:, :1] * towards.to(DEVICE, torch.bfloat16)[None, :, None, None]
        truth = attention(*(t.double() for t in (q, k, v)), kernel="math")
        assert apart(attention(q, k, v, kernel="hopper"), truth) < 0.004


def test_what_is_no_number_reaches_the_result():
    q, k, v = (random(1, 128, 2, 64, seed=n, dtype=torch.bfloat16) for n in range(3))
    k[0, 5] = torch.nan
    assert attention(q, k, v, kernel="hopper").isnan().all()


def test_when_it_is_taken(monkeypatch):
    from longlive.ops import hopper_attention

    taken, kernel = [], hopper_attention.attention
    monkeypatch.setattr(hopper_attention, "attention", lambda q, k, v: taken.append(k.shape[1]) or kernel(q, k, v))
    q, k, v = (random(1, n, 1, 64, seed=n, dtype=torch.bfloat16) for n in (16, MANY_KEYS, MANY_KEYS))
    attention(q, k[:, :-1], v[:, :-1])
    attention(q, k, v, torch.zeros(1, 1, 1, MANY_KEYS, device=DEVICE, dtype=torch.bfloat16))
    attention(q.requires_grad_(), k, v).sum().backward()
    attention(q.detach().half(), k.half(), v.half())
    assert not taken and q.grad.isfinite().all()
    with torch.no_grad():
        found = attention(q, k, v)
    assert taken == [MANY_KEYS] and apart(found, ops.math(q, k, v, None)) < 0.01
