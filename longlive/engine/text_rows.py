"""Prompts of a chunk -> rows of the text context, encoding each text once and keeping only what the chunk needs.

Row 0 is the negative prompt when guidance is on; the others are the distinct prompts of the batch. The context (and with it every layer's keys
and values) is kept for as long as the same prompts are shown.
"""

from __future__ import annotations

import torch


class TextRows:
    """`negative` None: no guidance. Embeddings are kept for the prompts of the latest chunk only, so that memory does not grow."""

    def __init__(self, dit, encoder, negative: str | None):
        self.dit, self.encoder, self.negative = dit, encoder, negative
        self.embeds: dict[str, torch.Tensor] = {}
        self.context = None

    @torch.no_grad()
    def rows(self, prompts_B: list[str]) -> tuple[object, list[int], int | None]:
        """(TextContext, row per sample, row of the negative prompt or None)."""
        head = [] if self.negative is None else [self.negative]
        texts = list(dict.fromkeys([*head, *prompts_B]))
        if texts != list(self.embeds):
            new = [text for text in texts if text not in self.embeds]
            made = dict(zip(new, self.encoder.encode(new))) if new else {}
            self.embeds = {text: self.embeds[text] if text in self.embeds else made[text] for text in texts}
            self.context = self.dit.text(list(self.embeds.values()))
        return self.context, [texts.index(p) for p in prompts_B], 0 if head else None
