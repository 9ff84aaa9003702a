"""The decoder in FP8: what is replaced, streams in pieces, state of codes, how far it is from the decoder in float32."""

import pytest
import torch
import torch.nn.functional as F

from longlive.config import default_config
from longlive.core.errors import ConfigError, InputError
from longlive.engine.parts import load_codec, load_dit
from longlive.evaluation.world import evaluation_stories
from longlive.models.codec import VideoCodec
from longlive.models.spec import VAEDims, model_spec
from longlive.models.vae_fp8 import Fp8Conv, decoder_to_fp8
from longlive.models.wan_vae import WanVAE
from longlive.ops import triton_available
from longlive.ops.conv_fp8 import convolution_fp8, norm_silu_fp8, quantise_weight
from longlive.ops.frames import norm_silu
from longlive.world.render import chunk_parameters, render


def decoders():
    torch.manual_seed(0)
    plain = WanVAE(VAEDims(encoder_base=4, decoder_base=8)).requires_grad_(False)
    low = WanVAE(plain.dims).requires_grad_(False)
    low.load_state_dict(plain.state_dict())
    return plain, low


def test_codes_and_scales_are_those_of_the_channel():
    weight = torch.randn(6, 5, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-4, 100.0, 0.0, 1.0, 1.0])[:, None, None, None, None]
    codes, scales = quantise_weight(weight)
    assert codes.shape == (27, 6, 5) and scales[3] == 1 and torch.allclose(scales[2], weight[2].abs().max() / 448)
    back = (codes.float() * scales[:, None]).unflatten(0, (3, 3, 3)).permute(3, 4, 0, 1, 2)
    assert ((back - weight).abs() <= weight.abs() / 15 + scales[:, None, None, None, None] * 2**-9).all()


@torch.no_grad()
def test_a_layer_is_norm_codes_and_convolution():
    x, gamma, bias, beside = torch.randn(1, 3, 4, 5, 8), torch.rand(8) + 0.5, torch.randn(8), torch.randn(1, 3, 4, 5, 6)
    weight, own = torch.randn(6, 8, 3, 3, 3) * 0.1, torch.randn(6)
    codes, scales = quantise_weight(weight)
    past = F.pad(torch.randn(1, 2, 4, 5, 8), (0, 0, 1, 1, 1, 1)).to(torch.float8_e4m3fn)
    frames = norm_silu_fp8(x, gamma, past, bias)
    assert frames.shape == (1, 5, 6, 7, 8) and torch.equal(frames[:, :2].float(), past.float())
    found = convolution_fp8(frames, codes, scales, own, beside)
    exact = torch.cat([past[:, :, 1:-1, 1:-1].float(), norm_silu(x + bias, gamma)], 1)
    truth = F.conv3d(exact.permute(0, 4, 1, 2, 3), weight, own, padding=(0, 1, 1)).permute(0, 2, 3, 4, 1) + beside
    assert found.shape == truth.shape and (found - truth).norm() / truth.norm() < 0.04


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 1, 1)])
def test_pieces_of_a_stream_are_the_whole(sizes):
    _, low = decoders()
    assert decoder_to_fp8(low) == 31 and any(isinstance(m, Fp8Conv) for m in low.decoder.modules())
    z = torch.randn(2, 48, 4, 2, 3)
    whole, left = low.decode(z)
    state, parts = None, []
    for part in z.split(sizes, 2):
        pixels, state = low.decode(part, state)
        parts.append(pixels)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-4)
    assert len(state.caches) == len(left.caches) == 32 and sum(c.dtype == torch.float8_e4m3fn for c in state.clone().caches) == 28


@torch.no_grad()
def test_it_is_near_the_decoder_and_no_cast_changes_its_weights():
    plain, low = decoders()
    decoder_to_fp8(low)
    z = torch.randn(1, 48, 3, 2, 3)
    truth = plain.decode(z)[0]
    assert (low.decode(z)[0] - truth).norm() / truth.norm() < 0.15
    kept = [m.scale_bits.clone() for m in low.modules() if isinstance(m, Fp8Conv)]
    codec = VideoCodec(low, torch.zeros(48), torch.ones(48)).to(dtype=torch.bfloat16).to(dtype=torch.float32)
    assert all(torch.equal(a, m.scale_bits) for a, m in zip(kept, (m for m in codec.vae.modules() if isinstance(m, Fp8Conv))))


def test_what_it_cannot_do_is_refused():
    _, low = decoders()
    decoder_to_fp8(low)
    with pytest.raises(InputError, match="convert it once"):
        decoder_to_fp8(low)
    with pytest.raises(InputError, match="no gradients"):
        low.decode(torch.randn(1, 48, 1, 1, 1, requires_grad=True))

    class Rows(type(low.spatial)):
        whole = False

    low.spatial = Rows()
    with torch.no_grad(), pytest.raises(InputError, match="whole frames"):
        low.decode(torch.randn(1, 48, 1, 1, 1))


@torch.no_grad()
def test_the_shipped_decoder_loses_next_to_nothing():
    spec, cpu = model_spec("tiny"), torch.device("cpu")
    plain, low = (load_codec(default_config("tiny", overrides), spec, cpu, torch.float32)[0] for overrides in ([], ["inference.vae_fp8=true"]))
    (story,) = evaluation_stories(1, 7)
    pixels = render(chunk_parameters(story, 0)[:9], 64, 96).transpose(0, 1)[None]
    z = plain.encode(pixels)
    exact, near = plain.decode(z), low.decode(z)

    def error(a, b):
        return (a - b).square().mean()

    assert error(near, exact) < 1e-4 and error(near, pixels) < 1.03 * error(exact, pixels)  # pixels in [-1, 1]: more than 46 dB apart, 0.13 dB lost


@pytest.mark.parametrize("setting", ["inference.vae_fp8=true", "inference.attention=fp8"])
@pytest.mark.parametrize("major, triton, told", [(12, True, "Hopper and datacentre Blackwell"), (8, True, "a card"), (9, False, "Triton is not installed")])
def test_a_card_without_these_kernels_is_refused_before_weights_are_read(monkeypatch, setting, major, triton, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(triton_available, "INSTALLED", triton)
    triton_available.fp8_tiles_lack.cache_clear()
    load = load_codec if "vae" in setting else load_dit
    with pytest.raises(ConfigError, match=f"(?s){setting.split('=')[0]}.*cannot run.*{told}.*set inference"):
        load(default_config("tiny", [setting]), model_spec("tiny"), torch.device("cuda:0"), torch.bfloat16)
    triton_available.fp8_tiles_lack.cache_clear()


@pytest.mark.parametrize("major", [9, 10])
def test_cards_with_these_kernels_are_not_refused(monkeypatch, major):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    monkeypatch.setattr(triton_available, "INSTALLED", True)
    triton_available.fp8_tiles_lack.cache_clear()
    assert triton_available.fp8_tiles_lack(torch.device("cuda:0")) is None
    triton_available.fp8_tiles_lack.cache_clear()
