"""The helper functions of the documented Python snippets."""

from __future__ import annotations

from pathlib import Path

import torch

from longlive.config import load_config
from longlive.core.errors import ConfigError
from longlive.engine.rollout import chunk_noise
from longlive.engine.sinks import Mp4Sink

__all__ = ["load_generator_checkpoint", "place_vae_for_streaming", "prepare_single_prompt_inputs", "save_video", "setup_nvfp4_pipeline"]


def load_generator_checkpoint(generator, path: str, use_ema: bool = False) -> None:
    """Reads the weights at `path` into `pipe.generator`; every documented container is understood."""
    generator.load(path, use_ema)


def place_vae_for_streaming(pipe, config) -> None:
    """Moves the VAE to `inference.vae_device` when `inference.streaming_vae` is true and that device is set; otherwise does nothing."""
    inference = load_config(config).inference
    if inference.streaming_vae and inference.vae_device:
        pipe.vae.to(device=torch.device(inference.vae_device))


def prepare_single_prompt_inputs(config, prompt: str, device) -> tuple[torch.Tensor, list[list[str]]]:
    """(noise [B, F, C, H, W] float32, for each of the B samples one prompt per chunk): the inputs of one prompt, noise by `logging.seed`."""
    config = load_config(config)
    _, _, channels, height, width = config.data.image_or_video_shape
    shape, chunks = (config.chunk_frames, channels, height, width), config.num_output_frames // config.chunk_frames
    samples = config.inference.num_samples
    noise = torch.stack([torch.cat([chunk_noise(config.logging.seed, 0, sample, c, shape) for c in range(chunks)]) for sample in range(samples)])
    return noise.to(device), [[prompt] * chunks] * samples


def save_video(video: torch.Tensor, path: str, fps: int = 24) -> None:
    """Writes a video [T, 3, H, W] in [0, 1] as an MP4 file; makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sink = Mp4Sink(Path(path), fps=fps)
    try:
        for frames in video.split(32):
            sink.write(frames.float().mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1), None)
        sink.close()
    except BaseException:
        sink.abort()
        raise


def setup_nvfp4_pipeline(pipe, config, device) -> None:
    """Reads the generator of `config` with quantised linear layers (packed or merged bf16 weights, by `model_quant*`), and places every part on `device`.

    Raises ConfigError when `model_quant` is false: the quick start would run in bf16 and say otherwise.
    """
    config = load_config(config)
    if not config.infra.model_quant:
        raise ConfigError("setup_nvfp4_pipeline with model_quant: false; set it to true, or use the BF16 quick start")
    pipe.to(device=torch.device(device))
    pipe.generator.reconfigure(config)
    place_vae_for_streaming(pipe, config)
