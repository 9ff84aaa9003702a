"""A pipeline of random, very small networks: the real code at sizes that take milliseconds."""

import torch

from longlive.core.geometry import Geometry
from longlive.engine.pipeline import Pipeline
from longlive.engine.rollout import RolloutSettings
from longlive.models.codec import VideoCodec
from longlive.models.spec import DiTDims, ModelSpec, VAEDims
from longlive.models.wan_dit import WanDiT
from longlive.models.wan_vae import WanVAE

SPEC = ModelSpec(
    name="test",
    dit=DiTDims(dim=32, ffn=64, layers=2, heads=2, text_dim=16, text_len=24),
    vae=VAEDims(encoder_base=4, decoder_base=4),
    text_kind="letters",
    folder="",
    height=32,
    width=64,
)


class Letters:
    """A text encoder without weights: one fixed vector per character, at most text_len of them."""

    def encode(self, prompts):
        return [torch.stack([self._vector(c) for c in p[: SPEC.dit.text_len]]) if p else torch.zeros(0, SPEC.dit.text_dim) for p in prompts]

    @staticmethod
    def _vector(character):
        return torch.randn(SPEC.dit.text_dim, generator=torch.Generator().manual_seed(ord(character)))


def random_pipeline(seed=0, **changes):
    """A `Pipeline` in float32 on the CPU with 32x64 frames, chunks of 2 latent frames and 2 steps; `changes` are rollout settings."""
    torch.manual_seed(seed)
    dit, vae = WanDiT(SPEC.dit), WanVAE(SPEC.vae)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    for module in (dit, vae):
        module.eval().requires_grad_(False)
    codec = VideoCodec(vae, torch.zeros(2, 48), torch.stack([torch.full((48,), 0.7), torch.ones(48)]))
    settings = RolloutSettings(**{"chunk_frames": 2, "window_frames": 8, "sink_frames": 2, "steps": 2, **changes})
    return Pipeline(spec=SPEC, dit=dit, codec=codec, text_encoder=Letters(), geometry=Geometry(32, 64), settings=settings)
