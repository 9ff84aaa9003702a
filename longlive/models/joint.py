"""Projections of one input side by side in memory, so that one product computes them all (`ops.linear.joint_linear`).

The step comes last when a generator is loaded: layers that were quantised, or that have LoRA beside them, are left as they are. Names and values of
parameters do not change; a later move to another device separates them again, which costs speed and nothing else.
"""

from __future__ import annotations

from ..ops.linear import is_plain, lay_side_by_side
from .wan_dit import WanDiT


def join_projections(dit: WanDiT) -> int:
    """Lays q, k and v of every self-attention side by side where all three are plain linear layers; returns in how many blocks."""
    joined = 0
    for block in dit.blocks:
        layers = [block.self_attn.q, block.self_attn.k, block.self_attn.v]
        if all(map(is_plain, layers)):
            lay_side_by_side(layers)
            joined += 1
    return joined
