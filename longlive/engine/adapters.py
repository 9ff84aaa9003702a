"""The adapters that a configuration names: found, read, scaled. (`engine.parts` puts them on the network, or into its weights.)

Where they are: `checkpoints.lora_ckpt`, one file or a list, where a shipped adapter's name stands for its file (`models.shipped`); without it, the LoRA entry
of `checkpoints.generator_ckpt` (spec inference §10.2).
How strong: `adapter.weight`, one number or one per file. How scaled: by the alpha that a file states; `adapter.rank` and `adapter.alpha` speak for
files that state none, as published ones do.
"""

from __future__ import annotations

from pathlib import Path

from ..core.errors import ConfigError
from ..core.log import logger, warn_once
from ..models.lora import Adapter
from ..models.lora_files import adapter_name, holds_lora, read_lora
from ..models.shipped import adapter_path


def configured_adapters(config) -> list[tuple[Adapter, float]]:
    """(adapter, weight) for each, in order; names are those of the files, unique. [] without an adapter section.

    Raises CheckpointError for a file that is no LoRA, ConfigError where the section contradicts a file.
    """
    if config.adapter is None:
        return []
    paths = lora_paths(config)
    if not paths:
        warn_once("the adapter section has no effect: checkpoints.lora_ckpt is not set and the generator's checkpoint holds no LoRA; set it, or remove adapter")
        return []
    weights = config.adapter.weight
    weights = weights if isinstance(weights, tuple) else (weights,) * len(paths)
    adapters: dict[str, Adapter] = {}
    for path in paths:
        adapter = read_lora(path, name=_fresh(adapter_name(path), adapters))
        adapters[adapter.name] = adapter
    scaled = _scaled(config, list(adapters.values()))
    if config.adapter.verbose:
        for adapter, weight in zip(scaled, weights):
            logger.warning("LoRA %s: weight %g, %d layers: %s", adapter.name, weight, len(adapter.layers), ", ".join(adapter.layers))
    return list(zip(scaled, weights))


def lora_paths(config) -> tuple[Path, ...]:
    """Where the adapters are."""
    given, generator = config.checkpoints.lora_ckpt, config.checkpoints.generator_ckpt
    if given:
        return tuple(adapter_path(name) for name in (given if isinstance(given, tuple) else (given,)))
    return (Path(generator),) if generator and holds_lora(generator) else ()


def _fresh(name: str, taken) -> str:
    return next(word for word in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if word not in taken)


def _scaled(config, adapters: list[Adapter]) -> list[Adapter]:
    """The adapters with the section's alpha where they state none. The section speaks for those; where all state one, it must agree with all."""
    rank, alpha = config.adapter.rank, config.adapter.alpha
    silent = [adapter for adapter in adapters if any(layer.alpha is None for layer in adapter.layers.values())]
    for adapter in silent or adapters:
        if rank is not None and adapter.rank != rank:
            found = "layers of different ranks" if adapter.rank is None else f"rank {adapter.rank}"
            remedy = "remove adapter.rank" if adapter.rank is None else f"set adapter.rank: {adapter.rank}"
            raise ConfigError(f"adapter.rank({rank}) but {adapter.path} has {found}; {remedy}")
        if alpha is not None and not silent and adapter.alpha != alpha:
            raise ConfigError(f"adapter.alpha({alpha:g}) but {adapter.path} states its own (alpha / rank = {_scales(adapter)}); remove adapter.alpha")
    return [adapter if alpha is None else adapter.with_alpha(alpha) for adapter in adapters]


def _scales(adapter: Adapter) -> str:
    scales = sorted({layer.scale for layer in adapter.layers.values()})
    return f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
