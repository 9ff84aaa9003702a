"""The end of the decoder in tiles of rows: frames, states and copies of states are those of whole frames; no less reach would do; what it costs in memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longlive.config import default_config
from longlive.core.errors import ConfigError, InputError
from longlive.engine.decode import Inline
from longlive.engine.parts import load_codec
from longlive.models import vae_tiles
from longlive.models.codec import VideoCodec
from longlive.models.spec import VAEDims, model_spec
from longlive.models.vae_fp8 import decoder_to_fp8
from longlive.models.vae_tiles import RowTiles, Tile, decode_in_tiles, row_tiles
from longlive.models.wan_vae import WHOLE_FRAME, WanVAE

ROWS = 5


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVAE(VAEDims(encoder_base=2, decoder_base=4)).double().requires_grad_(False)


def pieces(vae, z, sizes, spatial, **options):
    """(pixels, state) of z decoded in pieces of `sizes`."""
    vae.spatial, state, parts = spatial, None, []
    try:
        for part in z.split(sizes, 2):
            pixels, state = vae.decode_bytes(part, state, **options) if options else vae.decode(part, state)
            parts.append(pixels)
    finally:
        vae.spatial = WHOLE_FRAME
    return torch.cat(parts, 1 if options else 2), state


def test_tiles_cover_the_rows_and_read_their_neighbours():
    assert row_tiles(20, 8, 3) == [Tile(0, 8, 0, 11), Tile(8, 16, 5, 19), Tile(16, 20, 13, 20)]
    assert row_tiles(8, 8, 3) == [Tile(0, 8, 0, 8)] and row_tiles(8, 100, 7) == [Tile(0, 8, 0, 8)]


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[3], [1, 2], [2, 1]])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_tiles_are_the_whole_frame(vae, sizes, rows):
    z = torch.randn(2, 48, 3, ROWS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, state = pieces(vae, z, sizes, WHOLE_FRAME)
    found, left = pieces(vae, z, sizes, RowTiles(rows))
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    assert len(left.caches) == len(state.caches)
    for a, b in zip(left.caches, state.caches):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_state_that_is_written_in_place_is_the_same(vae):
    z = torch.randn(1, 48, 4, ROWS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole, state = pieces(vae, z, [1, 1, 2], WHOLE_FRAME, reuse=True)
    found, left = pieces(vae, z, [1, 1, 2], RowTiles(2), reuse=True)
    assert torch.equal(found, whole)
    for a, b in zip(left.caches, state.caches):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@torch.no_grad()
def test_no_less_reach_would_do(vae, monkeypatch):
    z = torch.randn(1, 48, 1, ROWS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    whole, _ = pieces(vae, z, [1], WHOLE_FRAME)
    monkeypatch.setattr(vae_tiles, "row_tiles", lambda rows, size, reach: row_tiles(rows, size, reach - 1))
    found, _ = pieces(vae, z, [1], RowTiles(2))
    assert (found - whole).abs().max() > 1e-9


@torch.no_grad()
def test_tiles_in_fp8_are_the_whole_frame_in_fp8():
    torch.manual_seed(0)
    vae = WanVAE(VAEDims(encoder_base=2, decoder_base=4)).requires_grad_(False)
    decoder_to_fp8(vae)
    z = torch.randn(1, 48, 3, ROWS, 2)
    whole, state = pieces(vae, z, [1, 2], WHOLE_FRAME, reuse=True)
    found, left = pieces(vae, z, [1, 2], RowTiles(2), reuse=True)
    assert (found.float() - whole.float()).square().mean().sqrt() < 4  # of 255: scales of tiles and of frames round differently
    assert len(left.caches) == len(state.caches)
    for a, b in zip(left.caches, state.caches):
        assert a.dtype == b.dtype and (a.float() - b.float()).norm() < 0.08 * b.float().norm()


def test_with_gradients_frames_stay_whole(vae):
    z = torch.randn(1, 48, 1, 3, 1, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(pieces(vae, z, [1], WHOLE_FRAME)[0].square().sum(), z)[0]
    assert torch.equal(torch.autograd.grad(pieces(vae, z, [1], RowTiles(1))[0].square().sum(), z)[0], whole)


@torch.no_grad()
def test_a_stage_in_tiles_goes_on_from_the_state_of_one_without(vae):
    codec = VideoCodec(vae, torch.zeros(48), torch.ones(48))
    z = torch.randn(1, 5, 48, ROWS, 2, generator=torch.Generator().manual_seed(4))
    stage = Inline(codec)
    expected = [stage.decode(part) for part in z.split([2, 3], 1)]
    try:
        tiled = VideoCodec(vae, torch.zeros(48), torch.ones(48))
        decode_in_tiles(tiled, 2)
        assert tiled.group == 1
        first = Inline(tiled)
        assert torch.equal(first.decode(z[:, :2]), expected[0])
        copy, again = first.state(), Inline(tiled)
        assert torch.equal(first.decode(z[:, 2:]), expected[1])
        again.restore(copy)
        assert torch.equal(again.decode(z[:, 2:]), expected[1])
        vae.spatial = WHOLE_FRAME
        again.restore(copy)
        assert torch.equal(again.decode(z[:, 2:]), expected[1])
    finally:
        vae.spatial = WHOLE_FRAME


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, without those of `before`."""

    def __init__(self, before):
        super().__init__()
        self.live, self.bytes, self.peak = {tensor.untyped_storage()._cdata: 0 for tensor in before}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.live[key], self.bytes = size, self.bytes + size
        self.peak = max(self.peak, self.bytes)

        def gone():
            self.bytes -= self.live.pop(key)

        weakref.finalize(storage, gone)


@torch.no_grad()
def test_tiles_need_less_memory():
    torch.manual_seed(0)
    vae = WanVAE(VAEDims(encoder_base=2, decoder_base=32, multipliers=(1, 1, 1, 1), decoder_blocks=1)).requires_grad_(False)
    z = torch.randn(1, 48, 1, 12, 2)

    def peak(spatial):
        _, state = pieces(vae, z, [1], spatial)
        vae.spatial = spatial
        with Peak([*vae.parameters(), *state.caches, z]) as seen:
            vae.decode_bytes(z, state, reuse=True)
        vae.spatial = WHOLE_FRAME
        return seen.peak

    assert peak(RowTiles(2)) < 0.5 * peak(WHOLE_FRAME)


def test_the_setting(tmp_path):
    spec, cpu = model_spec("tiny"), torch.device("cpu")
    codec, _ = load_codec(default_config("tiny", ["inference.vae_tile_rows=3"]), spec, cpu, torch.float32)
    assert codec.vae.spatial.latent_rows == 3 and codec.group == 1
    assert load_codec(default_config("tiny", []), spec, cpu, torch.float32)[0].vae.spatial is WHOLE_FRAME
    for wrong in ("0", "-1", "1.5", "half"):
        with pytest.raises(ConfigError, match="vae_tile_rows"):
            default_config("tiny", [f"inference.vae_tile_rows={wrong}"])
    with pytest.raises(InputError, match="at least 1"):
        RowTiles(0)
