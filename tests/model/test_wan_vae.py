"""The VAE: a whole clip in one call equals any way of cutting it into pieces; one pass is differentiable; state is explicit."""

from __future__ import annotations

import pytest
import torch

from longlive.core.errors import InputError
from longlive.core.pixels import to_uint8
from longlive.models import wan_vae
from longlive.models.spec import VAEDims
from longlive.models.wan_vae import WHOLE_FRAME, Conv, DoublingConv, Walk, WanVAE, average_down
from longlive.ops.frames import duplicate_up, from_patches, norm_silu, to_patches

DIMS = VAEDims(encoder_base=4, decoder_base=4)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVAE(DIMS).double()


def pieces(call, x, sizes, axis=2):
    """`call(piece, state) -> (..., state)` over consecutive pieces; (joined first outputs, last state)."""
    state, out = None, []
    for piece in x.split(sizes, axis):
        *values, state = call(piece, state)
        out.append(values[0])
    return torch.cat(out, axis), state


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [5, 1], [1, 2, 3]])
@torch.no_grad()
def test_decoding_in_pieces_equals_decoding_at_once(vae, sizes):
    z = torch.randn(2, 48, 6, 2, 3, dtype=torch.float64)
    whole, left = vae.decode(z)
    assert whole.shape == (2, 3, 21, 32, 48)
    joined, state = pieces(vae.decode, z, sizes)
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b) for a, b in zip(left.caches, state.caches, strict=True))


@pytest.mark.parametrize("sizes", [[1, 4, 4, 4], [5, 8], [1, 12], [9, 4]])
@torch.no_grad()
def test_encoding_in_pieces_equals_encoding_at_once(vae, sizes):
    x = torch.randn(2, 3, 13, 32, 16, dtype=torch.float64)
    whole, _, _ = vae.encode(x)
    assert whole.shape == (2, 48, 4, 2, 1)
    torch.testing.assert_close(pieces(vae.encode, x, sizes)[0], whole, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_future_does_not_reach_the_past(vae):
    z = torch.randn(1, 48, 4, 2, 2, dtype=torch.float64)
    changed = z.clone()
    changed[:, :, 3] += 1
    a, b = vae.decode(z)[0], vae.decode(changed)[0]
    assert torch.equal(a[:, :, :9], b[:, :, :9]) and not torch.allclose(a[:, :, 9:], b[:, :, 9:])


@torch.no_grad()
def test_state_is_explicit_and_a_clone_is_independent(vae):
    z = torch.randn(1, 48, 3, 2, 2, dtype=torch.float64)
    _, state = vae.decode(z[:, :, :2])
    kept = state.clone()
    first, _ = vae.decode(z[:, :, 2:], state)
    assert torch.equal(vae.decode(z[:, :, 2:], state)[0], first)
    for cache in state.caches:
        cache.zero_()
    assert torch.equal(vae.decode(z[:, :, 2:], kept)[0], first)
    flat, _ = torch.utils._pytree.tree_flatten(kept)
    assert len(flat) == 32 and vae.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.float64))[2].caches.__len__() == 24
    assert vae.decode(z, keep=False)[1] is None


def test_state_holds_copies_not_views(vae):
    _, state = vae.decode(torch.randn(1, 48, 4, 2, 2, dtype=torch.float64))
    assert all(cache.untyped_storage().nbytes() == cache.nbytes for cache in state.caches)


def test_gradients_agree_with_the_eager_inference_path(vae):
    """With gradients on, norm_silu takes another route than without: values must not depend on it, and gradients must reach everything."""
    x = torch.randn(1, 3, 5, 16, 16, dtype=torch.float64)
    mu, logvar, _ = vae.encode(x, keep=False)
    pixels, _ = vae.decode(mu, keep=False)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(vae.encode(x)[0])[0], pixels.detach())
    (pixels.square().mean() + logvar.square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in vae.parameters())
    vae.zero_grad(set_to_none=True)


@pytest.mark.parametrize("frames, start", [(2, True), (7, True), (0, True), (3, False), (5, False)])
def test_frame_counts_that_do_not_fit_are_refused(vae, frames, start):
    state = None if start else vae.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.float64))[2]
    with pytest.raises(InputError, match="4k"):
        vae.encode(torch.zeros(1, 3, frames, 16, 16, dtype=torch.float64), state)


def test_sizes_that_do_not_fit_are_refused(vae):
    with pytest.raises(InputError, match="width 24 is not a multiple of 16"):
        vae.encode(torch.zeros(1, 3, 1, 16, 24, dtype=torch.float64))


def test_a_decoder_without_encoder_says_so():
    vae = WanVAE(DIMS)
    vae.drop_encoder()
    assert not any(name.startswith("encoder") for name in vae.state_dict())
    with pytest.raises(InputError, match="no encoder"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16))


def test_patches_put_the_column_before_the_row():
    x = torch.arange(2 * 3 * 2 * 4 * 6.0).reshape(2, 3, 2, 4, 6)
    patches = to_patches(x)
    assert patches[1, 1, 1, 2, 2 * 4 + 1 * 2 + 0] == x[1, 2, 1, 2, 5]  # channel 2, column 1, row 0
    assert torch.equal(from_patches(patches), x)


@pytest.mark.parametrize("grad", [True, False])
def test_doubling_on_the_small_grid_is_nearest_then_convolution(grad):
    conv, x = DoublingConv(5).double(), torch.randn(2, 3, 4, 3, 5, dtype=torch.float64)
    big = x[:, :, :, None, :, None].expand(2, 3, 4, 2, 3, 2, 5).reshape(2, 3, 8, 6, 5)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(conv.kernel(x, (1, 1)), Conv.kernel(conv, big, (1, 1)))
    if grad:
        grads = [torch.autograd.grad(y.sin().sum(), [conv.weight, conv.bias]) for y in (conv.kernel(x, (1, 1)), Conv.kernel(conv, big, (1, 1)))]
        torch.testing.assert_close(*grads)


def test_other_depths_have_other_strides():
    vae = WanVAE(VAEDims(encoder_base=4, decoder_base=4, multipliers=(1, 2, 2), temporal_down=(False, True), encoder_blocks=1, decoder_blocks=2))
    with torch.no_grad():
        mu, _, _ = vae.encode(torch.zeros(1, 3, 3, 8, 24))
        assert mu.shape == (1, 48, 2, 1, 3) and vae.decode(mu)[0].shape == (1, 3, 3, 8, 24)
    with pytest.raises(InputError, match=r"1 \+ 2k"):
        vae.encode(torch.zeros(1, 3, 2, 8, 8))


@pytest.mark.parametrize("inputs, outputs, time", [(8, 8, 2), (8, 4, 1), (8, 8, 1), (6, 3, 2)])
def test_duplicate_up_is_the_published_index(inputs, outputs, time):
    x = torch.randn(1, 2, 2, 3, inputs)
    out, repeats = duplicate_up(x, outputs, time, first=False), outputs * 4 * time // inputs
    for co, t, i, h, j, w, k in [(0, 0, 0, 0, 0, 0, 0), (outputs - 1, 1, time - 1, 1, 1, 2, 1), (1, 0, 0, 1, 1, 1, 0)]:
        assert out[0, time * t + i, 2 * h + j, 2 * w + k, co] == x[0, t, h, w, (co * 4 * time + i * 4 + 2 * j + k) // repeats]
    assert torch.equal(duplicate_up(x, outputs, time, first=True), out[:, time - 1 :])


def test_average_down_pads_time_in_front():
    x = torch.randn(1, 3, 2, 2, 4)
    out = average_down(x, 8, 2, 2)
    flat = torch.cat([torch.zeros(1, 1, 2, 2, 4), x], 1)[0, :2]  # frames (pad, 0)
    wanted = flat.permute(3, 0, 1, 2).reshape(8, -1).mean(1)
    torch.testing.assert_close(out[0, 0, 0, 0], wanted)


def test_norm_silu_in_bfloat16_keeps_float32_statistics():
    x, gamma = torch.randn(1, 3, 2, 2, 16), torch.rand(16, 1, 1, 1)
    past = torch.zeros(1, 2, 2, 2, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        low = norm_silu(x.bfloat16(), gamma, past)
        high = norm_silu(x.bfloat16().float(), gamma.bfloat16().float(), past.float())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), high, rtol=0.01, atol=0.01)


def test_another_spatial_strategy_sees_every_convolution():
    seen = []

    class Counting(type(WHOLE_FRAME)):
        def convolve(self, conv, x_BTHWC, **options):
            seen.append(tuple(conv.weight.shape[2:]))
            return super().convolve(conv, x_BTHWC, **options)

    vae = WanVAE(DIMS, spatial=Counting())
    with torch.no_grad():
        vae.decode(torch.zeros(1, 48, 2, 1, 1))
    assert len(seen) == sum(p.dim() >= 4 and name.endswith("weight") for name, p in [*vae.decoder.named_parameters(), *vae.conv2.named_parameters()])


def test_a_walk_without_keep_leaves_nothing():
    walk = Walk(None, keep=False, spatial=WHOLE_FRAME, pointwise=norm_silu)
    walk.extend(torch.zeros(1, 1, 1, 1, 1))
    assert walk.state() is None


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[3], [1, 2]])
def test_a_bias_that_is_added_later_is_the_same(vae, sizes, monkeypatch):
    """The route of a GPU: convolutions without their bias, which the next operation adds."""
    torch.manual_seed(1)
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(torch.randn_like(parameter))
    z = torch.randn(1, 48, 3, 2, 3, dtype=torch.float64)
    whole, _ = vae.decode(z)
    monkeypatch.setattr(wan_vae, "adds_bias", lambda x, weight: True)
    torch.testing.assert_close(pieces(vae.decode, z, sizes)[0], whole, rtol=0, atol=1e-10)
    told = pieces(vae.decode_bytes, z, [3])[0]
    assert (told.int() - to_uint8(whole).int()).abs().max() <= 1


@torch.no_grad()
def test_bytes_are_those_of_the_pixels(vae):
    z = torch.randn(2, 48, 3, 2, 3, dtype=torch.float64)
    pixels, state = vae.decode(z)
    told, left = vae.decode_bytes(z)
    assert torch.equal(told, to_uint8(pixels)) and all(map(torch.equal, state.caches, left.caches))


@torch.no_grad()
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 3), (1, 1, 1)])
def test_outputs_are_filled_up_to_whole_vectors(kernel):
    conv, x = Conv(5, 12, kernel).double(), torch.randn(2, 4, 3, 6, 5, dtype=torch.float64)
    pad = (kernel[-1] // 2,) * 2
    bare = conv.kernel(x, pad, bias=False)
    assert conv._whole_vectors().shape[0] == 16 and bare.shape[-1] == 12
    torch.testing.assert_close(bare + conv.bias, conv.kernel(x, pad))


@torch.no_grad()
def test_taps_follow_the_weight():
    conv, x = DoublingConv(3).double(), torch.randn(1, 1, 2, 2, 3, dtype=torch.float64)
    first = conv.kernel(x, (1, 1))
    assert conv._made("phases", conv.phases) is conv._made("phases", conv.phases)
    conv.weight.mul_(2)
    conv.bias.mul_(2)
    torch.testing.assert_close(conv.kernel(x, (1, 1)), 2 * first)
    conv.float()
    assert conv.kernel(x.float(), (1, 1)).dtype == torch.float32


@torch.no_grad()
def test_in_bfloat16_pieces_are_as_near_to_the_truth_as_the_whole(vae):
    """Libraries may add up in another order for another number of frames; what they lose is rounding, wherever a film is cut."""
    low = WanVAE(DIMS).eval()
    low.load_state_dict(vae.state_dict())
    low.bfloat16()
    z = torch.randn(1, 48, 3, 2, 3, generator=torch.Generator().manual_seed(2)).bfloat16()
    truth = pieces(vae.decode, z.double(), [3])[0]
    whole, *others = (pieces(low.decode, z, sizes)[0].double() for sizes in ([3], [1, 2], [2, 1], [1, 1, 1]))
    lost = (whole - truth).norm()
    assert 0 < lost < 0.05 * truth.norm()
    assert all((other - whole).norm() < lost for other in others)
