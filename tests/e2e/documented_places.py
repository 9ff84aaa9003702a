"""Checkpoints of a very small model of the 5B family, written where the documentation puts the real ones.

Layout under a folder: wan_models/Wan2.2-TI2V-5B/{config.json, diffusion_pytorch_model.safetensors, Wan2.2_VAE.pth,
models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/}, LongLive-2.0-5B/model_bf16.pt, configs/inference.yaml and
configs/inference_sp.yaml (the repository's, smaller films).
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from longlive.models.spec import DiTDims, VAEDims
from longlive.models.wan_dit import WanDiT
from longlive.models.wan_vae import WanVAE

ROOT = Path(__file__).parents[2]
DIT = DiTDims(dim=48, ffn=96, layers=2, heads=2, text_dim=32, text_len=512)
VAE = VAEDims(encoder_base=8, decoder_base=8)
WORDS = "a compact silver robot walks through clean robotics lab . red circle bounces on meadow the scene transitions".split()


def write(root: Path, frames: int = 16, rows: int = 4, columns: int = 4, heads: int = 2) -> Path:
    """Writes everything under `root`. Films have `frames` latent frames of `rows` x `columns`; the transformer has `heads` attention heads."""
    torch.manual_seed(0)
    wan = root / "wan_models" / "Wan2.2-TI2V-5B"
    wan.mkdir(parents=True)
    dit = WanDiT(replace(DIT, heads=heads))
    dit.init_weights()
    base = {name: tensor.bfloat16() for name, tensor in dit.state_dict().items()}
    save_file(base, wan / "diffusion_pytorch_model.safetensors")
    about = {"_class_name": "WanModel", "dim": 48, "ffn_dim": 96, "num_layers": 2, "num_heads": heads, "in_dim": 48, "out_dim": 48, "text_len": 512}
    (wan / "config.json").write_text(json.dumps(about))
    torch.save(WanVAE(VAE).state_dict(), wan / "Wan2.2_VAE.pth")
    torch.save(umt5_weights(), wan / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(wan / "google" / "umt5-xxl")
    released = root / "LongLive-2.0-5B"
    released.mkdir()
    generator = {f"model.{name}": tensor + 0.02 * torch.randn(tensor.shape).bfloat16() for name, tensor in base.items()}
    torch.save({"generator": generator}, released / "model_bf16.pt")
    (root / "configs").mkdir()
    for name in ("inference.yaml", "inference_sp.yaml"):
        text = (ROOT / "configs" / name).read_text()
        text, count = re.subn(r"image_or_video_shape: \[.*?\]", f"image_or_video_shape: [1, {frames}, 48, {rows}, {columns}]", text)
        assert count == 1
        (root / "configs" / name).write_text(text)
    return root


def umt5_weights(dim: int = 32, ffn: int = 48, heads: int = 2, layers: int = 2) -> dict[str, torch.Tensor]:
    """A text encoder under the published names (spec inference §4), bfloat16."""
    inner = dim
    state = {"token_embedding.weight": torch.randn(len(WORDS) + 3, dim), "norm.weight": torch.ones(dim)}
    for i in range(layers):
        block = {"norm1.weight": torch.ones(dim), "norm2.weight": torch.ones(dim), "pos_embedding.embedding.weight": torch.randn(32, heads)}
        block |= {f"attn.{part}.weight": torch.randn(inner, dim) / dim**0.5 for part in "qkv"}
        block |= {"attn.o.weight": torch.randn(dim, inner) / inner**0.5, "ffn.fc2.weight": torch.randn(dim, ffn) / ffn**0.5}
        block |= {f"ffn.{part}.weight": torch.randn(ffn, dim) / dim**0.5 for part in ("gate.0", "fc1")}
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return {name: tensor.bfloat16() for name, tensor in state.items()}


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer that AutoTokenizer loads: pad, end of text, unknown, and `WORDS`."""
    folder.mkdir(parents=True)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
