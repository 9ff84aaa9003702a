"""What goes between ranks besides a training step: a rollout's chunks, half precision, latents of whole samples and of windows."""

from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from sp_toys import DIMS, HEIGHT, WIDTH, toy_dit

from longlive.cache.attend import Cached, Full
from longlive.cache.pages import Pages
from longlive.cache.policy import WindowPolicy, history
from longlive.core.errors import ConfigError, InputError
from longlive.core.geometry import pixel_frames
from longlive.core.tokens import Tokens
from longlive.models.codec import VideoCodec
from longlive.models.patch import patchify
from longlive.models.spec import VAEDims
from longlive.models.vae_reach import exact_halo
from longlive.models.wan_vae import WanVAE
from longlive.parallel import ulysses
from longlive.parallel.halo import halo_encode, halo_windows
from longlive.parallel.mesh import Mesh
from longlive.parallel.samples import encode_samples
from longlive.parallel.shard import Layout
from longlive.parallel.ulysses import Exchange, Ulysses, heads_to_tokens, tokens_to_heads

FRAMES, CHUNKS, BATCH = 4, 3, 2
SAMPLES = 5
VAE = VAEDims(encoder_base=2, decoder_base=2, z_dim=4, multipliers=(1, 1, 1, 1), encoder_blocks=0, decoder_blocks=1)
LATENTS, HALO = 16, 11


def chunk_tokens(chunk):
    position = torch.arange(chunk * FRAMES, (chunk + 1) * FRAMES, dtype=torch.float64).expand(BATCH, -1)
    return Tokens(position, torch.full((FRAMES,), chunk), torch.ones(FRAMES, dtype=torch.bool), torch.arange(BATCH)[:, None], HEIGHT // 2, WIDTH // 2)


@torch.no_grad()
def rollout(mesh, relative):
    """One denoising forward and the commit of every chunk, in a window of two pages, then a forward without a cache: this rank's velocities."""
    dit, generator = toy_dit(), torch.Generator().manual_seed(1)
    text = dit.text([torch.randn(3, DIMS.text_dim, generator=generator) for _ in range(BATCH)])
    layout = Layout(film=FRAMES, ranks=mesh.sp_size)
    pages = Pages(
        DIMS.layers, BATCH, 2, FRAMES * HEIGHT * WIDTH // 4, DIMS.heads // mesh.sp_size, DIMS.head_dim, device=torch.device("cpu"), dtype=torch.float64
    )
    out = []
    for chunk, (opened, _) in enumerate(history([False] * CHUNKS, WindowPolicy(pages=2, anchor=True, pin=False))):
        tokens = chunk_tokens(chunk)
        own = layout.shard_tokens(tokens, mesh.sp_rank)
        x_BNc = layout.shard(patchify(torch.randn(BATCH, FRAMES, DIMS.channels, HEIGHT, WIDTH, dtype=torch.float64, generator=generator)), mesh.sp_rank)
        cached = Ulysses(Cached(pages, [opened] * BATCH, chunk, tokens, DIMS.head_dim, relative=relative), mesh)
        out.append(dit(x_BNc, own, torch.full((BATCH, own.frames), 0.7), text, cached))
        dit(x_BNc, own, torch.zeros(BATCH, own.frames), text, cached, until="kv")
        out.append(dit(x_BNc, own, torch.full((BATCH, own.frames), 0.2), text, Ulysses(Full(tokens, DIMS.head_dim), mesh, layout)))
    return torch.stack(out)


def codec():
    vae = WanVAE(VAE)
    generator = torch.Generator().manual_seed(2)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=generator)
    return VideoCodec(vae.double(), torch.randn(2, 4, generator=generator), torch.rand(2, 4, generator=generator) + 0.5)


def clip(sample):
    return torch.randn(3, pixel_frames(LATENTS), 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(sample))


def latents_of(sample):
    return codec().encode(clip(sample)[None])[0]


def round_trip(mesh, dtype):
    """Largest change by an exchange and its inverse, in two runs per rank."""
    exchange = Exchange(mesh.sp_group, mesh.sp_size, 2)
    own = [torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(mesh.sp_rank + i)).to(dtype) for i in range(3)]
    there = tokens_to_heads(exchange, tuple(own))
    assert all(t.shape == (2, 6 * mesh.sp_size, 4 // mesh.sp_size, 3) for t in there)
    return max((a - b).abs().max().item() for a, b in zip(own, heads_to_tokens(exchange, there)))


def encode_twice(mesh):
    """Sample-parallel latents with the samples encoded here, and the windows' latents of sample 0."""
    asked = []

    def encode(sample):
        asked.append(sample)
        return latents_of(sample)

    whole = encode_samples(encode, torch.empty(SAMPLES, LATENTS, 4, 1, 1), mesh)
    window = halo_windows(LATENTS, mesh.sp_size, HALO)[mesh.sp_rank]
    pixels = clip(0)[None, :, window.raw_start : window.raw_end]
    return asked, whole, halo_encode(codec(), pixels, window, mesh)


def three_heads(mesh):
    """D24: what an attention of 3 heads says on 2 or 4 ranks."""
    k = torch.zeros(1, 4, 3, 2)
    try:
        Ulysses(lambda q, k, v, layer: q, mesh)(k, k, k, 0)
    except ConfigError as error:
        return str(error)


def everything():
    found = {}
    for sp_size in (1, 2, 4):
        mesh = Mesh.launch(sp_size, "cpu")
        found[sp_size] = {
            "sp_rank": mesh.sp_rank,
            "absolute": rollout(mesh, False),
            "relative": rollout(mesh, True),
            "bf16": round_trip(mesh, torch.bfloat16) if sp_size > 1 else 0.0,
            "encoded": encode_twice(mesh),
            "three heads": three_heads(mesh),
        }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("sp_size", [2, 4])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_a_rollout_over_ranks_equals_one_rank(found, mode, sp_size):
    whole = rollout(Mesh(), mode == "relative")
    parts = [rank[sp_size][mode] for rank in found]
    assert [rank[sp_size]["sp_rank"] for rank in found] == [r % sp_size for r in range(4)]
    for first in range(0, 4, sp_size):
        joined = Layout(film=FRAMES, ranks=sp_size).unshard(parts[first : first + sp_size], dim=2)
        torch.testing.assert_close(joined, whole, rtol=1e-10, atol=1e-12)


def test_an_exchange_and_its_inverse_change_no_bit(found):
    assert all(rank[sp_size]["bf16"] == 0 for rank in found for sp_size in (2, 4))


def test_queries_keys_and_values_travel_together(monkeypatch):
    """Two exchanges in a forward and two in its backward, whatever goes through them (spec training §9.4, B7)."""
    sizes = []

    def exchanged(received, sent, group):
        sizes.append(sent.numel())
        received.copy_(sent)

    monkeypatch.setattr(ulysses.dist, "all_to_all_single", exchanged)
    q, k, v = (torch.randn(1, 6, 4, 2, requires_grad=True) for _ in range(3))
    Ulysses(lambda q, k, v, layer: q + k + v, SimpleNamespace(sp_group=None, sp_size=2))(q, k, v, 0).sum().backward()
    assert sizes == [3 * q.numel(), q.numel(), q.numel(), 3 * q.numel()] and all(t.grad is not None for t in (q, k, v))


def test_heads_that_do_not_divide_are_refused_on_every_rank(found):
    assert all(rank[4]["three heads"].startswith("attention heads(3) % sequence parallel size(4) = 3, not 0") for rank in found)
    assert all(rank[1]["three heads"] is None for rank in found)


def test_a_layout_for_other_ranks_is_refused():
    with pytest.raises(InputError, match="for 2 ranks, the mesh has 1"):
        Ulysses(None, Mesh(), Layout(film=4, ranks=2))


@pytest.mark.parametrize("sp_size", [1, 2, 4])
def test_every_sample_is_encoded_once_and_is_everywhere(found, sp_size):
    want = torch.stack([latents_of(sample) for sample in range(SAMPLES)])
    for first in range(0, 4, sp_size):
        group = [rank[sp_size]["encoded"] for rank in found[first : first + sp_size]]
        assert sorted(sample for asked, _, _ in group for sample in asked) == list(range(SAMPLES))
        assert all(torch.equal(whole, want) for _, whole, _ in group)


def test_a_window_is_less_than_the_clip():
    assert exact_halo(codec().vae.encoder) == HALO and halo_windows(LATENTS, 4, HALO)[3].halo_start == 1


@pytest.mark.parametrize("sp_size", [1, 2, 4])
def test_windows_encoded_by_ranks_equal_the_whole_clip(found, sp_size):
    for rank in found:
        torch.testing.assert_close(rank[sp_size]["encoded"][2], latents_of(0)[None], rtol=0, atol=1e-6)
