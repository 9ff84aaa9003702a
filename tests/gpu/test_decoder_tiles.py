"""The published decoder's sizes on a card: tiles of rows show the frames that whole frames show, in less memory."""

import pytest
import torch

from longlive.bench.networks import random_codec
from longlive.engine.decode import Inline
from longlive.models.spec import model_spec
from longlive.models.vae_fp8 import decoder_to_fp8
from longlive.models.vae_tiles import decode_in_tiles

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
APART = {"bf16": 0.7, "fp8": 4.0}  # of 255, root of the mean square: scales of tiles and of frames round differently


def decoded(low, tile_rows):
    """(frames, GiB at most) of two calls of 704x1280, so that the second one reads what the first one left."""
    codec = random_codec(model_spec("wan2.2-ti2v-5b").vae, CUDA, torch.bfloat16, 1)
    if low == "fp8":
        decoder_to_fp8(codec.vae)
    if tile_rows:
        decode_in_tiles(codec, tile_rows)
    z = torch.randn(1, 3, 48, 44, 80, generator=torch.Generator().manual_seed(0)).to(CUDA)
    stage = Inline(codec)
    torch.cuda.reset_peak_memory_stats()
    frames = torch.cat([stage.decode(part) for part in z.split([1, 2], 1)], 1)
    return frames.cpu(), torch.cuda.max_memory_allocated() / 2**30


@torch.no_grad()
@pytest.mark.parametrize("low", ["bf16", "fp8"])
def test_tiles_are_the_whole_frame(low):
    if low == "fp8" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("needs Hopper or datacentre Blackwell")
    whole, most = decoded(low, 0)
    found, less = decoded(low, 11)
    assert found.shape == whole.shape == (1, 9, 704, 1280, 3) and whole.float().std() > 10
    assert (found.float() - whole.float()).square().mean().sqrt() < APART[low]
    assert less < most - 0.3
