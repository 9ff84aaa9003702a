"""Who holds which frames: every frame once, equal shares, tensors and metadata cut alike; sizes that do not fit are refused with the equation."""

import pytest
import torch

from longlive.core.errors import ConfigError, InputError
from longlive.core.tokens import Tokens
from longlive.parallel.loss import global_mean
from longlive.parallel.mesh import Mesh, check_grid, check_heads
from longlive.parallel.shard import Layout

SIZES = [(8, 2, 4), (8, 4, 2), (12, 3, 4), (6, 2, 1), (4, 1, 4)]


@pytest.mark.parametrize("kind", ["balanced", "contiguous"])
@pytest.mark.parametrize("film, streams, ranks", SIZES)
def test_every_frame_has_one_owner(kind, film, streams, ranks):
    layout = Layout(film=film, streams=streams, ranks=ranks, kind=kind)
    held = [layout.frames(rank) for rank in range(ranks)]
    assert sorted(sum(held, [])) == list(range(film * streams)) and {len(h) for h in held} == {film * streams // ranks}
    for rank, frames in enumerate(held):
        assert frames == [s * film + f for s, (start, stop) in enumerate(layout.ranges(rank)) for f in range(start, stop)]


def test_balanced_ranks_hold_equally_many_clean_and_noisy_frames_of_one_stretch():
    layout = Layout(film=8, streams=3, ranks=4)
    assert layout.frames(1) == [2, 3, 10, 11, 18, 19] and layout.ranges(1) == [(2, 4)] * 3
    contiguous = Layout(film=8, streams=2, ranks=4, kind="contiguous")
    assert [contiguous.ranges(rank) for rank in range(4)] == [[(0, 4), (0, 0)], [(4, 8), (0, 0)], [(8, 8), (0, 4)], [(8, 8), (4, 8)]]


@pytest.mark.parametrize("kind", ["balanced", "contiguous"])
@pytest.mark.parametrize("film, streams, ranks", SIZES)
def test_shares_are_the_frames_and_join_again(kind, film, streams, ranks):
    layout = Layout(film=film, streams=streams, ranks=ranks, kind=kind)
    frames = torch.randn(2, film * streams, 3)
    tokens = frames.repeat_interleave(5, 1)
    shares = [layout.shard(frames, rank) for rank in range(ranks)]
    for rank, share in enumerate(shares):
        assert torch.equal(share, frames[:, layout.frames(rank)])
        assert torch.equal(layout.shard(tokens, rank), share.repeat_interleave(5, 1))
        assert torch.equal(layout.shard_streams(frames.chunk(streams, 1), rank), share)
        assert torch.equal(layout.shard(frames.transpose(0, 1), rank, 0), share.transpose(0, 1))
    assert torch.equal(layout.unshard(shares), frames)
    if streams > 1:
        noisy = [layout.shard_streams(frames.chunk(streams, 1)[1:], rank, skip=1) for rank in range(ranks)]
        assert all(torch.equal(own, share[:, share.shape[1] - own.shape[1] :]) for own, share in zip(noisy, shares))
        assert sum(own.shape[1] for own in noisy) == film * (streams - 1)


@pytest.mark.parametrize("kind", ["balanced", "contiguous"])
@pytest.mark.parametrize("chunk_frames", [1, 2, 4])
def test_metadata_travels_with_the_tokens(kind, chunk_frames):
    film, streams, ranks = 8, 2, 4
    layout, chunks = Layout(film=film, streams=streams, ranks=ranks, kind=kind), film // chunk_frames
    prompt = torch.randint(99, (2, chunks), generator=torch.Generator().manual_seed(0))
    chunk_F = torch.arange(chunks).repeat_interleave(chunk_frames).repeat(streams)
    tokens = Tokens(torch.randn(2, film * streams).double(), chunk_F, torch.arange(film * streams) >= film, prompt.repeat(1, streams), 2, 3)
    for rank in range(ranks):
        own, frames = layout.shard_tokens(tokens, rank), layout.frames(rank)
        assert torch.equal(own.position_BF, tokens.position_BF[:, frames]) and (own.height, own.width) == (2, 3)
        assert torch.equal(own.chunk_F, chunk_F[frames]) and torch.equal(own.noisy_F, tokens.noisy_F[frames])
        group = own.frames // own.prompt_BG.shape[1]
        assert group == min(chunk_frames, layout.run)
        assert torch.equal(own.prompt_BG.repeat_interleave(group, 1), prompt.repeat(1, streams).repeat_interleave(chunk_frames, 1)[:, frames])


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"film frames\(6\) % ranks\(4\) = 2, not 0"):
        Layout(film=6, streams=2, ranks=4)
    assert Layout(film=6, streams=2, ranks=4, kind="contiguous").run == 3
    with pytest.raises(InputError, match=r"film frames\(3\) x streams\(3\) % ranks\(2\) = 1"):
        Layout(film=3, streams=3, ranks=2, kind="contiguous")
    with pytest.raises(InputError, match="'zigzag' is neither"):
        Layout(film=4, kind="zigzag")


def test_a_grid_that_does_not_fit_prints_the_equation():
    check_grid(8, 4)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE\(6\) % infra.sequence_parallel_size\(4\) = 2, not 0; launch a multiple of 4"):
        check_grid(6, 4)
    with pytest.raises(ConfigError, match=r"sp_size\(0\): at least 1"):
        check_grid(4, 0, "sp_size")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE\(1\) % infra.sequence_parallel_size\(4\)"):
        Mesh.launch(4, "cpu")


def test_heads_that_do_not_divide_are_refused():
    """D24: found before anything is exchanged, with the sizes that would do."""
    check_heads(24, 8)
    with pytest.raises(ConfigError, match=r"attention heads\(24\) % sequence parallel size\(5\) = 4, not 0.*1, 2, 3, 4, 6, 8, 12, 24"):
        check_heads(24, 5)


def test_one_process_is_a_grid_of_one():
    mesh, x = Mesh.launch(1, "cpu"), torch.tensor([2.0, 3.0], requires_grad=True)
    assert mesh == Mesh() and mesh.size == 1 and mesh.sp_group is None
    assert torch.equal(mesh.sum(x), x) and torch.equal(mesh.gather(x), x[None]) and not mesh.sum(x).requires_grad
    loss = global_mean((x * x).sum(), torch.tensor(4.0), mesh)
    loss.backward()
    assert loss.item() == 13 / 4 and torch.equal(x.grad, 2 * x / 4)


def test_a_mask_of_nothing_gives_no_loss():
    assert global_mean(torch.tensor(0.0), torch.tensor(0.0), Mesh()).item() == 0
