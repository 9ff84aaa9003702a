"""What the schema knows and this version cannot do yet. Entry points call `availability` before any weight is read."""

from __future__ import annotations

from ..core.errors import ConfigError, NotAvailable
from ..core.log import warn_once
from .root import Config
from .switches import without_switch

GENERATE, TRAIN = "generate", "train"
NO_COMPILER = {
    GENERATE: "torch_compile: true is refused: the generator's kernels are fused by hand already, and a compiler would tune for minutes "
    "(docs/performance.md); set it to false, or to auto, which compiles nothing",
    TRAIN: "torch_compile: true is refused: it is a setting of generation, and training.compile: true compiles the blocks; set it to false or auto",
}
# what only trainer score_distillation reads, section -> key -> value of no effect
DISTILLATION_ONLY = {
    "checkpoints": {"real_score_ckpt": None, "fake_score_ckpt": None},
    "algorithm": {
        "regression_steps": 0, "ts_schedule": False, "ts_schedule_max": False, "last_step_only": False, "real_score_mask": None, "fake_score_mask": None,
        "min_score_timestep": 0, "context_noise": 0,
    },
    "training": {"streaming_frames": 0, "finish_chunks": False, "critic_reuses_rollout": False},
    "infra": {"rollout_copy": False},
}  # fmt: skip


def availability(config: Config, purpose: str) -> None:
    """Raises NotAvailable for the first setting of `config` that `purpose` ("generate" or "train") cannot serve; warns of those that it does not read.

    Raises ConfigError for `torch_compile: true`, which neither is meant to serve.
    """
    if config.torch_compile is True:
        raise ConfigError(NO_COMPILER[purpose])
    for used, feature, remedy in _train(config) if purpose == TRAIN else ():
        if used:
            raise NotAvailable(feature, remedy)
    for line in without_switch(config, training=purpose == TRAIN):
        warn_once(line)


def _train(c: Config):
    ranks, kind = c.infra.sequence_parallel_size, c.algorithm.trainer
    alone = c.adapter is not None and kind in ("vae", "judge")
    yield alone, f"training a LoRA (the adapter section) with trainer {kind}", "remove the adapter section and lora_ckpt to train all weights"
    yield ranks > 1 and kind in ("vae", "judge"), f"sequence parallelism (infra.sequence_parallel_size: {ranks}) of trainer {kind}", "set it to 1"
    for name in ("real_score", "fake_score"):
        used = c.infra.model_dump()[f"{name}_quant"] and kind != "score_distillation"
        yield used, f"NVFP4 of a network that trainer {kind} does not have (infra.{name}_quant: true)", f"set infra.{name}_quant: null"
    for section, keys in DISTILLATION_ONLY.items() if kind != "score_distillation" else ():
        for name, plain in keys.items():
            value = getattr(getattr(c, section), name)
            yield value not in (plain, None), f"distillation ({section}.{name}: {value}) of trainer {kind}", "remove it"
    low = (c.infra.model_quant or c.fp8_quant) and kind in ("vae", "judge")
    yield low, f"low precision (model_quant, fp8_quant) of trainer {kind}", "set both to false"
    if kind == "diffusion":
        yield not c.algorithm.teacher_forcing, "training without teacher forcing (algorithm.teacher_forcing: false)", "set it to true"
        yield not c.algorithm.causal, "training a bidirectional generator (algorithm.causal: false)", "set it to true"
    yield not c.algorithm.generator_is_causal, "a bidirectional student (algorithm.generator_is_causal: false)", "set it to true"
    steps = c.algorithm.num_train_timestep
    yield steps != 1000, f"a noise schedule of {steps} entries (algorithm.num_train_timestep)", "set it to 1000"
    recycling = c.training.error_recycling.enabled and kind != "diffusion"
    yield recycling, f"error recycling (training.error_recycling) of trainer {kind}", "set training.error_recycling.enabled: false"
