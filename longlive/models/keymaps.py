"""Key names of other layouts -> ours. Each layout is a short table of renamings, applied in order; None drops a key.

Ours are the published LongLive/Wan names (spec inference §1.2, §5.1). Known others: the diffusers folder layout (WanTransformer3DModel,
AutoencoderKLWan, also used by LightVAE files, spec §5.5), wrappers of training frameworks, and the wrapper prefix `model.` of published generators.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

FSDP = "_fsdp_wrapped_module."
WRAPPERS = (FSDP, "_checkpoint_wrapped_module.", "_orig_mod.")

DIT = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
)

VAE = (
    (r"^post_quant_conv\.", "conv2."),
    (r"^quant_conv\.", "conv1."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0.residual."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2.residual."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".downsamples.\1.downsamples.\2.residual."),
    (r"\.down_blocks\.(\d+)\.downsampler\.", r".downsamples.\1.downsamples.2."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".upsamples.\1.upsamples.\2.residual."),
    (r"\.up_blocks\.(\d+)\.upsampler\.", r".upsamples.\1.upsamples.3."),
    (r"\.residual\.norm1\.", ".residual.0."),
    (r"\.residual\.conv1\.", ".residual.2."),
    (r"\.residual\.norm2\.", ".residual.3."),
    (r"\.residual\.conv2\.", ".residual.6."),
    (r"\.residual\.conv_shortcut\.", ".shortcut."),
)

# ours (transformers' UMT5EncoderModel) <- the published encoder file (spec §4)
T5 = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)

DROPPED = {"vae": ("dynamic_feature_projection_heads.",), "text": ("encoder.embed_tokens.",)}


def rename(name: str, table: Iterable[tuple[str, str]]) -> str:
    """`name` after every renaming of `table`, in order."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def light_vae_name(name: str) -> str | None:
    """Our name of a diffusers-style VAE key; None when it is dropped (spec §5.5)."""
    return None if name.startswith(DROPPED["vae"]) else rename(name, VAE)


def strip_fsdp(name: str) -> str:
    """The published clean-up of EMA keys: `_fsdp_wrapped_module.` removed wherever it stands."""
    return name.replace(FSDP, "")


def strip_wrappers(name: str) -> str:
    """`name` without what FSDP, activation checkpointing, torch.compile and DDP put into it."""
    for word in WRAPPERS:
        name = name.replace(word, "")
    return name.removeprefix("module.")


LORA_SIDES = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.")


def identify(names: Iterable[str]) -> str:
    """What a set of keys (wrappers removed) belongs to: generator, vae, text, lora, nvfp4, transformer-engine, or unknown."""
    names = set(names)
    if any(side in n for n in names for side in LORA_SIDES):
        return "lora"
    if any(n.endswith(("quantized_weight_values", ".nvfp4.codes")) for n in names):
        return "nvfp4"
    if any(n.endswith("_extra_state") for n in names):
        return "transformer-engine"
    bare = {n.removeprefix("model.") for n in names}
    if any(n.startswith(("patch_embedding.", "blocks.0.self_attn.", "blocks.0.attn1.", "condition_embedder.")) for n in bare):
        return "generator"
    if any(n.startswith(("decoder.conv1.", "decoder.conv_in.", "decoder.upsamples.", "decoder.up_blocks.", "encoder.downsamples.")) for n in bare):
        return "vae"
    if any(n.startswith(("token_embedding.", "shared.", "encoder.block.", "blocks.0.attn.")) for n in bare):
        return "text"
    return "unknown"


def native(kind: str | None, names: Iterable[str]) -> Callable[[str], str | None]:
    """The renaming from the layout of `names` (wrappers removed) to ours, for a model of `kind` ("generator", "vae", "text" or None)."""
    names = list(names)
    prefix = "model." if names and all(n.startswith("model.") for n in names) else ""
    bare = [n.removeprefix(prefix) for n in names]
    table: tuple = ()
    if kind == "generator" and any(n.startswith("condition_embedder.") for n in bare):
        table = DIT
    elif kind == "vae" and any(".conv_in." in n or n.startswith("post_quant_conv.") for n in bare):
        table = VAE
    elif kind == "text" and any(n.startswith("blocks.") for n in bare):
        table = T5
    dropped = DROPPED.get(kind, ())
    return lambda name: None if (short := name.removeprefix(prefix)).startswith(dropped) else rename(short, table)
