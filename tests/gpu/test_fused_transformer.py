"""Fused kernels of the transformer against their torch references: odd sizes, every combination of parts, both precisions."""

import pytest
import torch
from kernels_here import DEVICE, GPU_ONLY, INTERPRETED, MARKS, apart, close, random

from longlive.ops import heads as heads_op
from longlive.ops import inference
from longlive.ops import linear as linear_op
from longlive.ops import residual as residual_op
from longlive.ops.attention import attention
from longlive.ops.coded_attention import write_codes
from longlive.ops.heads import Heads
from longlive.ops.modulate import gated_add, modulate
from longlive.ops.norm import layer_norm, rms_norm
from longlive.ops.rope import apply_rope

pytestmark = MARKS
EPS = 1e-6
SIZES = [(1, 6, 3, 20), (2, 8, 4, 96), (1, 5, 1, 257), (2, 4, 2, 3072)]  # batch, tokens, groups, features
DTYPES = [torch.float32, torch.bfloat16]


def wide(*tensors):
    return [t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, groups, features", SIZES)
def test_residual_and_norm(batch, tokens, groups, features, dtype):
    from longlive.ops.triton_residual import residual_norm

    x, y = (random(batch, tokens, features, seed=i, dtype=dtype) for i in (1, 2))
    rows = random(batch, groups, 6, features, seed=3, dtype=dtype)  # as a block has them: strided views of one tensor
    shift, scale, gate = rows[:, :, 0], rows[:, :, 4], rows[:, :, 2]
    weight, bias = random(features, seed=4, dtype=dtype), random(features, seed=5, dtype=dtype)
    total, normed = residual_norm(x, None, None, scale, shift, EPS, modulated=True)
    assert total is x
    close(normed, modulate(layer_norm(x.double(), EPS), *wide(shift, scale)), dtype)
    for gating in (gate, None):
        right = gated_add(*wide(x, y, gate)) if gating is not None else x.double() + y.double()
        total, normed = residual_norm(x, y, gating, scale, shift, EPS, modulated=True)
        close(total, right, dtype)
        close(normed, modulate(layer_norm(total.double(), EPS), *wide(shift, scale)), dtype)
        total, normed = residual_norm(x, y, gating, weight, bias, EPS, modulated=False)
        close(total, right, dtype)
        close(normed, layer_norm(total.double(), EPS, *wide(weight, bias)), dtype)
    total, normed = residual_norm(x, y, gate, None, None, 0.0, modulated=False)
    assert normed is None
    close(total, gated_add(*wide(x, y, gate)), dtype)


@pytest.mark.parametrize("shared", [True, False])
def test_one_row_of_modulation_serves_all_samples_or_each_has_its_own(shared):
    from longlive.ops.triton_residual import residual_norm

    x = random(3, 4, 10)
    shift, scale = (random(1 if shared else 3, 2, 10, seed=i) for i in (1, 2))
    normed = residual_norm(x, None, None, scale, shift, EPS, modulated=True)[1]
    close(normed, modulate(layer_norm(x.double(), EPS), *wide(shift.expand(3, -1, -1), scale.expand(3, -1, -1))), torch.float32)


@pytest.mark.parametrize("samples", [(1, 1), (1, 3), (3, 1)])
def test_rows_of_modulation_may_lie_in_memory_in_different_ways(samples):
    from longlive.ops.triton_residual import residual_norm

    x, shift = random(3, 4, 10), random(samples[0], 2, 6, 10, seed=1)[:, :, 3]
    scale = random(samples[1], 2, 10, seed=2)
    normed = residual_norm(x, None, None, scale, shift, EPS, modulated=True)[1]
    close(normed, modulate(layer_norm(x.double(), EPS), *wide(shift.expand(3, -1, -1), scale.expand(3, -1, -1))), torch.float32)


def projections(batch, tokens, count, head_dim, dtype):
    """q, k, v as views of one joint product."""
    joint = random(batch, tokens, 3 * count * head_dim, seed=1, dtype=dtype)
    q, k, v = joint.split(count * head_dim, -1)
    weights = [1 + 0.2 * random(count * head_dim, seed=i, dtype=dtype) for i in (2, 3)]
    return Heads(q, k, v, *weights, EPS, head_dim)


def tables(batch, tokens, head_dim):
    angle = random(batch, tokens, head_dim // 2, seed=9) * 20
    return angle.cos(), angle.sin()


HEADS = [(1, 4, 3, 8), (2, 5, 4, 64), (1, 3, 5, 12), (2, 2, 24, 128)]  # batch, tokens, heads, features of a head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, count, head_dim", HEADS)
@pytest.mark.parametrize("rotate_k, queries", [(True, True), (False, True), (True, False)])
def test_norm_rope_write(batch, tokens, count, head_dim, dtype, rotate_k, queries):
    from longlive.ops.triton_heads import norm_rope_write

    heads = projections(batch, tokens, count, head_dim, dtype)
    rope = tables(batch, tokens, head_dim)
    slot = torch.arange(batch, device=DEVICE) % 3 + 1
    pages = [torch.full((batch, 4, tokens, count, head_dim), 7.0, device=DEVICE, dtype=dtype) for _ in range(2)]
    q_in = heads.q_BND if queries else None
    q = norm_rope_write(q_in, heads.k_BND, heads.v_BND, (heads.weight_q, heads.weight_k), EPS, rope, slot, pages, rotate_k=rotate_k)
    truth = Heads(*wide(heads.q_BND, heads.k_BND, heads.v_BND, heads.weight_q, heads.weight_k), EPS, head_dim).normalised()
    if queries:
        close(q, apply_rope(truth[0], *wide(*rope)), dtype)
    else:
        assert q is None
    rows = torch.arange(batch, device=DEVICE)
    close(pages[0][rows, slot], apply_rope(truth[1], *wide(*rope)) if rotate_k else truth[1], dtype)
    assert torch.equal(pages[1][rows, slot].flatten(2), heads.v_BND)
    for page in pages:  # other slots are untouched
        page[rows, slot] = 7.0
        assert (page == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # for the interpreter, too
@pytest.mark.parametrize("batch, tokens, count, head_dim", [(2, 16, 1, 64), (1, 80, 3, 128)])
@pytest.mark.parametrize("queries", [True, False])
def test_norm_rope_code(batch, tokens, count, head_dim, dtype, queries):
    """Codes of keys are off by a rounding of the norm at most, those of values not at all; other slots are untouched."""
    from longlive.ops.triton_heads import norm_rope_code

    heads, rope = projections(batch, tokens, count, head_dim, dtype), tables(batch, tokens, head_dim)
    slot = torch.arange(batch, device=DEVICE) % 3 + 1
    shapes = (batch, 4, tokens, count, head_dim), (batch, count, head_dim, 4 * tokens)
    pages, right = ([torch.full(shape, 7, device=DEVICE, dtype=torch.uint8).view(torch.float8_e4m3fn) for shape in shapes] for _ in range(2))
    q_in = heads.q_BND if queries else None
    q = norm_rope_code(q_in, heads.k_BND, heads.v_BND, (heads.weight_q, heads.weight_k), EPS, rope, slot, pages)
    truth = Heads(*wide(heads.q_BND, heads.k_BND, heads.v_BND, heads.weight_q, heads.weight_k), EPS, head_dim).normalised()
    write_codes(apply_rope(truth[1], *wide(*rope)), heads.v_BND.unflatten(-1, (count, head_dim)), slot, *right)
    if queries:
        close(q, apply_rope(truth[0], *wide(*rope)), dtype)
    else:
        assert q is None
    differing = [mine.view(torch.uint8) != theirs.view(torch.uint8) for mine, theirs in zip(pages, right)]
    if INTERPRETED:  # the interpreter rounds what should become the next power of two down by half
        assert all(apart(mine.float(), theirs.float()) < 0.2 and d.float().mean() < 0.1 for mine, theirs, d in zip(pages, right, differing))
    else:
        assert differing[0].float().mean() < 1e-3 and apart(pages[0].float(), right[0].float()) < 5e-3 and not differing[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, tokens, count, head_dim", HEADS)
def test_norm_heads(batch, tokens, count, head_dim, dtype):
    from longlive.ops.triton_heads import norm_heads

    heads = projections(batch, tokens, count, head_dim, dtype)
    truth = rms_norm(*wide(heads.k_BND, heads.weight_k), EPS)
    close(norm_heads(heads.k_BND, heads.weight_k, EPS, head_dim, None), truth.unflatten(-1, (count, head_dim)), dtype)
    rope = tables(1, tokens, head_dim)  # one table for all samples
    turned = apply_rope(truth.unflatten(-1, (count, head_dim)), *wide(*rope))
    close(norm_heads(heads.k_BND, heads.weight_k, EPS, head_dim, rope), turned, dtype)


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])  # the interpreter multiplies no bfloat16 matrices
@pytest.mark.parametrize(
    "groups, queries, rows, keys, count, head_dim",
    [(1, 5, 1, 3, 2, 16), (3, 130, 2, 70, 2, 32), (2, 65, 4, 144, 1, 64), (1, 33, 2, 16, 2, 128), (2, 64, 3, 256, 1, 64), (1, 70, 2, 300, 1, 32)],
)
def test_text_attention(groups, queries, rows, keys, count, head_dim, dtype):
    from longlive.ops.triton_text import text_attention as fused_attention

    q = random(groups, queries, count, head_dim, seed=1, dtype=dtype)
    k, v = (random(rows, keys, count, head_dim, seed=i, dtype=dtype) for i in (2, 3))
    bias = random(rows, keys, seed=4).masked_fill(random(rows, keys, seed=5) > 0.5, -torch.inf)
    bias[:, -1] = 3.5  # one key that stands for many
    if keys == 256:  # room without text
        bias[:, 130:], bias[1, 5:] = -torch.inf, -torch.inf
    chosen = torch.arange(groups, device=DEVICE) * 7 % rows
    truth = attention(q.double(), *(t.double().index_select(0, chosen) for t in (k, v)), bias.double().index_select(0, chosen)[:, None, None], kernel="math")
    found = fused_attention(q, k, v, bias, chosen)
    assert found.isfinite().all() and apart(found, truth) < (2e-3 if dtype == torch.float16 else 1e-2)


@GPU_ONLY
@pytest.mark.parametrize("features", [48, 256])
def test_operations_take_the_kernel_only_without_gradients(features, monkeypatch):
    from longlive.ops import triton_residual

    calls = []
    real = triton_residual.residual_norm
    monkeypatch.setattr(triton_residual, "residual_norm", lambda *a, **k: calls.append(1) or real(*a, **k))
    x, y = (random(2, 6, features, seed=i, dtype=torch.bfloat16) for i in (1, 2))
    shift, scale = (random(2, 3, features, seed=i, dtype=torch.bfloat16) for i in (3, 4))
    fast = residual_op.add_norm_modulate(x, y, shift, scale, EPS)
    assert len(calls) == 1
    x.requires_grad_()
    slow = residual_op.add_norm_modulate(x, y, shift, scale, EPS)
    assert len(calls) == 1 and slow[1].requires_grad
    assert all(apart(a, b) < 0.01 for a, b in zip(fast, slow))
    slow[1].sum().backward()
    assert x.grad.isfinite().all()


@GPU_ONLY
@pytest.mark.parametrize("bias", [True, False])
def test_linear_with_gelu(bias):
    layer = torch.nn.Linear(64, 200, bias=bias).to(DEVICE, torch.bfloat16).requires_grad_(False)
    x = 3 * random(2, 33, 64, dtype=torch.bfloat16)
    truth = torch.nn.functional.gelu(torch.nn.Linear.forward(layer.double(), x.double()), approximate="tanh")
    assert apart(linear_op.linear_gelu(x, layer.bfloat16()), truth) < 5e-3


@GPU_ONLY
def test_joint_projections_are_those_of_the_layers():
    layers = [torch.nn.Linear(64, 96).to(DEVICE, torch.bfloat16).requires_grad_(False) for _ in range(3)]
    x = random(2, 7, 64, dtype=torch.bfloat16)
    apiece = [layer(x) for layer in layers]
    linear_op.lay_side_by_side(layers)
    for one, two in zip(linear_op.joint_linear(x, *layers), apiece):
        assert apart(one, two) < 1e-3 and one.stride(1) == 3 * 96


@GPU_ONLY
def test_heads_reach_the_pages_through_the_kernel(monkeypatch):
    from longlive.ops import triton_heads

    calls = []
    real = triton_heads.norm_rope_write
    monkeypatch.setattr(triton_heads, "norm_rope_write", lambda *a, **k: calls.append(1) or real(*a, **k))
    heads, rope = projections(2, 5, 4, 64, torch.bfloat16), tables(2, 5, 64)
    pages = [torch.zeros(2, 3, 5, 4, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    slot = torch.tensor([2, 0], device=DEVICE)
    q = heads_op.norm_rope_write(heads, rope, slot, *pages[:2], rotate_k=True)
    with torch.enable_grad():
        wants = Heads(heads.q_BND.clone().requires_grad_(), heads.k_BND, heads.v_BND, heads.weight_q, heads.weight_k, EPS, 64)
        again = heads_op.norm_rope_write(wants, rope, slot, *pages[2:], rotate_k=True)
    assert len(calls) == 1
    assert apart(q, again) < 0.01 and apart(pages[0], pages[2]) < 0.01 and torch.equal(pages[1], pages[3])


@GPU_ONLY
@pytest.mark.parametrize("settings", [{}, {"relative": True}, {"guidance": 3.0}], ids=str)
def test_a_film_in_half_precision_is_no_worse_than_without_kernels(settings, monkeypatch):
    from test_transformer import film

    truth, fast = film("cpu", torch.float32, **settings), film("cuda", torch.bfloat16, **settings)
    monkeypatch.setattr(inference, "fused", lambda x: False)
    monkeypatch.setattr(linear_op, "unrecorded", lambda *tensors: False)
    plain = film("cuda", torch.bfloat16, **settings)
    assert 0 < apart(fast, plain) and apart(fast, truth) < 1.1 * apart(plain, truth)
