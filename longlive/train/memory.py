"""How much memory training takes, by arithmetic: what each process holds between steps, and what a step adds.

Bytes a parameter: 4 weight + 4 gradient + 8 AdamW (Muon: 4 for the matrices of blocks, counted as 8) + 4 EMA, divided by the ranks that share them;
under hybrid_zero2 the gathered weights besides.
Bytes a token and block, counted on saved tensors of this network: 82 D + 4.25 ffn in bfloat16, 100 D + 8 ffn in float32; recomputed blocks keep 4 D
each and one block's share at a time, but for the last `infra.keep_blocks`. A recomputed block that need not attend again (`infra.keep_attention`)
keeps one activation and 4 bytes a head besides; "auto" lets as many blocks do so as a card holds next to 4/3 of everything else. The VAE's peak is a
factor times its widest activation. Good to about a third, which is what a plan needs, but not for `training.visibility: window`: what its chunks copy of
the keys and values that they read is not counted.

Legend: D model features, ffn features between the two linear layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config.root import Config
from ..core.geometry import Geometry
from ..core.log import environment
from ..data.encoding import PIECE
from ..engine.estimate import UMT5_PARAMETERS, vae_parameters
from ..models.spec import DiTDims, VAEDims

KEPT_OF_A_BLOCK = {True: (82.0, 4.25), False: (100.0, 8.0)}  # mixed precision -> bytes per (token x D, token x ffn)
KEPT_RECOMPUTED = 4.0
VAE_ACTIVATIONS = 6.0  # widest activations alive at once while encoding
MARGIN = 4 / 3  # of an estimate that is good to a third
GIB = 2**30


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes in each process: `states` of the trained network, `frozen` networks, `activations` of a step, `encode` of the VAE (not at the same time).

    `kept` recomputed blocks do not attend again; what each read takes `read` bytes. `window`: chunks read copies of keys and values, not counted.
    """

    states: float
    frozen: float
    activations: float
    encode: float
    read: float = 0.0
    kept: int = 0
    window: bool = False

    @property
    def peak(self) -> float:
        return self.states + self.frozen + max(self.activations + self.kept * self.read, self.encode)

    def lines(self) -> list[str]:
        rows = (("weights, gradients, optimizer, EMA", self.states), ("VAE and text encoder", self.frozen))
        rows += (("activations of a step", self.activations), (f"kept attention of {self.kept} blocks", self.kept * self.read))
        rows += (("or encoding a piece of video", self.encode), ("peak", self.peak))
        more = ["not counted: the keys and values that visibility: window copies; a step may take up to twice as much"] if self.window else []
        return [*(f"{name:36s}{size / GIB:9.2f} GiB" for name, size in rows), *more]


def sharing_ranks(strategy: str, world: int) -> int:
    """Processes that share one copy of weights, gradients and optimizer state."""
    if strategy in ("full", "no_shard"):
        return world if strategy == "full" else 1
    return min(world, int(environment("LOCAL_WORLD_SIZE", str(world))))


def training_memory(
    config: Config, dims: DiTDims, parameters: int, vae: VAEDims | None, *, umt5: bool, frames: int, world: int, mixed: bool, card: float | None = None
) -> TrainingMemory:
    """The estimate for one process of `world`. `vae` None: latents come from shards. `umt5`: the text encoder is on this device.

    `card`: bytes of the device, None where recomputed blocks cannot keep what attention read.
    """
    t, infra = config.training, config.infra
    item = 2 if mixed else 4
    states = parameters * (16 + (4 if t.ema_weight else 0)) / sharing_ranks(infra.sharding_strategy, world)
    if infra.sharding_strategy == "hybrid_zero2" and world > 1:
        states += parameters * item
    geometry = Geometry.of_latent(*config.data.image_or_video_shape[3:])
    tokens = t.batch_size * (1 + t.noisy_copies) * frames * geometry.frame_tokens / infra.sequence_parallel_size
    of_dim, of_ffn = KEPT_OF_A_BLOCK[mixed]
    block = tokens * (of_dim * dims.dim + of_ffn * dims.ffn)
    whole = min(infra.keep_blocks, dims.layers) if infra.gradient_checkpointing else dims.layers
    recomputed = dims.layers - whole
    activations = recomputed * tokens * KEPT_RECOMPUTED * dims.dim + (whole + bool(recomputed)) * block
    frozen = (vae_parameters(vae) * item if vae is not None else 0) + (UMT5_PARAMETERS * item if umt5 else 0)
    wide = 4 * PIECE * (geometry.height // 2) * (geometry.width // 2)
    encode = VAE_ACTIVATIONS * wide * vae.encoder_base * item if vae is not None else 0
    read = tokens * (item * dims.dim + 4 * dims.heads)
    memory = TrainingMemory(states, frozen, activations, encode, read, window=t.visibility == "window")
    return memory if card is None or not infra.gradient_checkpointing else replace(memory, kept=_kept(infra.keep_attention, memory, recomputed, card))


def _kept(asked: int | str, memory: TrainingMemory, layers: int, card: float) -> int:
    """Blocks that keep what attention read: so many as are asked for, or as fit beside MARGIN times the rest."""
    return min(layers, asked if isinstance(asked, int) else max(0, int((card - MARGIN * memory.peak) / memory.read)))
