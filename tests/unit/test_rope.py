"""Rotation from positions: right angles, no longest film, only distances matter."""

import pytest
import torch

from longlive.core.tokens import Tokens
from longlive.ops.rope import apply_rope, axis_pairs, rope_tables


def tokens_at(position):
    position = torch.as_tensor(position, dtype=torch.float64)[None]
    frames = position.shape[1]
    return Tokens(position, torch.zeros(frames, dtype=torch.int64), torch.ones(frames, dtype=torch.bool), torch.zeros(1, 1), 2, 3)


@pytest.mark.parametrize("head_dim, pairs", [(128, (22, 21, 21)), (64, (12, 10, 10)), (24, (4, 4, 4))])
def test_share_of_each_axis(head_dim, pairs):
    assert axis_pairs(head_dim) == pairs


def test_agrees_with_complex_rotation():
    cos, sin = rope_tables(tokens_at([5.0, 9.5]), 24, t_scale=0.5)
    token = 1 * 6 + 1 * 3 + 2  # frame 1, row 1, column 2
    for position, first in ((9.5 * 0.5, 0), (1, 4), (2, 8)):
        angle = position * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        assert torch.allclose(cos[0, token, first : first + 4].double(), angle.cos(), atol=1e-7)
        assert torch.allclose(sin[0, token, first : first + 4].double(), angle.sin(), atol=1e-7)
    x = torch.randn(1, 12, 2, 24)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, :, None]
    assert torch.allclose(apply_rope(x, cos, sin), torch.view_as_real(turned).flatten(-2), atol=1e-6)


def test_only_distances_matter_20000_frames_into_a_film():
    q, k = torch.randn(1, 6, 1, 64), torch.randn(1, 6, 1, 64)

    def logit(start):
        a, b = (apply_rope(x, *rope_tables(tokens_at([p]), 64)) for x, p in ((q, start + 40.25), (k, start)))
        return torch.einsum("bnhd,bmhd->bhnm", a, b)

    near, far = logit(0.0), logit(20000.0)
    assert torch.allclose(near, far, atol=2e-5), (near - far).abs().max()


def test_keeps_the_dtype_and_the_precision_of_its_input():
    tables = rope_tables(tokens_at([3.0]), 24)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert apply_rope(torch.ones(1, 6, 1, 24, dtype=dtype), *tables).dtype == dtype
