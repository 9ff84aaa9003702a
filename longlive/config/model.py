"""`model_kwargs` and `adapter`: which network, how it counts chunks and positions, and its LoRA."""

from __future__ import annotations

from typing import Literal

from .section import Section, option

FRESH_RANK = 16


class ModelKwargs(Section):
    model_name: str = option("Wan2.2-TI2V-5B", "model by name; its files belong under wan_models/<name>/ (tiny ships in the package)")
    timestep_shift: float = option(5.0, "shift of the noise schedule, in training and in the solver", gt=0)
    num_frame_per_block: int = option(1, "latent frames of one chunk, the autoregressive unit (released models: 8)", ge=1)
    local_attn_size: int = option(-1, "attention window in latent frames; -1 = three chunks when generating, everything when training", ge=-1)
    sink_size: int = option(0, "latent frames kept at the start of the window: 0 or one chunk", ge=0)
    t_scale: float = option(1.0, "scale of temporal RoPE positions", gt=0)
    rope_method: Literal["linear"] = option("linear", "RoPE scaling; only linear exists")
    original_seq_len: None = option(None, "must stay null (no RoPE length extrapolation)")


class Adapter(Section):
    """LoRA; its presence in the file turns LoRA on."""

    type: Literal["lora"] = option("lora", "adapter kind")
    rank: int | None = option(None, "LoRA rank; null = the file's when one is read, 16 when one is trained from nothing", ge=1)
    alpha: float | None = option(None, "LoRA scale is alpha / rank, for files that state none; null = rank", gt=0)
    weight: float | tuple[float, ...] = option(1.0, "generating: live weight, or one for each file of checkpoints.lora_ckpt; 0 = off")
    dropout: float = option(0.0, "LoRA dropout in training", ge=0, lt=1)
    apply_to_critic: bool = option(True, "distillation: put LoRA on the critic too")
    verbose: bool = option(False, "list the adapted layers")

    @property
    def fresh_rank(self) -> int:
        """Rank of an adapter that training starts from nothing."""
        return self.rank or FRESH_RANK
