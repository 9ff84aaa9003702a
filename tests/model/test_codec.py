"""The codec: normalisation in float32, statistics of the first latent frame, groups and streams equal the whole."""

from __future__ import annotations

import pytest
import torch

from longlive.core.errors import InputError
from longlive.models.codec import VideoCodec, cpu_dtype, decoder_frames, wan22_statistics
from longlive.models.spec import WAN22_VAE, VAEDims
from longlive.models.wan_vae import WanVAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVAE(VAEDims(encoder_base=4, decoder_base=4)).requires_grad_(False)


@pytest.fixture
def codec(vae):
    torch.manual_seed(1)
    return VideoCodec(vae, torch.randn(2, 48), torch.rand(2, 48) + 0.5)


def test_the_first_latent_frame_has_its_own_statistics(codec):
    mu = torch.randn(1, 3, 48, 2, 2)
    z = codec.normalise(mu)
    column = (slice(None), None, None)
    torch.testing.assert_close(z[:, 0], (mu[:, 0] - codec.mean_KC[0][column]) / codec.std_KC[0][column])
    torch.testing.assert_close(z[:, 1:], (mu[:, 1:] - codec.mean_KC[1][column]) / codec.std_KC[1][column])
    torch.testing.assert_close(codec.denormalise(z), mu)
    torch.testing.assert_close(codec.denormalise(codec.normalise(mu, start=False), start=False), mu)
    assert not torch.allclose(codec.normalise(mu, start=False), z)


@pytest.mark.parametrize("group", [0, 1, 2, 3])
@torch.no_grad()
def test_streams_and_groups_equal_the_whole(vae, codec, group):
    z = torch.randn(1, 6, 48, 1, 2)
    whole = codec.decode(z)
    grouped = VideoCodec(vae, codec.mean_KC, codec.std_KC, group=group)
    torch.testing.assert_close(grouped.decode(z), whole, rtol=1e-4, atol=1e-5)
    state, first = grouped.stream_decode(None, z[:, :2])
    branch = state.clone()
    state, rest = grouped.stream_decode(state, z[:, 2:])
    assert state.latents == 6 and branch.latents == 2
    torch.testing.assert_close(torch.cat([first, rest], 2), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grouped.stream_decode(branch, z[:, 2:])[1], rest)
    sizes = [pixels.shape[2] for _, pixels in grouped.decode_groups(None, z)]
    assert sizes == {0: [21], 1: [1, 4, 4, 4, 4, 4], 2: [5, 8, 8], 3: [9, 12]}[group]


@torch.no_grad()
def test_a_stream_of_bytes_reuses_the_memory_of_its_state(codec):
    z = torch.randn(1, 6, 48, 1, 2)
    (first, _), (branch, _) = list(codec.byte_groups(None, z[:, :2]))[-1], list(codec.byte_groups(None, z[:, :2]))[-1]
    kept, addresses = first.clone(), [cache.data_ptr() for cache in first.vae.caches]
    state, found = next(codec.byte_groups(first, z[:, 2:4]))
    assert [cache.data_ptr() for cache in state.vae.caches] == addresses and state.latents == 4
    right, pixels = codec.stream_decode(branch, z[:, 2:4])
    assert torch.equal(found, codec.to_uint8(pixels)) and all(map(torch.equal, state.vae.caches, right.vae.caches))
    assert torch.equal(next(codec.byte_groups(kept, z[:, 2:4]))[1], found)
    _, rest = next(codec.byte_groups(state, z[:, 4:]))
    assert torch.equal(rest, codec.to_uint8(codec.stream_decode(right, z[:, 4:])[1]))


@torch.no_grad()
def test_the_first_latent_frame_is_decoded_by_itself_where_the_codec_chooses(codec, monkeypatch):
    z = torch.randn(1, 6, 48, 1, 2)
    whole = codec.decode(z)
    monkeypatch.setattr(VideoCodec, "_automatic", True)
    groups = list(codec.decode_groups(None, z))
    assert [pixels.shape[2] for _, pixels in groups] == [1, 20]
    assert len(list(codec.decode_groups(groups[0][0], z[:, 1:]))) == 1
    torch.testing.assert_close(torch.cat([pixels for _, pixels in groups], 2), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stream_encoding_equals_encoding(codec):
    pixels = torch.rand(1, 3, 13, 16, 32) * 2 - 1
    state, first = codec.stream_encode(None, pixels[:, :, :5])
    _, rest = codec.stream_encode(state, pixels[:, :, 5:])
    torch.testing.assert_close(torch.cat([first, rest], 1), codec.encode(pixels), rtol=1e-4, atol=1e-4)


def test_frames_that_cannot_be_encoded_name_the_equation(codec):
    with pytest.raises(InputError, match=r"7 frames cannot be encoded: the VAE takes 1 \+ 4k frames; use 5 or 9"):
        codec.encode(torch.zeros(1, 3, 7, 16, 16))


def test_statistics_stay_float32_when_the_network_does_not():
    mean, std = wan22_statistics()
    codec = VideoCodec(WanVAE(VAEDims(encoder_base=4, decoder_base=4)), mean, std).to(dtype=torch.bfloat16)
    assert codec.dtype == torch.bfloat16 and torch.equal(codec.mean_KC, mean) and codec.std_KC.dtype == torch.float32
    assert mean.shape == std.shape == (1, 48) and mean[0, 19] == 0.5109 and std[0, 39] == 1.6887


def test_wrong_statistics_are_refused(vae):
    with pytest.raises(InputError, match="latent statistics"):
        VideoCodec(vae, torch.zeros(3, 48), torch.ones(3, 48))


def test_uint8_rounds_and_clamps():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 100.4 / 127.5 - 1]).reshape(1, 1, 1, 1, 6).expand(1, 3, 1, 1, 6)
    out = VideoCodec.to_uint8(x)
    assert out.shape == (1, 1, 1, 6, 3) and out.dtype == torch.uint8
    assert out[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 100]


def test_decoding_is_differentiable_in_spite_of_groups(vae, codec):
    grouped = VideoCodec(vae, codec.mean_KC, codec.std_KC, group=1)
    z = torch.randn(1, 2, 48, 1, 1, requires_grad=True)
    grouped.decode(z).square().mean().backward()
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "able, dtype",
    [({"avx512_bf16": True}, torch.bfloat16), ({"avx512_f": True, "avx512_bf16": False}, torch.float32), (None, torch.float32)],
)
def test_the_precision_of_a_cpu_is_what_it_multiplies_in(monkeypatch, able, dtype):
    """`None`: a torch that does not tell."""
    if able is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert cpu_dtype() == dtype


def test_no_convolution_over_time_gets_more_values_than_32_bits_count():
    pixels = 44 * 80
    # the widest input: 512 channels at 352 x 640, 4 frames a latent frame and 2 of the past: (4 x 4 + 2) x 352 x 640 x 512 < 2^31 <= (4 x 5 + 2) x ...
    assert decoder_frames(WAN22_VAE, pixels) == 4
    assert (4 * 4 + 2) * 352 * 640 * 512 < 2**31 <= (4 * 5 + 2) * 352 * 640 * 512
    assert decoder_frames(WAN22_VAE.pruned(0.5), pixels) == 8
    assert decoder_frames(WAN22_VAE, 100 * pixels) == 1
