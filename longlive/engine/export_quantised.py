"""A configuration's generator and adapters -> one checkpoint for quantised generation (spec nvfp4 §2.4).

    fouroversix          packed NVFP4 weights: the published container (`.pt`), or ours with a self-describing header (`.safetensors`)
    transformer_engine   merged bf16 weights, which are quantised whenever they are loaded
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.errors import CheckpointError, InputError
from ..models import fouroversix
from ..models.lora_merge import check_target, merged_generator, write_merged
from ..models.quantised_files import HEADER, to_plain
from ..models.sizes import dit_dims, shapes_of
from ..models.spec import model_spec
from ..models.wan_dit import WanDiT
from ..models.weights import build_on_meta, native_state, read_state, save_state, save_torch
from ..ops import nvfp4
from ..precision.configured import selection, trained_as
from ..precision.training import TRAINED_AS
from .adapters import configured_adapters
from .parts import generator_path, model_config

FOUROVERSIX = "fouroversix"
TRANSFORMER_ENGINE = "transformer_engine"
EXPORTS = (FOUROVERSIX, TRANSFORMER_ENGINE)


def export_quantised(config, out: Path, *, backend: str, dtype: torch.dtype, device: torch.device, merge_lora: bool = True) -> dict[str, Any]:
    """Writes the generator of `config`, its adapters merged in unless `merge_lora` is off, and returns what the file says of itself.

    Weights are cast to `dtype`, then quantised by the rule for weights of `model_quant*`. Raises InputError where the file exists, ConfigError for a
    generator that is merged already and for an empty selection, CheckpointError for one that is quantised already and for files that do not fit.
    """
    check_target(out)
    adapters = configured_adapters(config) if merge_lora else []
    spec = model_spec(config.model_kwargs.model_name)
    path = generator_path(config, spec)
    state = native_state(read_state(path, use_ema=config.inference.use_ema, kind="generator"), "generator")
    dims = dit_dims(shapes_of(state.tensors), spec.dit, model_config(path, spec))
    tensors, about = merged_generator(state, adapters, spec, dtype=dtype, device=device)
    about |= {"merged_lora": bool(adapters)} if adapters else {"merged_lora": bool(state.metadata.get("merged_lora", False)), "lora_ckpt": ""}
    trained = trained_as(state.metadata)
    about |= {TRAINED_AS: state.metadata[TRAINED_AS]} if trained else {}
    if backend == TRANSFORMER_ENGINE:
        about["checkpoint_format"] = fouroversix.MERGED_BF16
        write_merged(out, tensors, about)
        return about
    rule = config.infra.model_quant_weight_scale_rule or config.infra.model_quant_scale_rule
    tile = trained["tile"] if trained and trained["weight_rule"] == rule else 1
    return _packed(config, out, tensors, about, build_on_meta(lambda: WanDiT(dims)), partial(nvfp4.quantise, rule=rule, tile=tile), device)


def _packed(
    config, out: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any], model: WanDiT, quantise: Callable[..., nvfp4.NVFP4], device: torch.device
) -> dict[str, Any]:
    q = config.infra
    spec = model_spec(config.model_kwargs.model_name)
    packed = {}
    for name in (f"{layer}.weight" for layer in selection(config).names(model, spec)):
        if name not in tensors:
            raise CheckpointError(f"the generator has no {name}; check that the file belongs to {spec.name}")
        try:
            packed[name] = quantise(tensors.pop(name).to(device)).to("cpu")
        except InputError as error:
            raise CheckpointError(f"{name}: {error}") from None
    record = {
        "activation_scale_rule": q.model_quant_activation_scale_rule, "filtered_modules": list(q.model_quant_filtered_modules or ()),
        "use_default_filtered_modules": q.model_quant_use_default_filtered_modules, "use_transformer_engine": False,
    }  # fmt: skip
    if out.suffix == ".safetensors":
        plain, header = to_plain(packed, tensors)
        about |= {"checkpoint_format": HEADER}
        save_state(out, plain, {**about, **header, "quantization": record})
    else:
        about |= {"checkpoint_format": fouroversix.FORMAT}
        more = {key: value for key, value in about.items() if key != "checkpoint_format"}
        save_torch(out, fouroversix.container(packed, tensors, record, **more))
    return about | {"weight_scale_rule": next(iter(packed.values())).rule, "packed_layers": len(packed)}
