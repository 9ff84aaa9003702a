"""Prompts -> embeddings. One protocol, two encoders: `HashedWords` (the small model, no weights) and `UMT5Encoder` (Wan2.2, see umt5.py).

The one idea: an encoder hands out only the rows of real tokens, one tensor per prompt; padding is the DiT's business, which folds it exactly.
`PromptCache` wraps any encoder, so that each distinct prompt is encoded once.

Legend: n real tokens of one prompt, D text_dim, W words, G neighbours. Embeddings are float32 [n, D] with 0 <= n <= text_len.
"""

from __future__ import annotations

import html
import re
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.log import warn_once
from .spec import ModelSpec

TOKEN = re.compile(r"\w+|[^\w\s]")
NEIGHBOURS = (-2, -1, 0, 1, 2)
KEPT_PROMPTS = 64  # at most half a gigabyte of the 5B model's embeddings


class TextEncoder(Protocol):
    """`encode` returns one [n_i, text_dim] tensor per prompt, n_i = its real tokens (0 for an empty prompt), in the order given."""

    text_dim: int
    text_len: int

    def encode(self, prompts: list[str]) -> list[Tensor]: ...

    def to(self, device=None, dtype: torch.dtype | None = None) -> "TextEncoder": ...


def clean_text(text: str) -> str:
    """The cleaning before tokenising (spec inference §4): repair encoding, unescape HTML twice, strip, collapse white space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def fnv1a(word: str) -> int:
    """64-bit FNV-1a of the word's UTF-8 bytes: the same number on every platform."""
    value = 0xCBF29CE484222325
    for byte in word.encode("utf-8", "surrogatepass"):
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 finaliser on uint64 (wraps around)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_vectors(words: list[str], dim: int) -> np.ndarray:
    """[W, dim] float32: approximately normal, zero mean and unit variance, a function of the word alone.

    Each number is the sum of the four 16-bit quarters of a 64-bit hash: exact integers, so every platform agrees to the bit.
    """
    seeds = np.array([fnv1a(word) for word in words], dtype=np.uint64)[:, None]
    steps = np.arange(1, dim + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = splitmix64(seeds + steps)
    quarters = sum(((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48))
    spread = (4 / 12) ** 0.5 * 65536
    return ((quarters - 2 * 65535) / spread).astype(np.float32)


class HashedWords:
    """The small model's text encoder: each word is the hashed vectors of itself and its neighbours, no weights, open vocabulary.

    `text_dim` = 5 x width; row i holds words i-2 ... i+2, `width` numbers each, zeros beyond the ends. Words are lower-cased, punctuation marks are words
    of their own. Prompts longer than `text_len` words are cut, with one warning.
    """

    def __init__(self, text_dim: int, text_len: int):
        if text_dim % len(NEIGHBOURS):
            raise InputError(f"text_dim {text_dim} is not a multiple of {len(NEIGHBOURS)} (one part per neighbour); use {text_dim // 5 * 5 or 5}")
        self.text_dim, self.text_len = text_dim, text_len

    def words(self, prompt: str) -> list[str]:
        words = TOKEN.findall(clean_text(prompt).lower())
        if len(words) > self.text_len:
            warn_once(f"a prompt has {len(words)} words; this text encoder reads the first {self.text_len}")
        return words[: self.text_len]

    def to(self, device=None, dtype: torch.dtype | None = None) -> "HashedWords":
        """There are no weights to move."""
        return self

    def encode(self, prompts: list[str]) -> list[Tensor]:
        return [self._embed(self.words(prompt)) for prompt in prompts]

    def _embed(self, words: list[str]) -> Tensor:
        if not words:
            return torch.zeros(0, self.text_dim)
        width, reach = self.text_dim // len(NEIGHBOURS), max(NEIGHBOURS)
        padded = np.zeros((len(words) + 2 * reach, width), dtype=np.float32)
        padded[reach:-reach] = hash_vectors(words, width)
        return torch.from_numpy(np.concatenate([padded[reach + o : reach + o + len(words)] for o in NEIGHBOURS], axis=1))


class PromptCache:
    """Any text encoder, remembering the embeddings of the last `size` distinct prompts. Repeats within one call are encoded once."""

    def __init__(self, encoder: TextEncoder, size: int = KEPT_PROMPTS):
        self.encoder, self.size = encoder, size
        self.text_dim, self.text_len = encoder.text_dim, encoder.text_len
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def to(self, device=None, dtype: torch.dtype | None = None) -> "PromptCache":
        """Moves the encoder in place and forgets what it said elsewhere."""
        self._kept.clear()
        self.encoder.to(device=device, dtype=dtype)
        return self

    def encode(self, prompts: list[str]) -> list[Tensor]:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        found = dict(zip(missing, self.encoder.encode(missing), strict=True)) if missing else {}
        for prompt in prompts:
            found.setdefault(prompt, self._kept.get(prompt))
            self._kept[prompt] = found[prompt]
            self._kept.move_to_end(prompt)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return [found[prompt] for prompt in prompts]


def text_encoder(spec: ModelSpec, *, folder: str | Path | None = None, device=None, dtype: torch.dtype | None = None) -> PromptCache:
    """The text encoder of a model, behind a prompt cache. `folder` defaults to where the spec says its files belong."""
    if spec.text_kind == "hashed-words":
        return PromptCache(HashedWords(spec.dit.text_dim, spec.dit.text_len))
    if spec.text_kind == "umt5-xxl":
        from .umt5 import UMT5Encoder

        return PromptCache(UMT5Encoder(folder or spec.folder, text_len=spec.dit.text_len, device=device, dtype=dtype))
    raise InputError(f"unknown text encoder {spec.text_kind!r} (known: hashed-words, umt5-xxl)")
