"""Windows of a sharded VAE encode: the encoder's reach from its layers, latents equal to the whole clip's at that reach and not below."""

import json

import pytest
import torch

from longlive.core.errors import InputError
from longlive.core.geometry import pixel_frames
from longlive.core.log import warn_once
from longlive.models.codec import VideoCodec
from longlive.models.spec import TINY, WAN22_VAE, VAEDims
from longlive.models.vae_reach import exact_halo
from longlive.models.wan_vae import WanVAE, norm_silu
from longlive.parallel.halo import check_halo, encode_window, halo_windows

SMALL = VAEDims(encoder_base=2, decoder_base=2, z_dim=2)
SHAPES = {
    27: SMALL,
    19: VAEDims(encoder_base=2, decoder_base=2, z_dim=2, encoder_blocks=1),
    11: VAEDims(encoder_base=2, decoder_base=2, z_dim=2, encoder_blocks=0, multipliers=(1, 1, 1, 1)),
}


def without_norm(x_BTHWC, gamma, past_BPHWC=None):
    """In place of norm and activation: what one frame owes to the oldest it can see must not vanish among roundings."""
    return x_BTHWC if past_BPHWC is None else torch.cat([past_BPHWC, x_BTHWC], 1)


def random_codec(dims, pointwise=norm_silu):
    vae, generator = WanVAE(dims, pointwise=pointwise), torch.Generator().manual_seed(0)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    return Raw(vae.double())


class Raw(VideoCodec):
    """Latents in float64 as the VAE gives them."""

    def __init__(self, vae):
        super().__init__(vae, torch.zeros(vae.dims.z_dim), torch.ones(vae.dims.z_dim))

    def normalise(self, mu_BFCHW, *, start=True):
        return mu_BFCHW


@torch.no_grad()
def largest_difference(codec, pixels, whole, ranks, halo, group=4):
    windows = halo_windows(whole.shape[1], ranks, halo)
    parts = [encode_window(codec, pixels[:, :, w.raw_start : w.raw_end], w, group=group) for w in windows]
    return (torch.cat(parts, 1) - whole).abs().max().item()


@pytest.mark.parametrize("reach", SHAPES)
@pytest.mark.parametrize("pointwise", [norm_silu, without_norm])
@torch.no_grad()
def test_the_reach_is_exact_and_no_less_is(reach, pointwise):
    codec = random_codec(SHAPES[reach], pointwise)
    assert exact_halo(codec.vae.encoder) == reach
    pixels = torch.randn(1, 3, pixel_frames(2 * reach + 4), 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = codec.encode(pixels)
    error = {halo: largest_difference(codec, pixels, whole, 2, halo) / whole.abs().max().item() for halo in (reach + 1, reach, reach - 1, reach // 4)}
    assert error[reach] < 1e-13 and error[reach + 1] < 1e-13 and error[reach // 4] > 1e-4
    if pointwise is without_norm:
        assert error[reach - 1] > 1e-7


@pytest.mark.parametrize("dims", [WAN22_VAE, TINY.vae, WAN22_VAE.pruned(0.75)])
def test_the_real_encoders_reach_27_latents(dims):
    with torch.device("meta"):
        assert exact_halo(WanVAE(dims).encoder) == 27


@torch.no_grad()
def test_a_window_keeps_the_statistics_of_its_place():
    """The first latent of a film has statistics of its own in the small model; the first of a window has not."""
    vae = random_codec(SHAPES[11]).vae
    codec = VideoCodec(vae, torch.tensor([[5.0, 5.0], [0.0, 1.0]]), torch.tensor([[3.0, 3.0], [1.0, 2.0]]))
    pixels = torch.randn(1, 3, pixel_frames(26), 16, 16, dtype=torch.float64)
    assert largest_difference(codec, pixels, codec.encode(pixels), 2, 11, group=3) < 1e-5


@torch.no_grad()
def test_windows_that_do_not_fit_are_refused():
    for frames, ranks in ((10, 4), (8, 0), (0, 1)):
        with pytest.raises(InputError, match="latent frames"):
            halo_windows(frames, ranks, 2)
    with pytest.raises(InputError, match=r"vae_halo_latents\(-1\)"):
        halo_windows(8, 2, -1)
    with pytest.raises(InputError, match="rank 1 of 2 has nothing to encode: the clip's 12 frames end before frame 28"):
        halo_windows(16, 2, 0, raw_frames=12)
    codec, (_, short) = random_codec(SHAPES[11]), halo_windows(4, 2, 0, raw_frames=12)
    with pytest.raises(InputError, match=r"8 frames do not give latents \[2, 4\): 9 are needed"):
        encode_window(codec, torch.zeros(1, 3, 8, 16, 16), short)
    with pytest.raises(InputError, match=r"pixel frames \[4, 12\) = 8, but was given 9"):
        encode_window(codec, torch.zeros(1, 3, 9, 16, 16), short)


def test_a_halo_that_is_too_short_says_so(caplog):
    warn_once.cache_clear()
    check_halo(27, 27)
    assert not caplog.records
    check_halo(24, 27)
    assert "infra.vae_halo_latents(24) < 27" in caplog.text


def test_the_script_prints_the_table(capsys):
    from longlive.cli.scripts import halo_windows as script
    from longlive.cli.scripts import run

    config = "configs/train_ar.yaml"
    assert run(script, ["--config", config, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["latent_frames"], told["sp_size"], told["halo_latents"], told["raw_frames"], told["exact_halo_latents"]) == (96, 4, 28, 381, 27)
    assert told["rank_metas"][3] == {
        "sp_rank": 3, "keep_start": 72, "keep_end": 96, "halo_start": 44, "raw_start": 172, "raw_end": 381,
        "raw_frames": 209, "drop_latents": 29, "local_latent_frames": 24,
    }  # fmt: skip
    assert run(script, ["--config", config, "--sp-size", "2", "--latent-frames", "32", "--halo-latents", "5"]) == 0
    printed = capsys.readouterr().out
    assert "[40, 125)" in printed and "27 is exact" in printed
    assert run(script, ["--config", config, "--sp-size", "5"]) == 2
    assert "latent frames(96) % sequence parallel size(5) = 1" in capsys.readouterr().err
