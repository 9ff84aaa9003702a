"""The three products of a linear layer trained in NVFP4, with the numbers of FP4 tensor cores up to the order of addition (spec nvfp4 §6).

    forward           y  = x W^T      x: 1 x 16 along features, nearest          W: 16 x 16 tiles (or 1 x 16), nearest
    gradient of x     dx = dy W       dy: 1 x 16 along features, stochastic      W: the same codes, as tiles are square
    gradient of W     dW = dy^T x     both: Hadamard over 16 tokens, then 1 x 16 along tokens; dy stochastic, x nearest

Every operand is quantised from its full-precision tensor, in the direction in which its product sums. Amax belongs to a sample; where a sample's tokens lie on
several ranks, `Sharing.reduce` makes the largest value that of all of them, so that shards quantise as the whole would.

Legend: B samples, M tokens, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import nvfp4
from .fp4_matmul import products, quantised_activation, wide_product
from .hadamard import SIZE, hadamard
from .nvfp4 import GROUP, NVFP4

Reduce = Callable[[torch.Tensor], torch.Tensor]
DGRAD, WGRAD = 0, 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Scale rules of weights, activations and gradients, the tile of weights' scales; whether gradients round stochastically and turn by Hadamard."""

    weight_rule: str = "static_6"
    activation_rule: str = "mse"
    gradient_rule: str = "static_6"
    tile: int = GROUP
    stochastic: bool = True
    hadamard: bool = True


def quantised_part(x_BMK: torch.Tensor, rule: str, reduce: Reduce | None, seed: int | None = None) -> NVFP4:
    """`x` in NVFP4 along its last dimension, 1 x 16, one amax a sample; `seed`: round stochastically, by a place's own random bits."""
    amax = None
    if reduce is not None:
        amax = reduce(x_BMK.detach().abs().amax((1, 2)).to(torch.float32))
    return quantised_activation(x_BMK, rule, amax, seed)


def times(a: NVFP4, b_NK: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """float32 [B, M, N]: a b^T, where `b_NK` holds code * scale of weights with the decode scale `b_scale`."""
    batch, rows, inner = a.shape
    total = wide_product(products(a).reshape(batch * rows, inner), b_NK).unflatten(0, (batch, rows))
    return total * (a.decode_scale * b_scale)[:, None, None]


def transposed_weight(packed: NVFP4, weight_NK: torch.Tensor | None, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """(code * scale of W^T [K, N], its decode scale). Square tiles: the codes of W. Otherwise W^T is quantised from `weight_NK`; without it W's stay."""
    if packed.tile == GROUP or weight_NK is None:
        return products(packed).t(), packed.decode_scale
    turned = nvfp4.quantise(weight_NK.t().contiguous(), recipe.weight_rule, on_nonfinite="nan")
    return products(turned), turned.decode_scale


def input_gradient(
    dy_BMN: torch.Tensor, packed: NVFP4, weight_NK: torch.Tensor | None, recipe: Recipe, seed: int, reduce: Reduce | None
) -> torch.Tensor:
    """float32 [B, M, K]: dy W."""
    dy = quantised_part(dy_BMN, recipe.gradient_rule, reduce, seed if recipe.stochastic else None)
    return times(dy, *transposed_weight(packed, weight_NK, recipe))


def weight_gradient(dy_BMN: torch.Tensor, x_BMK: torch.Tensor, recipe: Recipe, seed: int, reduce: Reduce | None) -> torch.Tensor:
    """float32 [N, K]: the sum over samples of dy^T x."""
    dy = quantised_part(turned(dy_BMN, recipe), recipe.gradient_rule, reduce, seed if recipe.stochastic else None)
    x = quantised_part(turned(x_BMK, recipe), recipe.activation_rule, reduce)
    total = None
    for mine, theirs, alpha in zip(products(dy), products(x), dy.decode_scale * x.decode_scale):
        part = wide_product(mine, theirs) * alpha
        total = part if total is None else total + part
    return total


def turned(t_BMK: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """[B, K, M'] contiguous, along tokens: filled with zeros to whole blocks of 16, and turned by the Hadamard transform where the recipe says so."""
    rows = F.pad(t_BMK, (0, 0, 0, -t_BMK.shape[1] % SIZE)).transpose(1, 2).contiguous()
    return hadamard(rows) if recipe.hadamard else rows
