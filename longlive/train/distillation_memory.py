"""How much memory distillation takes, by the arithmetic of `memory`: three roles, two that learn, a rollout and its pages.

Frozen networks cost their weights, once where roles share one; what trains costs what it costs in any training (16 bytes a parameter, 4 more with an
average). Of the two players' steps the larger counts: the student keeps the graph of every chunk's exit step and the pages that later chunks read, the
critic that of the whole film, twice as long under the mask `teacher_forced`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..config.root import Config
from ..core.geometry import Geometry
from ..models.spec import DiTDims
from ..models.wan_dit import WanDiT
from .memory import KEPT_OF_A_BLOCK, KEPT_RECOMPUTED, TrainingMemory, sharing_ranks


def distillation_memory(config: Config, networks: Sequence[WanDiT], copy: WanDiT | None, *, doubled: bool, world: int, mixed: bool) -> TrainingMemory:
    """The estimate for one process of `world`, before anything is sharded. `doubled`: the critic sees [clean; noisy]. `copy`: of the student, whole."""
    t, item, share = config.training, 2 if mixed else 4, sharing_ranks(config.infra.sharding_strategy, world)
    each = [p for network in networks for p in network.parameters()]
    learns, still = (sum(p.numel() for p in each if p.requires_grad == wanted) for wanted in (True, False))
    states = learns * (16 + (4 if t.ema_weight else 0)) / share
    frozen = still * item / share + (sum(p.numel() for p in copy.parameters()) * item if copy is not None else 0)
    dims, size = networks[0].dims, Geometry.of_latent(*config.data.image_or_video_shape[3:])
    film = t.batch_size * t.num_training_frames * size.frame_tokens / config.infra.sequence_parallel_size
    chunk = film * config.chunk_frames / t.num_training_frames
    recomputed = config.infra.gradient_checkpointing
    learning = min(t.slice_last_frames, t.num_training_frames) / t.num_training_frames
    pages = dims.layers * film * dims.dim * 2 * item
    student = pages + _activations(dims, film * learning, chunk, mixed, recomputed)
    critic = _activations(dims, film * (1 + doubled), film * (1 + doubled), mixed, recomputed)
    return TrainingMemory(states, frozen, max(student, critic), 0.0, 0.0)


def _activations(dims: DiTDims, kept: float, at_once: float, mixed: bool, recomputed: bool) -> float:
    """Bytes of a backward pass over `kept` tokens, of which `at_once` go through a block together."""
    of_dim, of_ffn = KEPT_OF_A_BLOCK[mixed]
    share = of_dim * dims.dim + of_ffn * dims.ffn
    return dims.layers * kept * KEPT_RECOMPUTED * dims.dim + at_once * share if recomputed else dims.layers * kept * share
