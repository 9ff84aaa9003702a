"""A toy transformer with random weights, and films to roll out or to train on."""

import torch

from longlive.core.tokens import Tokens
from longlive.engine.rollout import Rollout, RolloutSettings
from longlive.models.patch import patchify, unpatchify
from longlive.models.spec import DiTDims
from longlive.models.wan_dit import WanDiT

DIMS = DiTDims(dim=48, ffn=64, layers=2, heads=2, text_dim=8, text_len=12, freq_dim=32, channels=4)
FRAMES, ROWS, COLUMNS = 2, 2, 3


def toy_dit(dtype=torch.float64, seed=0):
    dit = WanDiT(DIMS)
    generator = torch.Generator().manual_seed(seed)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    return dit.to(dtype)


def toy_prompts(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(i % 5 + 1, DIMS.text_dim, generator=generator) for i in range(count)]


def toy_noise(batch, chunks, seed=2, frames=FRAMES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, chunks, frames, DIMS.channels, 2 * ROWS, 2 * COLUMNS, generator=generator)


def toy_rollout(dit, batch, **settings):
    options = {"chunk_frames": FRAMES, "window_frames": 3 * FRAMES, "sink_frames": FRAMES, "shot_offset": 3.0, "steps": 2} | settings
    first_frame = options.pop("first_frame", 0.0)
    dtype = next(dit.parameters()).dtype
    return Rollout(
        dit,
        RolloutSettings(**options),
        token_height=ROWS,
        token_width=COLUMNS,
        batch=batch,
        device=torch.device("cpu"),
        dtype=dtype,
        first_frame=first_frame,
    )


def film(rollout, text, noise, prompts=None, cuts=None, **options):
    """Latents [B, chunks, F, ...]. prompts[b][c] and cuts[b][c]; default one prompt per chunk and no cut."""
    batch, chunks = noise.shape[:2]
    prompts = prompts or [list(range(chunks))] * batch
    cuts = cuts or [[False] * chunks] * batch
    out = [rollout.step(noise[:, c], text, [p[c] for p in prompts], [x[c] for x in cuts], **options) for c in range(chunks)]
    return torch.stack(out, dim=1)


def film_tokens(prompt_BC, position_BF, copies):
    """Tokens of [clean; noisy; ...] with `copies` copies in all."""
    frames = position_BF.shape[1]
    return Tokens(
        position_BF.repeat(1, copies),
        (torch.arange(frames) // FRAMES).repeat(copies),
        torch.arange(frames * copies) >= frames,
        prompt_BC.repeat(1, copies),
        ROWS,
        COLUMNS,
    )


def ask(dit, z_BFCHW, tokens, sigma_BF, text, attend):
    """Velocity as latents."""
    out = dit(patchify(z_BFCHW), tokens, sigma_BF, text, attend)
    return unpatchify(out, z_BFCHW.shape[1], ROWS, COLUMNS)
