"""Which networks of a run train, or stand frozen, in low precision: from the `*_quant*` keys to converters, before sharding.

A trainer has one `LowPrecision` for each network that is converted: `begin` at every micro-step, `weights_changed` after every optimizer step, `metadata` in
what it exports. Films of the evaluation are made as they are trained (`as_trained`): a network trained for NVFP4 is looked at in NVFP4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..config.root import Config
from ..core.log import logger
from ..models.spec import ModelSpec
from ..ops.fp4_training import Recipe
from ..parallel.mesh import Mesh
from ..precision.backends import BACKENDS, EMULATED, FP8, choose
from ..precision.capability import probe
from ..precision.configured import selection
from ..precision.converter import LinearConverter, Selection
from ..precision.linear import QuantisedLinear
from ..precision.training import FP8_TRAINED, NVFP4_FROZEN, NVFP4_TRAINED, Moment, TrainedLinear, TrainingConverter
from .trainer import Draw, seed_of

GENERATOR, TEACHER, CRITIC = "generator_quant", "real_score_quant", "fake_score_quant"


@dataclass(frozen=True)
class LowPrecision:
    """One converted network's converter, the prefix of its keys, and this rank's place among those that share a sample."""

    converter: TrainingConverter
    network: str
    sp_rank: int = 0

    def begin(self, draw: Draw) -> None:
        """A micro-step begins: its roundings are drawn from its own seed, on every rank that shares a sample from another."""
        self.converter.moment.begin(seed_of(draw.generator.initial_seed(), self.sp_rank))

    def metadata(self) -> dict[str, str]:
        return self.converter.metadata()


def wants(config: Config, network: str) -> bool:
    """Whether `network` (one of the prefixes) is in NVFP4: its own switch, else `model_quant`."""
    own = config.infra.model_dump()[network]
    return config.infra.model_quant if own is None else own


def recipe_of(config: Config, network: str) -> Recipe:
    """The rules of `network`: its own keys, else those of `model_quant*` (spec training §7)."""
    keys = config.infra.model_dump()

    def rule(what: str) -> str:
        for prefix in (network, "model_quant"):
            if keys[f"{prefix}_{what}"] is not None:
                return keys[f"{prefix}_{what}"]
        return rule("scale_rule")

    return Recipe(weight_rule=rule("weight_scale_rule"), activation_rule=rule("activation_scale_rule"), gradient_rule=rule("gradient_scale_rule"))


def _selection(config: Config, network: str) -> Selection:
    keys, base = config.infra.model_dump(), selection(config)
    filtered, default = keys[f"{network}_filtered_modules"], keys[f"{network}_use_default_filtered_modules"]
    return Selection(
        filtered=base.filtered if filtered is None else filtered,
        default=base.default if default is None else default,
        skip_first=base.skip_first,
        skip_last=base.skip_last,
    )


def low_precision(config: Config, network: str, model: nn.Module, spec: ModelSpec, mesh: Mesh, *, frozen: bool = False) -> LowPrecision | None:
    """Converts `model` in place as the configuration says of `network`; None where it stays in bf16.

    `frozen`: the network's own weights do not train (a LoRA beside them may), so that NVFP4 drops their masters. Raises ConfigError for a card that
    cannot, and for an empty selection.
    """
    moment = Moment(reduce=largest_of(mesh))
    if wants(config, network):
        kind = NVFP4_FROZEN if frozen else NVFP4_TRAINED
        converter = TrainingConverter(kind=kind, recipe=recipe_of(config, network), selection=_selection(config, network), frozen=frozen, moment=moment)
    elif config.fp8_quant:
        device = next(model.parameters()).device
        choose(None, "fp8_backend", (FP8,), FP8, probe(device))
        converter = TrainingConverter(kind=FP8_TRAINED, selection=_selection(config, network), moment=moment)
    else:
        return None
    logger.warning("%s: %s", network.removesuffix("_quant"), converter.convert(model, spec).line())
    return LowPrecision(converter, network, mesh.sp_rank)


def is_low(model: nn.Module) -> bool:
    """Whether any layer of `model` computes in low precision."""
    return any(isinstance(layer, (QuantisedLinear, TrainedLinear)) for layer in model.modules())


def largest_of(mesh: Mesh) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Makes a value the largest of the ranks that share a sample; None for a rank that has its samples alone."""
    return None if mesh.sp_size == 1 else mesh.largest


def as_trained(config: Config, model: nn.Module, spec: ModelSpec) -> None:
    """Makes a plain copy of the generator compute as it is trained, in place; does nothing to one that trains in bf16."""
    if wants(config, GENERATOR):
        recipe = recipe_of(config, GENERATOR)
        how = {"weight_rule": recipe.weight_rule, "tile": recipe.tile, "activation_rule": recipe.activation_rule}
        LinearConverter(backend=BACKENDS[EMULATED], selection=_selection(config, GENERATOR), **how).convert(model, spec)
    elif config.fp8_quant:
        LinearConverter(backend=BACKENDS[FP8], selection=_selection(config, GENERATOR)).convert(model, spec)
