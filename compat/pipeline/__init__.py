"""`pipeline` as the documented Python snippets import it: one class over our own networks, rollout and codec.

Differences that cannot be seen from the snippets: weights of the generator are read when they are first needed (or by
`load_generator_checkpoint`), a chunk is decoded as soon as it is finished, and noise that `prepare_single_prompt_inputs` made is that of
`longlive generate` for the same seed.

Legend: B films, F latent frames, C channels, H, W latent rows and columns, T pixel frames.
"""

from __future__ import annotations

import json

import torch

from longlive.config import load_config
from longlive.core.errors import InputError
from longlive.core.schedule import chunk_schedule
from longlive.diffusion.known import KnownFrames
from longlive.engine.parts import load_codec, load_dit, load_text_encoder
from longlive.engine.pipeline import Pipeline, choose_dtype
from longlive.engine.rollout import Rollout
from longlive.engine.text_rows import TextRows

__all__ = ["CausalDiffusionInferencePipeline", "Generator"]


class Generator:
    """The denoising network. `model` is the module; it is read from the configured checkpoint unless `load` has read another."""

    def __init__(self, config, spec, device: torch.device, dtype: torch.dtype):
        self.config, self.spec, self.device, self.dtype = config, spec, device, dtype
        self._model = None

    @property
    def model(self) -> torch.nn.Module:
        if self._model is None:
            self._model, _ = load_dit(self.config, self.spec, self.device, self.dtype)
        return self._model

    def load(self, path: str, use_ema: bool = False) -> None:
        """Reads the generator from `path`, in place of the configured checkpoint."""
        words = [f"checkpoints.generator_ckpt={json.dumps(str(path))}", f"inference.use_ema={json.dumps(use_ema)}"]
        self.reconfigure(self.config.with_overrides(words))

    def reconfigure(self, config) -> None:
        """Reads the generator that `config` describes, in place of the one before."""
        self.config, self._model = config, None
        self._model = self.model

    def to(self, device: torch.device, dtype: torch.dtype) -> "Generator":
        self.device, self.dtype = device, dtype
        if self._model is not None:
            self._model.to(device=device, dtype=dtype)
        return self


class CausalDiffusionInferencePipeline:
    """Films from noise and prompts. Parts: `generator` (with `.model`), `vae`, `text_encoder`."""

    def __init__(self, config, device: torch.device | str = "cuda"):
        self.config = load_config(config)
        self.device = torch.device(device)
        self.dtype = choose_dtype(self.config, self.device)
        self.parts = Pipeline.unloaded(self.config, self.device, self.dtype)
        self.generator = Generator(self.config, self.parts.spec, self.device, self.dtype)
        self.vae, _ = load_codec(self.config, self.parts.spec, self.device, self.dtype)
        self.text_encoder, _ = load_text_encoder(self.parts.spec, self.device, self.dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "CausalDiffusionInferencePipeline":
        """Moves and casts every part, in place."""
        self.device = self.device if device is None else torch.device(device)
        self.dtype = self.dtype if dtype is None else dtype
        for part in (self.generator, self.vae, self.text_encoder):
            part.to(device=self.device, dtype=self.dtype)
        return self

    @torch.no_grad()
    def inference(self, noise: torch.Tensor, text_prompts, initial_latent: torch.Tensor | None = None, return_latents: bool = False):
        """Video [B, T, 3, H x 16, W x 16] in [0, 1], float32 on the CPU, from `noise` [B, F, C, H, W]; with `return_latents` also the latents.

        `text_prompts`: one text per film, or for every film a list of one text per chunk. A chunk whose text begins with the scene-cut prefix
        begins a shot. `initial_latent` [B, K, C, H, W]: given first frames.
        """
        frames = self.parts.settings.chunk_frames
        chunks = chunk_schedule(noise.shape[1], frames)
        films = chunk_prompts(text_prompts, noise.shape[0], len(chunks))
        dit, settings = self.generator.model, self.parts.settings
        rollout = Rollout(
            dit,
            settings,
            token_height=noise.shape[3] // 2,
            token_width=noise.shape[4] // 2,
            batch=noise.shape[0],
            device=self.device,
            dtype=self.dtype,
        )
        rows = TextRows(dit, self.text_encoder, self.parts.negative_prompt if settings.guidance != 1.0 else None)
        known = None if initial_latent is None else KnownFrames(initial_latent)
        stream, video, latents = None, [], []
        for chunk in chunks:
            prompts = [film[chunk.index] for film in films]
            text, prompt_B, negative = rows.rows(prompts)
            cuts = [bool(self.parts.scene_cut_prefix) and p.startswith(self.parts.scene_cut_prefix) for p in prompts]
            z = rollout.step(noise[:, chunk.start : chunk.start + frames].float(), text, prompt_B, cuts, negative=negative, known=known)
            stream, pixels_BCTHW = self.vae.stream_decode(stream, z)
            video.append(pixels_BCTHW.float().add(1).div(2).clamp(0, 1).transpose(1, 2).cpu())
            latents.append(z)
        film = torch.cat(video, dim=1)
        return (film, torch.cat(latents, dim=1)) if return_latents else film


def chunk_prompts(text_prompts, batch: int, chunks: int) -> list[list[str]]:
    """`text_prompts` in any of the accepted forms -> for every film a list of one prompt per chunk."""
    given = [text_prompts] if isinstance(text_prompts, str) else list(text_prompts)
    if all(isinstance(text, str) for text in given):
        if len(given) == batch:
            return [[text] * chunks for text in given]
        if batch == 1 and len(given) == chunks:
            return [given]
        raise InputError(f"{len(given)} prompts for {batch} films of {chunks} chunks; give one text per film, or a list of {chunks} texts for each")
    if len(given) == batch and all(len(film) == chunks for film in given):
        return [list(film) for film in given]
    if len(given) == chunks and all(len(texts) == batch for texts in given):
        return [list(film) for film in zip(*given)]
    raise InputError(f"prompts of lengths {[len(film) for film in given]} for {batch} films of {chunks} chunks; give {chunks} texts for each film")
