"""What the schema knows and this version cannot do yet. Entry points call `availability` before any weight is read."""

from __future__ import annotations

from ..core.errors import NotAvailable
from .root import Config

GENERATE, TRAIN = "generate", "train"


def availability(config: Config, purpose: str) -> None:
    """Raises NotAvailable for the first setting of `config` that `purpose` ("generate" or "train") cannot serve."""
    for used, feature, remedy in _generate(config) if purpose == GENERATE else _train(config):
        if used:
            raise NotAvailable(feature, remedy)


def _generate(c: Config):
    yield c.sp_size * c.dp_size > 1, f"sequence parallelism (sp_size {c.sp_size} x dp_size {c.dp_size})", "set both to 1"
    yield c.torch_compile is True, "torch_compile: true", "set it to false or auto"


def _train(c: Config):
    yield c.infra.model_quant, "NVFP4 (model_quant: true)", "set model_quant: false to run in bf16"
    yield c.fp8_quant, "FP8 (fp8_quant: true)", "set fp8_quant: false to run in bf16"
    yield c.algorithm.trainer == "score_distillation", "distillation (algorithm.trainer: score_distillation)", "train with trainer: diffusion"
    yield c.adapter is not None, "training a LoRA (the adapter section)", "remove the adapter section and lora_ckpt to train all weights"
    ranks, kind = c.infra.sequence_parallel_size, c.algorithm.trainer
    yield ranks > 1 and kind != "diffusion", f"sequence parallelism (infra.sequence_parallel_size: {ranks}) of trainer {kind}", "set it to 1"
    recycling = c.training.error_recycling.enabled and kind != "diffusion"
    yield recycling, f"error recycling (training.error_recycling) of trainer {kind}", "set training.error_recycling.enabled: false"
