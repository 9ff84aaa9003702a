"""A read checkpoint that may hold quantised weights -> those weights, and the rest as an ordinary state file."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..core.errors import CheckpointError
from ..ops.nvfp4 import NVFP4
from ..ops.packed import PackedTensor
from . import fouroversix
from .quantised_files import from_plain, is_quantised
from .weights import StateFile

WEIGHT = ".weight"


def split_packed(state: StateFile, configured: str | None = None) -> tuple[dict[str, PackedTensor], StateFile]:
    """(quantised weights by parameter name, everything else) of a published container or of our safetensors; ({}, `state`) for any other file.

    `configured`: the configuration's rule for weights, where it names one; it is checked against the file's. Raises CheckpointError for a wrong rule,
    told from the file or from the numbers, and for damaged or missing parts.
    """
    try:
        if is_quantised(state.metadata):
            packed, rest = from_plain(state.tensors, state.metadata)
            for weight in packed.values():
                fouroversix.check_configured(weight.rule if isinstance(weight, NVFP4) else None, configured)
        elif fouroversix.is_fouroversix(state.tensors):
            packed, rest = fouroversix.read_container(state.metadata, state.tensors, configured)
        else:
            return {}, state
    except CheckpointError as error:
        raise CheckpointError(f"{state.path}: {error}") from None
    return packed, replace(state, tensors=rest)


def without_weights(model: nn.Module, packed: dict[str, PackedTensor]) -> None:
    """Takes the float weights off the layers whose quantised ones are there, so that a strict loader does not look for them.

    Raises CheckpointError for a layer that the model lacks, or has in another size.
    """
    linears = {f"{name}{WEIGHT}": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, weight in packed.items():
        layer = linears.get(name)
        if layer is None or tuple(layer.weight.shape) != tuple(weight.shape):
            found = f"expects {list(layer.weight.shape)}" if layer is not None else "has no such layer"
            raise CheckpointError(f"{name} is stored quantised as {list(weight.shape)} and the model {found}; check that the file belongs to this model")
        layer.weight = None
