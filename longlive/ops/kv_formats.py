"""Formats of cached keys and values: fp8, int8 and nvfp4, one page (the clean keys or values of one chunk) at a time.

The mean over the page's tokens is taken off each head before quantising, kept in float32, and added back on reading, so that what is kept does not depend on
any invariance of attention. Keys come unrotated: their channel means are stable there, while rotation would spin them (spec nvfp4 §4.5). Every
head has scales of its own, so that a rank which holds some of the heads keeps what a rank with all of them would.

    fp8     E4M3, one scale a head
    int8    one scale a head and 64 tokens
    nvfp4   groups of 16 channels of one token, one amax a head

Legend: B batch, L tokens of a page, H heads, d head features, b blocks of 64 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from ..core.errors import ConfigError
from . import nvfp4
from .fp8 import DTYPE, LARGEST, to_e4m3
from .packed import divided, finite_or_refuse

FORMATS = ("fp8", "int8", "nvfp4")
INT8_TOKENS, INT8_LARGEST = 64, 127.0


@dataclass(frozen=True, eq=False)
class QuantisedPage:
    """One page of keys or of values.

    codes   fp8: uint8 [B, L, H, d] (E4M3 bits) · int8: int8 [B, L, H, d] · nvfp4: uint8 [B, L, H, d / 2]
    scales  fp8: float32 [B, H] · int8: float32 [B, b, H] · nvfp4: uint8 [B, L, H, d / 16] (E4M3 bits)
    amax    nvfp4: float32 [B, H]; else None
    mean    float32 [B, H, d]
    """

    format: str
    codes: torch.Tensor
    scales: torch.Tensor
    amax: torch.Tensor | None
    mean: torch.Tensor
    rule: str | None = None

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parts that are there, by name: what a store keeps and a snapshot saves."""
        return {f.name: self.__dict__[f.name] for f in fields(self) if isinstance(self.__dict__[f.name], torch.Tensor)}


def token_mean(x_BLHd: torch.Tensor) -> torch.Tensor:
    """float32 [B, H, d], summed in float64: the same for any split of the heads and any order of tokens."""
    return x_BLHd.mean(1, dtype=torch.float64).to(torch.float32)


def quantise_page(x_BLHd: torch.Tensor, format: str, rule: str = "mse", *, on_nonfinite: str = "raise") -> QuantisedPage:
    """A page in `format`; `rule` is the scale rule of nvfp4 and means nothing to the others.

    Infinity or NaN: InputError, or with on_nonfinite "nan" NaN in (at least) the features of the head that had one, and no wait for a GPU.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format of cached keys and values {format!r}; use one of {', '.join(FORMATS)}")
    mean = token_mean(x_BLHd)
    rest = x_BLHd.to(torch.float32) - mean.unsqueeze(1)
    if format == "nvfp4":
        return _nvfp4(rest, mean, nvfp4.rule_named(rule), on_nonfinite)
    return (_fp8 if format == "fp8" else _int8)(rest, mean, on_nonfinite)


def page_scale(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """What a code is multiplied by: amax / largest; 1 where all is zero."""
    return torch.where(amax == 0, 1.0, divided(amax, largest).clamp(min=torch.finfo(torch.float32).tiny))


def _scale(amax: torch.Tensor, largest: float, on_nonfinite: str) -> torch.Tensor:
    finite_or_refuse(amax, on_nonfinite)
    return page_scale(amax, largest)


def _fp8(rest: torch.Tensor, mean: torch.Tensor, on_nonfinite: str) -> QuantisedPage:
    scale = _scale(rest.abs().amax((1, 3)), LARGEST, on_nonfinite)
    return QuantisedPage("fp8", to_e4m3(rest / scale[:, None, :, None]).view(torch.uint8), scale, None, mean)


def _int8(rest: torch.Tensor, mean: torch.Tensor, on_nonfinite: str) -> QuantisedPage:
    tokens = rest.shape[1]
    blocks = F.pad(rest, (0, 0, 0, 0, 0, -tokens % INT8_TOKENS)).unflatten(1, (-1, INT8_TOKENS))
    scale = _scale(blocks.abs().amax((2, 4)), INT8_LARGEST, on_nonfinite)
    codes = (rest / _by_token(scale, tokens)).round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8)
    return QuantisedPage("int8", codes, scale, None, mean)


def _by_token(scale_BbH: torch.Tensor, tokens: int) -> torch.Tensor:
    return scale_BbH.repeat_interleave(INT8_TOKENS, 1)[:, :tokens].unsqueeze(-1)


def _nvfp4(rest: torch.Tensor, mean: torch.Tensor, rule: str, on_nonfinite: str) -> QuantisedPage:
    packed = nvfp4.quantise(rest.transpose(1, 2), rule, on_nonfinite=on_nonfinite)
    codes, scales = (part.transpose(1, 2).contiguous() for part in (packed.codes, packed.scales))
    return QuantisedPage("nvfp4", codes, scales, packed.amax, mean, rule)


def dequantise_page(page: QuantisedPage, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[B, L, H, d]: code * scale + mean in float32, rounded once to `dtype`. Rotation, where wanted, comes after it and before the rounding."""
    if page.format == "fp8":
        rest = page.codes.view(DTYPE).to(torch.float32) * page.scales[:, None, :, None]
    elif page.format == "int8":
        rest = page.codes.to(torch.float32) * _by_token(page.scales, page.codes.shape[1])
    else:
        batch, tokens, heads, _ = page.codes.shape
        shape = (batch, heads, tokens, page.mean.shape[-1])
        codes, scales = page.codes.transpose(1, 2), page.scales.transpose(1, 2)
        rest = nvfp4.NVFP4(codes, scales, page.amax, page.rule, 1, shape, torch.float32).dequantise().transpose(1, 2)
    return (rest + page.mean.unsqueeze(1)).to(dtype)
