"""`world` and `vae`: the procedural video world and the training of the small VAE. Our own keys; the published schema has none of them."""

from __future__ import annotations

from typing import Literal

from .section import Section, option


class World(Section):
    seed: int = option(0, "seed of the stories", ge=0)
    clips: int = option(2048, "stories in the training pool", ge=1)
    chunks: int = option(8, "chunks of a story", ge=1)
    min_shots: int = option(1, "least shots of a story", ge=1)
    max_shots: int = option(4, "most shots of a story", ge=1)
    max_characters: int = option(2, "most characters of a story", ge=1)
    refresh: int = option(0, "new stories per step", ge=0)
    split: Literal["train", "held-out"] = option("train", "combinations of attributes that are drawn")
    memory: float = option(0.0, "generator training: chance that a character seen before is named by its colour alone", ge=0, le=1)
    wordings: int = option(1, "generator training: captions kept for every story, one of which is read each time", ge=1)
    away: float = option(0.25, "generator training: chance that a shot between the first and the last misses a character", ge=0, le=1)


class VAEStage(Section):
    """One leg of the VAE's training. Sizes in pixels and pixel frames."""

    height: int = option(192, "pixel rows, a multiple of 32", ge=32, multiple_of=32)
    width: int = option(320, "pixel columns, a multiple of 32", ge=32, multiple_of=32)
    frames: int = option(17, "pixel frames, 1 + 4k", ge=1)
    batch: int = option(8, "clips per step", ge=1)
    fraction: float = option(1.0, "share of the run", gt=0, le=1)
    character_crops: float = option(0.0, "share of crops that are put on a character", ge=0, le=1)


class VAE(Section):
    encoder_base: int = option(16, "channels of the first encoder stage", ge=1)
    decoder_base: int = option(24, "channels of the last decoder stage", ge=1)
    kl_weight: float = option(3.0e-4, "weight of the KL term", ge=0)
    mask_weight: float = option(4.0, "extra weight of pixels on characters", ge=0)
    edge_weight: float = option(0.5, "weight of the edge term", ge=0)
    mse_weight: float = option(2.0, "weight of the squared error beside the absolute one", ge=0)
    stages: tuple[VAEStage, ...] = option((), "legs of the training; empty = one leg at full size")
