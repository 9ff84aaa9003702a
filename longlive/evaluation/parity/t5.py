"""Recomputes the recorded text encoder pass through transformers, with the published key names."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import NotAvailable
from ...models.umt5 import real_rows, share_embedding, umt5_config, umt5_model
from ...models.weights import StateFile, load_into, native_state
from .entries import Entry


@torch.no_grad()
def run(entry: Entry) -> dict[str, Tensor]:
    """`context`: the rows of real tokens, padding rows zero. Rows of padding before zeroing (`raw`) are not computed: they carry no meaning."""
    unknown = [name for name in entry.wanted if name != "context"]
    if unknown:
        raise NotAvailable(f"the text encoder output {unknown[0]!r}", "known is context")
    sizes = entry.config["t5"]
    if sizes.get("shared_pos"):
        raise NotAvailable("a text encoder with one position bias for all layers", "UMT5 has one per layer")
    config = umt5_config(
        vocab=sizes["vocab"], dim=sizes["dim"], attention=sizes["dim_attn"], ffn=sizes["dim_ffn"],
        heads=sizes["num_heads"], layers=sizes["num_layers"], buckets=sizes["num_buckets"],
    )  # fmt: skip
    model = umt5_model(config)
    load_into(model, native_state(StateFile(tensors=dict(entry.weights["t5"])), "text"), kind="text")
    rows = real_rows(share_embedding(model), entry.inputs["ids"], entry.inputs["mask"])
    context = torch.zeros(*entry.inputs["ids"].shape, sizes["dim"])
    for i, row in enumerate(rows):
        context[i, : len(row)] = row
    return {"context": context}
