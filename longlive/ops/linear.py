"""Linear layers that share an input, or end in an activation: one product where weights and layer allow it.

A layer counts as plain when it is torch's own `nn.Linear` without hooks (LoRA branches are hooks, quantised layers are other classes); any other layer is
called by itself, so that what it is stays its own business.

Legend: O features out, I features in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .inference import unrecorded
from .intake import intake_of, prepared


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is its weight and bias and nothing more."""
    return type(layer) is nn.Linear and layer.bias is not None and not layer._forward_hooks and not layer._forward_pre_hooks


def lay_side_by_side(layers: list[nn.Linear]) -> None:
    """Moves the weights and biases of layers with the same input into one block of memory each, one behind another, where `joint_linear` finds them.

    Names, values and parameters stay; only the memory is another.
    """
    for leaf in ("weight", "bias"):
        parameters = [getattr(layer, leaf) for layer in layers]
        block = torch.cat([p.detach() for p in parameters])
        for parameter, part in zip(parameters, block.split([len(p) for p in parameters])):
            parameter.data = part


def joint_linear(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """The outputs of all `layers` for `x` [..., I]; one product where they are plain and lie side by side, then as views of its result.

    Layers that take a form of their own get it made once (`intake`).
    """
    x = prepared(x, *layers)
    if not isinstance(x, torch.Tensor):
        return [layer(x) for layer in layers]
    if len(layers) == 1 or not all(map(is_plain, layers)) or not unrecorded(x, *(layer.weight for layer in layers)):
        return [layer(x) for layer in layers]
    weights, biases = (_block([getattr(layer, leaf).detach() for layer in layers]) for leaf in ("weight", "bias"))
    if weights is None or biases is None:
        return [layer(x) for layer in layers]
    return list(F.linear(x, weights, biases).split([layer.out_features for layer in layers], -1))


def _block(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """The tensor that consists of `parts`, if they lie one behind another in one storage."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != at or not part.is_contiguous():
            return None
        if part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
            return None
        at += part.numel()
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride(), first.storage_offset())


def linear_gelu(x: torch.Tensor, layer: nn.Module, reader: nn.Module | None = None) -> torch.Tensor:
    """GELU (its tanh form) of the layer's output, as `reader` takes it (`intake`); computed while the product is written, where the GPU's library does that."""
    if not isinstance(x, torch.Tensor) or not is_plain(layer):
        y = layer(x)
        intake = None if reader is None else intake_of(y, reader)
        return F.gelu(y, approximate="tanh") if intake is None else intake.of_gelu(y)
    half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    if half and is_plain(layer) and layer.weight.dtype == x.dtype and hasattr(torch, "_addmm_activation") and unrecorded(x, layer.weight):
        flat = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
        return flat.unflatten(0, x.shape[:-1])
    return F.gelu(layer(x), approximate="tanh")
