"""Classifier-free guidance: a second branch with the negative prompt and its own memory, and one line of arithmetic.

v = v_negative + scale (v_prompt - v_negative). A scale of 1 means no second branch. (Spec inference §3.5.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.errors import InputError


@dataclass(frozen=True)
class Branches:
    """How the model is asked: `passes` lists of prompt rows, one forward each; a pass repeats the batch `repeats` times."""

    passes: tuple[tuple[int, ...], ...]
    repeats: int
    scale: float

    def combine(self, velocities: list[torch.Tensor]) -> torch.Tensor:
        """The guided velocity [B, ...] from the output of every pass [repeats * B, ...]."""
        branches = [half for v in velocities for half in v.chunk(self.repeats)]
        if len(branches) == 1:
            return branches[0]
        prompt, negative = (b.to(torch.float32) for b in branches)
        return negative + self.scale * (prompt - negative)


def branches(prompt_B: list[int], negative: int | None, scale: float, batched: bool) -> Branches:
    """The branches for prompts `prompt_B` (rows of the text) and the negative prompt's row. `batched`: both in one forward."""
    if scale == 1.0:
        return Branches((tuple(prompt_B),), 1, scale)
    if negative is None:
        raise InputError(f"guidance_scale({scale}) != 1 needs a negative prompt; give one (it may be empty) or set guidance_scale to 1")
    against = (negative,) * len(prompt_B)
    if batched:
        return Branches(((*prompt_B, *against),), 2, scale)
    return Branches((tuple(prompt_B), against), 1, scale)
