"""The UMT5-XXL text encoder of Wan2.2, through transformers, from the published weight file (spec inference §4).

The one idea: transformers' `UMT5EncoderModel` is the network; what is ours is the names of the published file, the text cleaning and the rule that only
real tokens leave this module (padding rows carry no meaning, and padding keys are masked, so prompts need no padding to 512).

Legend: L tokens of the longest prompt in a batch, n real tokens of one prompt, D text_dim.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError
from .keymaps import T5, rename
from .text import clean_text
from .weights import build_on_meta, load_into, native_state, read_state

WEIGHTS = ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")
TOKENIZERS = ("google/umt5-xxl", "tokenizer")
BATCH = 8


def umt5_config(*, vocab: int, dim: int, attention: int, ffn: int, heads: int, layers: int, buckets: int = 32, max_distance: int = 128):
    """transformers' configuration for these sizes; `attention` is the width of q, k, v over all heads."""
    from transformers import UMT5Config

    return UMT5Config(
        vocab_size=vocab,
        d_model=dim,
        d_kv=attention // heads,
        d_ff=ffn,
        num_heads=heads,
        num_layers=layers,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )


def umt5_xxl_config():
    """The sizes of UMT5-XXL's encoder."""
    return umt5_config(vocab=256384, dim=4096, attention=4096, ffn=10240, heads=64, layers=24)


def umt5_model(config) -> nn.Module:
    """The encoder on the meta device, its token embedding held once."""
    from transformers import UMT5EncoderModel

    model = build_on_meta(lambda: UMT5EncoderModel(config)).eval().requires_grad_(False)
    model.encoder.embed_tokens = nn.Module()  # stands in until `share_embedding`: one tensor, one name
    return model


def share_embedding(model: nn.Module) -> nn.Module:
    """Lets the stack read the (loaded) token embedding."""
    model.encoder.embed_tokens = model.shared
    return model


def published_names(model: nn.Module) -> dict[str, str]:
    """Key of the published file -> key of transformers' model, for every parameter of `model`."""
    layers = len(model.encoder.block)
    block = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "norm2", "ffn.gate.0", "ffn.fc1", "ffn.fc2", "pos_embedding.embedding")
    names = ["token_embedding", *(f"blocks.{i}.{part}" for i in range(layers) for part in block), "norm"]
    return {f"{name}.weight": rename(f"{name}.weight", T5) for name in names}


def find(folder: Path, names: tuple[str, ...], what: str) -> Path:
    """The first of `names` that is there. Raises CheckpointError that says what is expected where."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"no {what} in {folder}: expected {' or '.join(str(folder / name) for name in names)}; fetch Wan2.2-TI2V-5B there")


class UMT5Encoder:
    """Prompts -> [n, 4096] each, from a folder with the published layout or the diffusers one.

    `dtype` defaults to the file's (bf16). Prompts are cut at `text_len` tokens including the end mark; output is float32 on `device`.
    """

    def __init__(self, folder: str | Path, *, text_len: int = 512, device=None, dtype: torch.dtype | None = None, config=None):
        folder = Path(folder)
        weights, tokenizer = find(folder, WEIGHTS, "text encoder weights"), find(folder, TOKENIZERS, "tokenizer")
        self.text_len, self.tokenizer = text_len, load_tokenizer(tokenizer)
        state = native_state(read_state(weights, kind="text"), "text")
        model = umt5_model(config or config_of(state.tensors))
        load_into(model, state, kind="text", device=device, dtype=dtype)
        self.model = share_embedding(model)
        self.text_dim = model.config.d_model

    def to(self, device=None, dtype: torch.dtype | None = None) -> "UMT5Encoder":
        """Moves and casts the network, in place."""
        self.model.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        rows: list[Tensor] = []
        for at in range(0, len(prompts), BATCH):
            texts = [clean_text(prompt) for prompt in prompts[at : at + BATCH]]
            batch = self.tokenizer(texts, padding="longest", truncation=True, max_length=self.text_len, add_special_tokens=True, return_tensors="pt")
            rows += real_rows(self.model, batch.input_ids, batch.attention_mask)
        return rows


def real_rows(model: nn.Module, ids_BL: Tensor, mask_BL: Tensor) -> list[Tensor]:
    """The encoder's output without padding: one float32 [n, D] per prompt. Tokens come first, padding (mask 0) after them."""
    device = model.shared.weight.device
    context = model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device)).last_hidden_state
    return [row[: int(n)].float() for row, n in zip(context, mask_BL.sum(1))]


def load_tokenizer(folder: Path):
    """The tokenizer in `folder`, never from a network. Raises CheckpointError when its files are not readable."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{folder} holds no readable tokenizer ({reason}); fetch its files (spiece.model, tokenizer.json) again") from None


def config_of(tensors: dict[str, Tensor]):
    """The sizes of an encoder from its tensors (under transformers' names); UMT5-XXL's where a tensor is missing, so that the loader names it."""
    layer = "encoder.block.0.layer"
    attention = f"{layer}.0.SelfAttention"
    needed = ("shared.weight", f"{attention}.q.weight", f"{layer}.1.DenseReluDense.wi_0.weight", f"{attention}.relative_attention_bias.weight")
    if any(name not in tensors for name in needed):
        return umt5_xxl_config()
    (vocab, dim), attention, ffn, (buckets, heads) = (
        tensors[needed[0]].shape,
        tensors[needed[1]].shape[0],
        tensors[needed[2]].shape[0],
        tensors[needed[3]].shape,
    )
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.block."))
    return umt5_config(vocab=vocab, dim=dim, attention=attention, ffn=ffn, heads=heads, layers=layers, buckets=buckets)
