"""Recomputes merges of a LoRA into the weights of a generator.

The recording in bfloat16 is of the published script, which rounds the adapter, the product and the sum one after the other (`stepwise`); our own merges
round once. In float32 both are the same sum.
"""

from __future__ import annotations

import torch

from ...models.lora_files import adapter_from
from ...models.lora_merge import merge_weight
from .entries import Entry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(entry: Entry) -> dict[str, torch.Tensor]:
    """The wanted merged weights of a `lora_merge` file, by their name in the generator."""
    section, dtype = entry.config["adapter"], DTYPES[entry.config["dtype"]]
    adapter = adapter_from(entry.inputs, entry.name).with_alpha(section["alpha"] or section["rank"])
    base = entry.weights["dit"]
    return {name: merge_weight(base[name], [(adapter.layers[name.removesuffix(".weight")], 1.0)], dtype, stepwise=True) for name in entry.wanted}
