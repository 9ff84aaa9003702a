"""Forwards of few shapes at fixed addresses: recorded once as CUDA graphs, then replayed with one launch each.

A rollout repeats a handful of forwards: denoise or commit, with one to `pages` filled slots. What differs from one to the next is data: tokens, noise level,
prompt rows, slot index, angles, the text's keys and values. It is copied into tensors that stay where they are; pages do not move anyway. The first forward of
a shape runs as it is, the second is recorded. Elsewhere than on a GPU nothing is recorded and the same tensors are used.

What is recorded is dropped when LoRA branches come, go or change between on and off, since that decides which kernels run. A quantised store writes in
commits only, which are recordings of their own; where it writes to and which pages it keeps in full is data too.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Protocol

import torch

from ..cache.attend import STORES
from ..cache.coded import CodedPages
from ..cache.pages import Pages
from ..cache.quantised import QuantisedPages
from ..core.tokens import Tokens
from ..models.lora import branches
from ..models.wan_dit import NoiseLevels, TextContext, WanDiT

TEXT_ROOM = 64  # keys of the text in fixed memory come in multiples


class Recordable(Protocol):
    """Attention to pages that stay where they are. Two of equal `variant` differ by the tensors (pairs of tensors, or None) in the attributes `places`."""

    places: tuple[str, ...]
    pages: Pages | QuantisedPages | CodedPages

    @property
    def variant(self) -> tuple: ...

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None: ...


def tensors_of(attend: Recordable) -> list[torch.Tensor]:
    """All tensors of its places, in order."""
    found = []
    for name in attend.places:
        value = getattr(attend, name)
        found += [] if value is None else [value] if isinstance(value, torch.Tensor) else list(value)
    return found


class FixedText(TextContext):
    """A text context with room for `keys` keys a row, whose contents are copied from others. Keys without text have a bias of -inf."""

    def __init__(self, dit: WanDiT, text: TextContext, keys: int):
        bias_RM = torch.full((text.prompts, keys), -torch.inf, device=text.bias_RM.device)
        super().__init__(text.raw_RMt, text.text_RMD, bias_RM, dit.text_stamp())
        self.dit, self._source = dit, (None, -1)
        dims, like = dit.dims, text.text_RMD
        shape = (text.prompts, keys, dims.heads, dims.head_dim)
        self._kept = {layer: (like.new_zeros(shape), like.new_zeros(shape)) for layer in range(dims.layers)}

    def take(self, text: TextContext) -> None:
        """Copies rows, biases, keys and values, unless they are here already."""
        stamp = self.dit.text_stamp()
        if self._source[0] is text and self._source[1] == stamp:
            return
        text.refresh(self.dit)
        self.dit.text_keys_values(text)
        used = text.bias_RM.shape[1]
        self.bias_RM.fill_(-torch.inf)
        self.bias_RM[:, :used] = text.bias_RM
        for layer, fixed in self._kept.items():
            for mine, theirs in zip(fixed, text.kept(layer)):
                mine[:, :used] = theirs
        self.raw_RMt, self.text_RMD, self._stamp = text.raw_RMt, text.text_RMD, stamp
        self._source = (text, stamp)


class FixedForward:
    """A forward of one shape with inputs of its own."""

    def __init__(self, dit: WanDiT, x_BNc: torch.Tensor, tokens: Tokens, levels: NoiseLevels, text: FixedText, attend: Recordable, until: str):
        self.dit, self.text, self.until = dit, text, until
        self.x_BNc, self.levels = torch.empty_like(x_BNc), NoiseLevels(*(torch.empty_like(t) for t in levels))
        self.tokens = replace(tokens, prompt_BG=torch.empty_like(tokens.prompt_BG))
        self.attend = copy.copy(attend)
        for name in attend.places:
            value = getattr(attend, name)
            setattr(self.attend, name, value.clone() if isinstance(value, torch.Tensor) else value and tuple(t.clone() for t in value))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: torch.Tensor | None = None
        self.runs = 0

    def load(self, x_BNc: torch.Tensor, tokens: Tokens, levels: NoiseLevels, attend: Recordable) -> None:
        """Copies the inputs to where they are read, those of one type together."""
        pairs = [(self.x_BNc, x_BNc), (self.tokens.prompt_BG, tokens.prompt_BG), *zip(self.levels, levels), *zip(tensors_of(self.attend), tensors_of(attend))]
        for dtype in dict.fromkeys(mine.dtype for mine, _ in pairs):
            torch._foreach_copy_(*map(list, zip(*(pair for pair in pairs if pair[0].dtype == dtype))))

    def run(self, pool) -> torch.Tensor | None:
        """The forward on what was loaded. `pool`: memory that recordings share; None: never record."""
        self.runs += 1
        if pool is None or self.runs == 1:
            return self._forward()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.out = self._forward()
        self.graph.replay()
        return None if self.out is None else self.out.clone()  # the next recording may use this memory

    def _forward(self) -> torch.Tensor | None:
        return self.dit(self.x_BNc, self.tokens, self.levels, self.text, self.attend, self.until)


class FixedForwards:
    """Called as the network is, with the same result. `begin` before each chunk."""

    def __init__(self, dit: WanDiT, device: torch.device):
        self.dit, self.records = dit, device.type == "cuda"
        self.pool = self._fresh_pool()
        self.forwards: dict[tuple, FixedForward] = {}
        self.texts: dict[tuple[int, int], FixedText] = {}
        self._branches: list[tuple[str, str, bool]] = []

    def begin(self) -> None:
        """Forgets what was recorded if other LoRA branches take part than before."""
        found = [(name, branch.adapter, branch.live) for name, branch in branches(self.dit)]
        if found != self._branches:
            self.forwards.clear()
            self._branches, self.pool = found, self._fresh_pool()

    def _fresh_pool(self):
        """Memory for recordings. CUDA gives a pool up with its last recording, and its name may not be used again."""
        return torch.cuda.graph_pool_handle() if self.records else None

    def __call__(self, x_BNc: torch.Tensor, tokens: Tokens, levels: NoiseLevels, text: TextContext, attend: Recordable, until: str) -> torch.Tensor | None:
        if type(attend.pages) not in STORES or torch.is_grad_enabled():
            return self.dit(x_BNc, tokens, levels, text, attend, until)
        keys = -(-text.bias_RM.shape[1] // TEXT_ROOM) * TEXT_ROOM
        room = text.prompts, keys
        if room not in self.texts:
            self.texts[room] = FixedText(self.dit, text, keys)
        self.texts[room].take(text)
        shapes = tuple(t.shape for t in (x_BNc, tokens.prompt_BG, *levels, *tensors_of(attend)))
        key = until, room, id(attend.pages), attend.variant, shapes
        if key not in self.forwards:
            self.forwards[key] = FixedForward(self.dit, x_BNc, tokens, levels, self.texts[room], attend, until)
        forward = self.forwards[key]
        forward.load(x_BNc, tokens, levels, attend)
        return forward.run(self.pool)
