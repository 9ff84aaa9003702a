"""Layers that other packages compute: torchao's FP8 as a cross-check, TransformerEngine's NVFP4. Both are imported where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def torchao_layer(name: str, layer: nn.Linear) -> nn.Module:
    """`layer` with torchao's dynamic FP8, one scale a row for weights and activations (spec inference §10.3)."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(layer.to(torch.bfloat16), Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return layer.requires_grad_(False)


class TransformerEngineLinear(nn.Module):
    """A `transformer_engine.pytorch.Linear` in its NVFP4 recipe (spec nvfp4 §5.3). `packed_only`: it keeps 4-bit weights and no others."""

    backend = "te"

    def __init__(self, layer: nn.Linear, recipe_options: Mapping[str, Any], module_options: Mapping[str, Any], packed_only: bool):
        super().__init__()
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import NVFP4BlockScaling

        self.in_features, self.out_features = layer.in_features, layer.out_features
        off = {"disable_rht": True, "disable_stochastic_rounding": True, "disable_2d_quantization": True}
        self.recipe, self._te = NVFP4BlockScaling(**{**off, **recipe_options}), te
        with te.fp8_model_init(enabled=packed_only, recipe=self.recipe):
            self.linear = te.Linear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, params_dtype=torch.bfloat16, device=layer.weight.device, **module_options
            )
        with torch.no_grad():
            self.linear.weight.copy_(layer.weight)
            if layer.bias is not None:
                self.linear.bias.copy_(layer.bias)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self._te.fp8_autocast(enabled=True, fp8_recipe=self.recipe):
            return self.linear(x)
