"""The Wan2.2 diffusion transformer: velocity = dit(x, tokens, sigma, text, attend).

One device, one forward, no switches. Whatever separates training, a chunk-by-chunk rollout and a forward over several devices comes in
as `attend`: a callable that receives normalised, unrotated q, k, v of a layer and returns what the queries read. The noise level
comes in per frame, the text as rows of keys and values, one row per prompt. (Spec inference §1.)

Legend: B batch, F latent frames, N tokens, c = 4 C token features, D model features, H heads, d head features,
G groups of consecutive tokens that share a noise level or a prompt, R prompts (rows of text), M text keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..core.errors import InputError
from ..core.geometry import PATCH
from ..core.tokens import Tokens
from ..ops.heads import Heads, attend_heads
from ..ops.linear import joint_linear, linear_gelu
from ..ops.norm import rms_norm
from ..ops.residual import add_gated, add_norm, add_norm_modulate, norm_modulate
from ..ops.text_attention import text_attention
from .spec import DiTDims

KeysValues = tuple[torch.Tensor, torch.Tensor]
TEXT_BUCKET = 16


class Attend(Protocol):
    """Self-attention of one layer: q, k, v [B, N, H, d] unrotated in, [B, N, H, d] out. `q` None: take k and v in, return None."""

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None: ...


class RMSNorm(nn.Module):
    """RMS norm over all heads at once, with a learned weight [D]."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class PatchEmbedding(nn.Module):
    """Linear from a 2x2 square of latent pixels to D; the weight keeps the shape [D, C, 1, 2, 2] of the published convolution."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, channels, 1, PATCH, PATCH))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x_BNc: torch.Tensor) -> torch.Tensor:
        return F.linear(x_BNc.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Projections(nn.Module):
    """q, k, v, o with RMS-normalised q and k: the parameters of one attention, whoever attends."""

    def __init__(self, dims: DiTDims):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dims.dim, dims.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dims.dim, dims.eps), RMSNorm(dims.dim, dims.eps)
        self.head_dim = dims.head_dim

    def queries(self, x_BND: torch.Tensor) -> torch.Tensor:
        """[B, N, H, d]"""
        return self.norm_q(self.q(x_BND)).unflatten(-1, (-1, self.head_dim))

    def keys_values(self, x_BMD: torch.Tensor) -> KeysValues:
        """([B, M, H, d], [B, M, H, d])"""
        k = self.norm_k(self.k(x_BMD)).unflatten(-1, (-1, self.head_dim))
        return k, self.v(x_BMD).unflatten(-1, (-1, self.head_dim))


class SelfAttention(Projections):
    def readers(self, keys_only: bool) -> tuple[nn.Module, ...]:
        """The layers that read the input."""
        return (self.k, self.v) if keys_only else (self.q, self.k, self.v)

    def forward(self, h_BND: torch.Tensor, attend: Attend, layer: int, keys_only: bool) -> torch.Tensor | None:
        layers = self.readers(keys_only)
        q_BND, k_BND, v_BND = [None] * (3 - len(layers)) + joint_linear(h_BND, *layers)
        heads = Heads(q_BND, k_BND, v_BND, self.norm_q.weight, self.norm_k.weight, self.norm_q.eps, self.head_dim)
        read = attend_heads(attend, heads, layer)
        return None if keys_only else self.o(read.flatten(2))


class CrossAttention(Projections):
    def forward(self, h_BND: torch.Tensor, prompt_BG: torch.Tensor, kv: KeysValues, bias_RM: torch.Tensor) -> torch.Tensor:
        """Each of the G groups of N / G consecutive tokens reads the row of `kv` that `prompt_BG` names."""
        q = self.queries(h_BND).unflatten(1, (prompt_BG.shape[1], -1)).flatten(0, 1)
        return self.o(text_attention(q, *kv, bias_RM, prompt_BG.flatten()).flatten(2).unflatten(0, prompt_BG.shape).flatten(1, 2))


class Norm3(nn.Module):
    """Layer norm with weight and bias, before cross-attention, of the sum that goes on."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x_BND: torch.Tensor, y_BND: torch.Tensor, gate_BGD: torch.Tensor, reader: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + gate * y, its norm as `reader` takes it)"""
        return add_norm(x_BND, y_BND, gate_BGD, self.weight, self.bias, self.eps, (reader,))


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self, dims: DiTDims):
        super().__init__(nn.Linear(dims.dim, dims.ffn), nn.GELU("tanh"), nn.Linear(dims.ffn, dims.dim))

    def forward(self, h_BND: torch.Tensor) -> torch.Tensor:
        return self[2](linear_gelu(h_BND, self[0], self[2]))


class Block(nn.Module):
    """Modulated self-attention, cross-attention to the text, modulated feed-forward."""

    def __init__(self, dims: DiTDims):
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 6, dims.dim))
        self.self_attn = SelfAttention(dims)
        self.norm3 = Norm3(dims.dim, dims.eps)
        self.cross_attn = CrossAttention(dims)
        self.ffn = FeedForward(dims)
        self.eps = dims.eps

    def forward(
        self,
        x_BND: torch.Tensor,
        level_BG6D: torch.Tensor,
        prompt_BG: torch.Tensor,
        text_RMD: torch.Tensor,
        bias_RM: torch.Tensor,
        kv: KeysValues | None,
        attend: Attend,
        layer: int,
        keys_only: bool = False,
    ) -> tuple[torch.Tensor, KeysValues | None]:
        """The next x, and the text's keys and values (`kv`, or made here from `text_RMD`). `keys_only`: x is left as it is."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (self.modulation.unsqueeze(1) + level_BG6D).unbind(2)
        read = self.self_attn(norm_modulate(x_BND, shift, scale, self.eps, self.self_attn.readers(keys_only)), attend, layer, keys_only)
        if keys_only:
            return x_BND, kv
        if kv is None:
            kv = self.cross_attn.keys_values(text_RMD)
        x_BND, h_BND = self.norm3(x_BND, read, gate, self.cross_attn.q)
        read = self.cross_attn(h_BND, prompt_BG, kv, bias_RM)
        x_BND, h_BND = add_norm_modulate(x_BND, read, shift_ff, scale_ff, self.eps, (self.ffn[0],))
        return add_gated(x_BND, self.ffn(h_BND), gate_ff), kv


class Head(nn.Module):
    """Modulated norm and a Linear to the 4 C features of a token."""

    def __init__(self, dims: DiTDims):
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(1, 2, dims.dim))
        self.head = nn.Linear(dims.dim, dims.channels * PATCH**2)
        self.eps = dims.eps

    def forward(self, x_BND: torch.Tensor, level_BGD: torch.Tensor) -> torch.Tensor:
        shift, scale = (self.modulation.unsqueeze(1) + level_BGD.unsqueeze(2)).unbind(2)
        return self.head(norm_modulate(x_BND, shift, scale, self.eps))


class TextContext:
    """Text for the cross-attention of every layer, one row per prompt.

    raw_RMt    the encoder's vectors, zero where a row has no more tokens
    text_RMD   their projection; a zero row projects to the vector that every padding key shares
    bias_RM    float32: 0 on real keys, log of the padding count on the key (or two) that stands for all padding, -inf elsewhere
    With gradients off each layer's keys and values are made once and kept, until the weights they came from change.
    """

    def __init__(self, raw_RMt: torch.Tensor, text_RMD: torch.Tensor, bias_RM: torch.Tensor, stamp: int):
        self.raw_RMt, self.text_RMD, self.bias_RM = raw_RMt, text_RMD, bias_RM
        self._stamp = stamp
        self._kept: dict[int, KeysValues] = {}

    @property
    def prompts(self) -> int:
        return self.raw_RMt.shape[0]

    def select(self, rows: torch.Tensor) -> "TextContext":
        """The rows that the int64 tensor names, in its order, as a context of its own."""
        return TextContext(self.raw_RMt[rows], self.text_RMD[rows], self.bias_RM[rows], self._stamp)

    def kept(self, layer: int) -> KeysValues | None:
        """The layer's keys and values [R, M, H, d] if they were kept; never with gradients on."""
        return None if torch.is_grad_enabled() else self._kept.get(layer)

    def keep(self, layer: int, kv: KeysValues | None) -> None:
        if kv is not None and not torch.is_grad_enabled():
            self._kept[layer] = kv

    def refresh(self, dit: "WanDiT") -> None:
        """Projects again and forgets what was kept when `dit`'s text weights have changed since. Does nothing with gradients on."""
        if torch.is_grad_enabled() or self._stamp == (stamp := dit.text_stamp()):
            return
        self.text_RMD, self._stamp = dit.text_embedding(self.raw_RMt), stamp
        self._kept.clear()


def padding_biases(count: int) -> tuple[float, float]:
    """Two biases with exp(first) + exp(second) = `count` identical keys.

    One key with bias log(count) could stand for them all, but bfloat16 would round it by up to 1.6 % of the weight. So the first bias
    is exact in bfloat16 and a second key carries the small rest.
    """
    if count <= 0:
        return -math.inf, -math.inf
    first = torch.tensor(math.log(count), dtype=torch.bfloat16)
    if first.item() > math.log(count):
        first = torch.nextafter(first, torch.tensor(-math.inf, dtype=torch.bfloat16))
    rest = count - math.exp(first.item())
    return first.item(), math.log(rest) if rest > 0 else -math.inf


def text_rows(embeds: list[torch.Tensor], dims: DiTDims, dtype: torch.dtype, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """raw_RMt in `dtype` and bias_RM float32 of prompts given as vectors [n_i, text_dim], on the device of the first of them.

    The published model pads every prompt to `text_len` zero vectors and attends to all of them. Those keys are equal, so one key
    with a bias of log(count) is exactly as good (spec inference §11.A.4). `width`: M, at least two more than the longest prompt; None: as few as there may be.
    """
    longest = max(len(e) for e in embeds)
    if longest > dims.text_len:
        raise InputError(f"a prompt of {longest} tokens is longer than text_len({dims.text_len}); shorten it or cut it off")
    width = width or min(-(-(longest + 2) // TEXT_BUCKET) * TEXT_BUCKET, max(dims.text_len, longest + 2))
    raw = torch.zeros(len(embeds), width, dims.text_dim, dtype=dtype, device=embeds[0].device)
    bias = torch.full((len(embeds), width), -math.inf)
    for row, vectors in enumerate(embeds):
        n = len(vectors)
        raw[row, :n] = vectors.to(raw)
        bias[row, :n] = 0.0
        bias[row, n : n + 2] = torch.tensor(padding_biases(dims.text_len - n))
    return raw, bias.to(raw.device)


class NoiseLevels(NamedTuple):
    """What a forward needs of its noise levels, made once for several forwards by `WanDiT.levels`: for the head and for the blocks."""

    e_BGD: torch.Tensor
    level_BG6D: torch.Tensor


class WanDiT(nn.Module):
    """The Wan2.2 DiT of the given sizes; parameters are named as published (spec inference §1.2)."""

    def __init__(self, dims: DiTDims):
        super().__init__()
        if dims.dim % dims.heads or dims.head_dim % 2:
            raise InputError(f"dim({dims.dim}) / heads({dims.heads}) must be a whole, even head size; change one of the two")
        self.dims = dims
        self.patch_embedding = PatchEmbedding(dims.channels, dims.dim)
        self.text_embedding = nn.Sequential(nn.Linear(dims.text_dim, dims.dim), nn.GELU("tanh"), nn.Linear(dims.dim, dims.dim))
        self.time_embedding = nn.Sequential(nn.Linear(dims.freq_dim, dims.dim), nn.SiLU(), nn.Linear(dims.dim, dims.dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dims.dim, 6 * dims.dim))
        self.blocks = nn.ModuleList(Block(dims) for _ in range(dims.layers))
        self.head = Head(dims)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights for a training from scratch: Xavier for Linears, small normals for embeddings and modulation, zero head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1), generator=generator)
        nn.init.zeros_(self.patch_embedding.bias)
        for module in (self.text_embedding, self.time_embedding):
            nn.init.normal_(module[0].weight, std=0.02, generator=generator)
            nn.init.normal_(module[2].weight, std=0.02, generator=generator)
        for module in (*self.blocks, self.head):
            nn.init.normal_(module.modulation, std=self.dims.dim**-0.5, generator=generator)
        nn.init.zeros_(self.head.head.weight)

    def forward(
        self,
        x_BNc: torch.Tensor,
        tokens: Tokens,
        sigma_BG: torch.Tensor | NoiseLevels,
        text: TextContext,
        attend: Attend,
        until: Literal["velocity", "kv"] = "velocity",
    ) -> torch.Tensor | None:
        """Velocity (noise - clean) [B, N, c] in the weights' dtype.

        `sigma_BG` in [0, 1], float32 or float64: one noise level per latent frame (G = F), or per any G equal groups of consecutive
        tokens; or what `levels` made of them. `text` comes from `self.text`; `tokens.prompt_BG` picks its rows. `until="kv"` ends as soon
        as the last layer's keys and values are with `attend`, and returns None.
        """
        text.refresh(self)
        x = self.patch_embedding(x_BNc)
        e_BGD, level = sigma_BG if isinstance(sigma_BG, NoiseLevels) else self.levels(sigma_BG)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            keys_only = until == "kv" and layer == last
            x, kv = block(x, level, tokens.prompt_BG, text.text_RMD, text.bias_RM, text.kept(layer), attend, layer, keys_only=keys_only)
            text.keep(layer, kv)
        return None if until == "kv" else self.head(x, e_BGD)

    def levels(self, sigma_BG: torch.Tensor) -> NoiseLevels:
        """Embeddings of noise levels; good for as long as `level_stamp` is the same."""
        e_BGD = self.noise_level(sigma_BG)
        return NoiseLevels(e_BGD, self.time_projection(e_BGD).unflatten(-1, (6, -1)))

    def level_stamp(self) -> int:
        """A number that changes whenever a weight behind `levels` is written in place."""
        return _versions((self.time_embedding, self.time_projection))

    def noise_level(self, sigma_BG: torch.Tensor) -> torch.Tensor:
        """Embedding [B, G, D] of t = 1000 sigma; the sinusoids in float64 (float32 is too coarse near t = 1000)."""
        half = self.dims.freq_dim // 2
        j = torch.arange(half, dtype=torch.float64, device=sigma_BG.device)
        angle = 1000.0 * sigma_BG.to(torch.float64).unsqueeze(-1) * 10000.0 ** (-j / half)
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.time_embedding(waves.to(self.patch_embedding.weight.dtype))

    def text(self, embeds: list[torch.Tensor]) -> TextContext:
        """TextContext with one row per prompt from the encoder's vectors [n_i, text_dim], real tokens only (0 <= n_i <= text_len)."""
        weight = self.patch_embedding.weight
        raw_RMt, bias_RM = text_rows(embeds, self.dims, weight.dtype)
        return self.text_context(raw_RMt.to(weight.device), bias_RM.to(weight.device))

    def text_context(self, raw_RMt: torch.Tensor, bias_RM: torch.Tensor) -> TextContext:
        """TextContext from rows that `text_rows` laid out, on the weights' device."""
        return TextContext(raw_RMt, self.text_embedding(raw_RMt), bias_RM, self.text_stamp())

    def text_keys_values(self, text: TextContext) -> None:
        """Makes every layer's keys and values of `text` that are not kept yet. Gradients must be off."""
        for layer, block in enumerate(self.blocks):
            if text.kept(layer) is None:
                text.keep(layer, block.cross_attn.keys_values(text.text_RMD))

    def text_stamp(self) -> int:
        """A number that changes whenever a weight (or buffer) behind the text's keys and values is written in place."""
        modules = [self.text_embedding]
        for block in self.blocks:
            modules += [block.cross_attn.k, block.cross_attn.v, block.cross_attn.norm_k]
        return _versions(modules)


def _versions(modules: Iterable[nn.Module]) -> int:
    return sum(t._version for m in modules for t in (*m.parameters(), *m.buffers()) if not t.is_inference())
