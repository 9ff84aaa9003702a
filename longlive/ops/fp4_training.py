"""The three products of a linear layer trained in NVFP4, with the numbers of FP4 tensor cores up to the order of addition (spec nvfp4 §6).

    forward           y  = x W^T      x: 1 x 16 along features, nearest          W: 16 x 16 tiles (or 1 x 16), nearest
    gradient of x     dx = dy W       dy: 1 x 16 along features, stochastic      W: the same codes, as tiles are square
    gradient of W     dW = dy^T x     both: Hadamard over 16 tokens, then 1 x 16 along tokens; dy stochastic, x nearest

Every operand is quantised from its full-precision tensor, in the direction in which its product sums. Amax belongs to a sample; where a sample's tokens lie on
several ranks, `reduce` makes the largest value that of all of them, so that shards quantise as the whole would. Operands are kept as code * scale and
never packed; on a GPU one pass makes each of them, and nothing waits for the device.

Legend: B samples, M tokens, M' tokens filled to whole groups, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .fp4_matmul import products, quantised_activation, quantised_weight, wide_product, wide_products
from .hadamard import SIZE, hadamard
from .nvfp4 import GROUP, NVFP4, RULES, rule_named
from .packed import divided
from .triton_available import fused_fp8

Reduce = Callable[[torch.Tensor], torch.Tensor]
DGRAD, WGRAD = 0, 1
PART_BYTES = 1 << 28  # of the weight gradients of samples that exist at once
SHARE_TOKENS, SHARES = 1024, 128  # a product over tokens is shared out, at least so many to a share, where it has fewer than so many tiles of TILE x TILE
TILE = 128


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Scale rules of weights, activations and gradients, the tile of weights' scales; whether gradients round stochastically and turn by Hadamard."""

    weight_rule: str = "static_6"
    activation_rule: str = "mse"
    gradient_rule: str = "static_6"
    tile: int = GROUP
    stochastic: bool = True
    hadamard: bool = True


@dataclass(frozen=True, eq=False)
class Coded:
    """One side of a product. `values`: code * scale, exact in bfloat16 [B, M, K] (weights [N, K]); `amax`: float32 [B] ([]); `span`: E M of the rule."""

    values: torch.Tensor
    amax: torch.Tensor
    span: float

    @property
    def decode_scale(self) -> torch.Tensor:
        return divided(self.amax, self.span)


def of_packed(w: NVFP4) -> Coded:
    return Coded(products(w), w.amax, w.product)


def _span(rule: str) -> float:
    return RULES[rule].code * RULES[rule].scale


def _largest(x_BMK: torch.Tensor) -> torch.Tensor:
    return torch.where(x_BMK.isfinite(), x_BMK, 0).abs().amax((1, 2)).to(torch.float32)


def largest(x_BMK: torch.Tensor, recipe: Recipe, *, tokens: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float32 [B] each: the largest finite |x| of each sample, and with `tokens` that of the sample turned as in the weight gradient. One pass on a GPU."""
    if fused_fp8(x_BMK):
        from .triton_fp4_training import both_largest_fused, rows_largest_fused

        return tuple(both_largest_fused(x_BMK.contiguous(), recipe.hadamard)) if tokens else (rows_largest_fused(x_BMK.contiguous()), None)
    return _largest(x_BMK), _largest(turned(x_BMK, recipe)) if tokens else None


def coded(x_BMK: torch.Tensor, rule: str, amax_B: torch.Tensor, reduce: Reduce | None, seed: int | None = None) -> Coded:
    """`x` along features with the largest values of this rank's tokens; `seed`: round stochastically, by a place's own random bits."""
    amax, rule = amax_B if reduce is None else reduce(amax_B), rule_named(rule)
    if fused_fp8(x_BMK) and x_BMK.shape[-1] % GROUP == 0:
        from .triton_fp4_training import rows_fused

        return Coded(rows_fused(x_BMK.contiguous(), rule, amax, seed), amax, _span(rule))
    return of_packed(quantised_activation(x_BMK, rule, amax, seed))


def coded_tokens(x_BMK: torch.Tensor, rule: str, recipe: Recipe, amax_B: torch.Tensor, reduce: Reduce | None, seed: int | None = None) -> Coded:
    """`x` along tokens, turned where the recipe says so: values [B, M', K]. Random bits belong to places of the transposed sample."""
    amax, rule = amax_B if reduce is None else reduce(amax_B), rule_named(rule)
    if fused_fp8(x_BMK):
        from .triton_fp4_training import tokens_fused

        return Coded(tokens_fused(x_BMK.contiguous(), rule, amax, seed, recipe.hadamard), amax, _span(rule))
    packed = quantised_activation(turned(x_BMK, recipe), rule, amax, seed)
    return Coded(products(packed).transpose(1, 2), amax, _span(rule))


def turned(t_BMK: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """[B, K, M'] contiguous, along tokens: filled with zeros to whole blocks of 16, and turned by the Hadamard transform where the recipe says so."""
    rows = F.pad(t_BMK, (0, 0, 0, -t_BMK.shape[1] % SIZE)).transpose(1, 2).contiguous()
    return hadamard(rows) if recipe.hadamard else rows


def times(a: Coded, b: Coded, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """[B, M, N] in `dtype`: a b^T + bias, where `b` is a weight; sum, alpha and bias in float32."""
    batch, rows, inner = a.values.shape
    total = wide_product(a.values.reshape(batch * rows, inner), b.values).unflatten(0, (batch, rows))
    if fused_fp8(total):
        from .triton_fp4_training import end_fused

        return end_fused(total, a.amax, b.amax, (a.span, b.span), bias, dtype)
    total = total * (a.decode_scale * b.decode_scale)[:, None, None]
    return (total if bias is None else total + bias.to(torch.float32)).to(dtype)


def transposed_weight(packed: NVFP4, weight_NK: torch.Tensor | None, recipe: Recipe) -> Coded:
    """W^T [K, N]. Square tiles: the codes of W. Otherwise it is quantised from `weight_NK`; without it W's codes stay."""
    if packed.tile == GROUP or weight_NK is None:
        weight = of_packed(packed)
        return Coded(weight.values.t(), weight.amax, weight.span)
    return of_packed(quantised_weight(weight_NK.t().contiguous(), recipe.weight_rule, 1))


def input_gradient(
    dy_BMN: torch.Tensor,
    amax_B: torch.Tensor,
    packed: NVFP4,
    weight_NK: torch.Tensor | None,
    recipe: Recipe,
    seed: int,
    reduce: Reduce | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[B, M, K] in `dtype`: dy W. `amax_B`: of dy (`largest`)."""
    dy = coded(dy_BMN, recipe.gradient_rule, amax_B, reduce, seed if recipe.stochastic else None)
    return times(dy, transposed_weight(packed, weight_NK, recipe), None, dtype)


def weight_gradient(
    dy_BMN: torch.Tensor, x_BMK: torch.Tensor, amax_dy: torch.Tensor, amax_x: torch.Tensor, recipe: Recipe, seed: int, reduce: Reduce | None
) -> torch.Tensor:
    """float32 [N, K]: the sum over samples of dy^T x. `amax_*` [B]: of both turned along tokens (`largest`)."""
    dy = coded_tokens(dy_BMN, recipe.gradient_rule, recipe, amax_dy, reduce, seed if recipe.stochastic else None)
    x = coded_tokens(x_BMK, recipe.activation_rule, recipe, amax_x, reduce)
    samples = max(1, PART_BYTES // (4 * dy.values.shape[-1] * x.values.shape[-1]))
    total = None
    for start in range(0, len(dy.values), samples):
        pick = slice(start, start + samples)
        part = _summed(*(Coded(side.values[pick], side.amax[pick], side.span) for side in (dy, x)))
        total = part if total is None else total + part
    return total


def _summed(dy: Coded, x: Coded) -> torch.Tensor:
    """float32 [N, K]: the sum over B of dy^T x of values [B, M', N] and [B, M', K]."""
    shares = _shares(*dy.values.shape, x.values.shape[-1])
    parts = wide_products(*(side.values.unflatten(1, (shares, -1)).flatten(0, 1).transpose(1, 2) for side in (dy, x)))
    if fused_fp8(parts):
        from .triton_fp4_training import sum_fused

        return sum_fused(parts, dy.amax, x.amax, (dy.span, x.span))
    alpha = dy.decode_scale * x.decode_scale
    return (parts.unflatten(0, (-1, shares)).sum(1) * alpha[:, None, None]).sum(0)


def _shares(batch: int, tokens: int, rows: int, columns: int) -> int:
    """Into how many products of equal length the tokens of a sample are shared out, so that small weights keep a whole GPU busy."""
    tiles, shares = batch * -(-rows // TILE) * -(-columns // TILE), 1
    while tiles * shares < SHARES and tokens % (2 * shares) == 0 and tokens >= 2 * shares * SHARE_TOKENS:
        shares *= 2
    return shares
