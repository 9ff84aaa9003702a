"""Quantisation keys, the same seven for each network: `model_quant*`, `generator_quant*`, `real_score_quant*`, `fake_score_quant*`.

The keys of one network in distillation fall back to `model_quant*` where they are null.
"""

from __future__ import annotations

from typing import Literal

from pydantic import create_model

from .section import Section, option

ScaleRule = Literal["static_6", "static_4", "mse", "mae", "abs_max"]
PackedBackend = Literal["w4a8", "w4a16", "native", "emulated", "cutlass", "pytorch"]  # the last two: published names of native and emulated


def quant_fields(prefix: str, *, inherits: bool) -> dict:
    """Field definitions of one network's keys. `inherits`: null means "as model_quant*"."""
    rule, flag = ScaleRule | None, (bool | None if inherits else bool)
    return {
        prefix: (flag, option(None if inherits else False, f"NVFP4 for {prefix.removesuffix('_quant')}")),
        f"{prefix}_scale_rule": (rule, option(None if inherits else "static_6", "scale rule of a 16-value group")),
        f"{prefix}_activation_scale_rule": (rule, option(None if inherits else "static_6", "scale rule for activations")),
        f"{prefix}_weight_scale_rule": (rule, option(None, "scale rule for weights; null = scale_rule")),
        f"{prefix}_gradient_scale_rule": (rule, option(None, "scale rule for gradients; null = scale_rule")),
        f"{prefix}_filtered_modules": (tuple[str, ...] | None, option(None, "Linear layers that stay in bf16")),
        f"{prefix}_use_default_filtered_modules": (flag, option(None if inherits else True, "also keep the default list")),
    }


class _Backend(Section):
    model_quant_backend: PackedBackend | None = option(None, "how NVFP4 weights are computed; null = the best this machine has")
    model_quant_skip_first_blocks: int = option(0, "transformer blocks at the start that stay in bf16", ge=0)
    model_quant_skip_last_blocks: int = option(0, "transformer blocks at the end that stay in bf16", ge=0)
    model_quant_use_transformer_engine: bool = option(False, "quantise merged bf16 weights at run time with TransformerEngine")
    model_quant_te_inference_only: bool = option(True, "TransformerEngine without what training needs")
    model_quant_te_low_precision_weights: bool = option(True, "TransformerEngine keeps only packed weights")
    model_quant_te_fallback_to_fouroversix: bool = option(False, "use the FourOverSix path where TransformerEngine is missing")
    model_quant_te_recipe_kwargs: dict | None = option(None, "passed to the TransformerEngine recipe")
    model_quant_te_module_kwargs: dict | None = option(None, "passed to TransformerEngine modules")
    real_score_quant_materialize: bool = option(True, "drop the teacher's master weights after packing")


Quantisation = create_model(
    "Quantisation",
    __base__=_Backend,
    **quant_fields("model_quant", inherits=False),
    **quant_fields("generator_quant", inherits=True),
    **quant_fields("real_score_quant", inherits=True),
    **quant_fields("fake_score_quant", inherits=True),
)
