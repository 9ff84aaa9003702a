"""What compilation and memory layout must not change: the numbers."""

import copy

import torch
import torch._dynamo.utils

from longlive.models.spec import DiTDims, VAEDims
from longlive.models.wan_dit import WanDiT
from longlive.models.wan_vae import WanVAE
from longlive.train.compiled import RotatedAhead, channels_last, checkpoint_blocks, compile_blocks
from longlive.train.teacher_forcing import Film, frame_positions, teacher_forced_velocity

DIMS = DiTDims(dim=32, ffn=48, layers=2, heads=2, text_dim=10, text_len=6, channels=8)


def _gradients(dit, wrap):
    generator = torch.Generator().manual_seed(1)
    film = Film(torch.arange(4).reshape(2, 2), frame_positions([[False, True]] * 2, 2, 8.0))
    clean, noisy = (torch.randn(2, 4, 8, 4, 4, generator=generator) for _ in range(2))
    text = dit.text([torch.randn(n, 10, generator=generator) for n in (3, 0, 6, 1)])
    (velocity,) = teacher_forced_velocity(dit, text, film, (clean, torch.zeros(2, 4)), [(noisy, torch.full((2, 4), 0.5))], wrap)
    velocity.square().sum().backward()
    return velocity.detach(), [p.grad for p in dit.parameters() if p.grad is not None]


def _network():
    torch.manual_seed(0)
    dit = WanDiT(DIMS)
    torch.nn.init.normal_(dit.head.head.weight, std=0.1)
    return dit


def test_rotating_ahead_of_attention_changes_nothing():
    dit = _network()
    plain, ahead = _gradients(copy.deepcopy(dit), lambda attend: attend), _gradients(copy.deepcopy(dit), RotatedAhead)
    torch.testing.assert_close(plain, ahead)


def test_recomputed_blocks_give_the_same_gradients():
    dit = _network()
    again = copy.deepcopy(dit)
    checkpoint_blocks(again.blocks)
    torch.testing.assert_close(_gradients(dit, lambda attend: attend), _gradients(again, lambda attend: attend))


def test_recomputed_blocks_are_compiled_and_give_the_same_gradients():
    """A graph cannot end inside of a recomputation: compiled around it, a block would silently run as written."""
    dit = _network()
    again = copy.deepcopy(dit)
    checkpoint_blocks(again.blocks)
    compile_blocks(again.blocks, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(_gradients(dit, lambda attend: attend), _gradients(again, RotatedAhead))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_channels_last_kernels_give_the_same_clip_and_the_same_state():
    torch.manual_seed(0)
    vae = WanVAE(VAEDims(encoder_base=4, decoder_base=4))
    other = copy.deepcopy(vae)
    channels_last(other)
    clip = torch.rand(1, 3, 5, 32, 32)
    for one, two in zip(vae.encode(clip, keep=False)[:2], other.encode(clip, keep=False)[:2]):
        torch.testing.assert_close(one, two)
    assert all(torch.equal(a, b) for a, b in zip(vae.state_dict().values(), other.state_dict().values()))
