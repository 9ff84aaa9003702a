"""Adapters with random numbers for the toy transformer."""

from dataclasses import replace

import torch
from dit_toys import COLUMNS, DIMS, FRAMES, ROWS, ask, toy_dit, toy_noise, toy_prompts

from longlive.cache.attend import Full
from longlive.core.tokens import Tokens
from longlive.models.lora import Adapter, LoraLayer, lora_layers
from longlive.models.spec import TINY

SPEC = replace(TINY, name="toy", dit=DIMS)


def toy_adapter(name="toy", rank=3, alpha=6.0, seed=5, only="", dtype=torch.float64):
    """Random A and B (not zero) on every layer whose name contains `only`."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer, module in lora_layers(toy_dit(), SPEC).items():
        a_RI, b_OR = (0.3 * torch.randn(shape, generator=generator) for shape in ((rank, module.in_features), (module.out_features, rank)))
        if only in layer:
            layers[layer] = LoraLayer(a_RI=a_RI.to(dtype), b_OR=b_OR.to(dtype), alpha=alpha)
    return Adapter(name=name, layers=layers)


def velocity(dit, text=None):
    """What the toy transformer says about one fixed input, with all of its tokens in sight."""
    frames = FRAMES
    tokens = Tokens(
        torch.arange(frames, dtype=torch.float64)[None],
        torch.zeros(frames, dtype=torch.int64),
        torch.zeros(frames, dtype=torch.bool),
        torch.zeros(1, 1, dtype=torch.int64),
        ROWS,
        COLUMNS,
    )
    dtype = next(dit.parameters()).dtype
    z_BFCHW = toy_noise(1, 1)[:, 0].to(dtype)
    text = text or dit.text([prompt.to(dtype) for prompt in toy_prompts(1)])
    return ask(dit, z_BFCHW, tokens, torch.full((1, frames), 0.4), text, Full(tokens, DIMS.head_dim))
