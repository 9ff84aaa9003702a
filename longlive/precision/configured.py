"""From a configuration to the converter it asks for. The choice of a backend is said once, with the key that changes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..core.errors import CheckpointError, ConfigError
from ..core.log import warn_once
from ..ops.nvfp4 import NVFP4
from ..ops.packed import PackedTensor
from .backends import BACKENDS, EMULATED, FLOATING, FP8, NATIVE, PACKED, TE, TORCHAO, Backend, best_packed, choose
from .capability import Capability, probe
from .converter import LinearConverter, Selection
from .packages import TransformerEngineLinear, torchao_layer
from .training import TRAINED_AS

W4A4 = (NATIVE, EMULATED, TE)


def configured_converter(
    config,
    device: torch.device,
    dtype: torch.dtype,
    given: Mapping[str, PackedTensor] | None = None,
    capability: Capability | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> LinearConverter | None:
    """The converter of `fp8_quant` or `model_quant`, None for neither. `dtype`: of all that is not quantised. `given`: weights that the checkpoint holds
    quantised; `metadata`: what it says.

    A generator that was trained in NVFP4 is quantised with the tiles that it was trained with, and a warning says where it is computed in another way.
    Raises ConfigError for a backend that the device lacks, CheckpointError for a quantised checkpoint that the configuration does not ask for.
    """
    given, capability, trained = given or {}, capability or probe(device), trained_as(metadata or {})
    q = config.infra
    if not (config.fp8_quant or q.model_quant):
        if given:
            kinds = {weight.name for weight in given.values()}
            key = "model_quant" if "nvfp4" in kinds else "fp8_quant"
            raise CheckpointError(f"the checkpoint holds {' and '.join(sorted(kinds))} weights; set {key}: true, or give the bf16 checkpoint")
        _told(trained, "in floating point")
        return None
    backend, key = _backend(config, given, capability)
    rest = str(dtype).removeprefix("torch.")
    warn_once(f"{backend.words} ({backend.name}), all else in {rest}, on {capability.name}; {key} chooses another way")
    rules = {
        "weight_rule": q.model_quant_weight_scale_rule or q.model_quant_scale_rule,
        "activation_rule": q.model_quant_activation_scale_rule,
    }
    if trained is not None:
        alike = backend.name in W4A4 and all(trained[key] == rule for key, rule in rules.items())
        if not alike:
            _told(trained, f"as {backend.name}" + (f" with {rules['weight_rule']} and {rules['activation_rule']}" if backend.weights == "nvfp4" else ""))
        rules["tile"] = trained["tile"] if trained["weight_rule"] == rules["weight_rule"] else 1
    return LinearConverter(backend=backend, selection=selection(config), given=given, device=device, prepare=_prepare(config, backend, device), **rules)


def trained_as(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The NVFP4 recipe that a checkpoint says it was trained with; None for any other training."""
    about = json.loads(metadata.get(TRAINED_AS, "{}"))
    return about if about.get("kind", "").startswith("nvfp4") else None


def _told(trained: dict[str, Any] | None, served: str) -> None:
    if trained is not None:
        words = f"weights {trained['weight_rule']}, {trained['tile']} x 16; activations {trained['activation_rule']}"
        remedy = "set model_quant: true, model_quant_backend: emulated (native on Blackwell) and those scale rules to compute what was trained"
        warn_once(f"the generator was trained as nvfp4 ({words}) and is computed {served}; {remedy}")


def selection(config) -> Selection:
    """Which layers the `model_quant*` lists choose."""
    q = config.infra
    return Selection(
        filtered=q.model_quant_filtered_modules or (),
        default=q.model_quant_use_default_filtered_modules,
        skip_first=q.model_quant_skip_first_blocks,
        skip_last=q.model_quant_skip_last_blocks,
    )


def _backend(config, given: Mapping[str, PackedTensor], capability: Capability) -> tuple[Backend, str]:
    q = config.infra
    if config.fp8_quant:
        return choose(config.fp8_backend, "fp8_backend", FLOATING, FP8, capability), "fp8_backend"
    key = "model_quant_backend"
    if q.model_quant_use_transformer_engine:
        if any(isinstance(weight, NVFP4) for weight in given.values()):
            raise ConfigError(
                "the checkpoint holds packed NVFP4 weights and model_quant_use_transformer_engine is true: TransformerEngine quantises merged bf16 "
                "weights; set it to false, or give the merged bf16 checkpoint"
            )
        reason = BACKENDS[TE].lacks(capability)
        if reason is None or not q.model_quant_te_fallback_to_fouroversix:
            return choose(TE, key, (TE,), TE, capability), "model_quant_use_transformer_engine"
        warn_once(f"TransformerEngine cannot be used: {reason}; model_quant_te_fallback_to_fouroversix takes our own backend")
    return choose(q.model_quant_backend, key, PACKED, best_packed(capability), capability), key


def _prepare(config, backend: Backend, device: torch.device):
    q = config.infra
    if backend.name == TORCHAO:
        return lambda name, layer: torchao_layer(name, layer.to(device))
    if backend.name == TE:
        options = (q.model_quant_te_recipe_kwargs or {}, q.model_quant_te_module_kwargs or {}, q.model_quant_te_low_precision_weights)
        return lambda name, layer: TransformerEngineLinear(layer.to(device), *options)
    return None
