"""Text: words hash to the same numbers everywhere, prompts are encoded once, only real tokens leave an encoder."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from longlive.core.errors import CheckpointError, InputError
from longlive.models.spec import TINY, WAN22_TI2V_5B
from longlive.models.text import HashedWords, PromptCache, clean_text, fnv1a, hash_vectors, text_encoder
from longlive.models.umt5 import UMT5Encoder, published_names, share_embedding, umt5_config, umt5_model
from longlive.models.weights import StateFile, load_into, native_state


def test_hashes_are_the_same_on_every_platform():
    assert fnv1a("") == 0xCBF29CE484222325 and fnv1a("a") == 0xAF63DC4C8601EC8C  # published FNV-1a vectors
    digest = hashlib.sha256(hash_vectors(["red", "Größe", "猫"], 64).tobytes()).hexdigest()
    assert digest == "dd910fd1d794a07b03fa0a2f97ab6279dd437374b64a3359e8e3244f6f497e70"


def test_word_vectors_look_like_independent_normal_numbers():
    vectors = hash_vectors([f"word{i}" for i in range(2000)], 64)
    assert abs(vectors.mean()) < 0.01 and abs(vectors.std() - 1) < 0.01
    overlap = vectors @ vectors.T / 64 - np.eye(2000)
    assert abs(overlap[~np.eye(2000, dtype=bool)].std() - 64**-0.5) < 0.005


def test_rows_hold_a_word_and_its_neighbours():
    encoder = HashedWords(20, 8)
    (rows,) = encoder.encode(["A red, circle"])
    a, red, comma, circle = (torch.from_numpy(hash_vectors([w], 4)[0]) for w in ("a", "red", ",", "circle"))
    assert rows.shape == (4, 20) and rows.dtype == torch.float32
    assert torch.equal(rows[0], torch.cat([torch.zeros(8), a, red, comma]))
    assert torch.equal(rows[2], torch.cat([a, red, comma, circle, torch.zeros(4)]))


def test_spelling_that_does_not_matter_does_not_matter():
    encoder = HashedWords(320, 64)
    same = encoder.encode(["A red circle, spins.", "  a RED\ncircle , spins ."])
    assert torch.equal(*same)
    empty, other, long = encoder.encode(["", "Кот 猫 🎬 / \"quotes\"", "word " * 5000])
    assert empty.shape == (0, 320) and len(other) == 7 and len(long) == 64


def test_a_width_that_does_not_split_is_refused():
    with pytest.raises(InputError, match="text_dim 321"):
        HashedWords(321, 8)


def test_cleaning_follows_the_published_steps():
    assert clean_text("  a &amp;amp; b\n\t c  ") == "a & b c"
    assert clean_text("â€œschÃ¶nâ€\x9d") == '"schön"'


class Counting:
    text_dim, text_len = 2, 4

    def __init__(self):
        self.asked = []

    def encode(self, prompts):
        self.asked += prompts
        return [torch.full((1, 2), float(len(prompt))) for prompt in prompts]


def test_each_prompt_is_encoded_once_and_the_oldest_is_forgotten():
    inner = Counting()
    cache = PromptCache(inner, size=2)
    assert [t[0, 0].item() for t in cache.encode(["a", "bb", "a"])] == [1, 2, 1]
    cache.encode(["a"])
    assert inner.asked == ["a", "bb"]
    assert [t[0, 0].item() for t in cache.encode(["ccc", "a", "dddd"])] == [3, 1, 4]  # more than fit
    assert inner.asked == ["a", "bb", "ccc", "dddd"]
    cache.encode(["a", "bb"])
    assert inner.asked[4:] == ["bb"]


def test_the_small_model_needs_no_files():
    encoder = text_encoder(TINY)
    assert encoder.encode(["a circle"])[0].shape == (2, TINY.dit.text_dim)


def test_a_missing_encoder_says_what_belongs_where(tmp_path):
    with pytest.raises(CheckpointError, match="models_t5_umt5-xxl-enc-bf16.pth"):
        text_encoder(WAN22_TI2V_5B, folder=tmp_path)


def tiny_umt5(seed=0):
    """(config, weights under the published names) of a small UMT5."""
    config = umt5_config(vocab=24, dim=16, attention=24, ffn=32, heads=2, layers=2)
    model = umt5_model(config)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: model.state_dict()[theirs].shape for name, theirs in published_names(model).items()}
    return config, {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@torch.no_grad()
def test_padding_does_not_change_real_rows():
    config, weights = tiny_umt5()
    model = umt5_model(config)
    load_into(model, native_state(StateFile(tensors=dict(weights)), "text"), kind="text")
    share_embedding(model)
    ids = torch.tensor([[5, 6, 7, 1, 0, 0]])
    padded = model(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state[0, :4]
    torch.testing.assert_close(padded, model(input_ids=ids[:, :4], attention_mask=torch.ones(1, 4)).last_hidden_state[0])
    assert not any(p.is_meta for p in model.parameters())


def write_tokenizer(folder):
    """A word-level tokenizer with an end mark, in the files that transformers reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "walks"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("layout", ["published", "diffusers"])
def test_the_encoder_reads_both_layouts_and_drops_padding(tmp_path, layout):
    _, weights = tiny_umt5()
    if layout == "published":
        torch.save(weights, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
        write_tokenizer(tmp_path / "google" / "umt5-xxl")
    else:
        from longlive.models.weights import save_state

        config, _ = tiny_umt5()
        names = published_names(umt5_model(config))
        theirs = {names[name]: t for name, t in weights.items()}
        theirs["encoder.embed_tokens.weight"] = theirs["shared.weight"].clone()
        save_state(tmp_path / "text_encoder" / "model.safetensors", theirs)
        write_tokenizer(tmp_path / "tokenizer")
    encoder = UMT5Encoder(tmp_path, text_len=5)
    rows = encoder.encode(["a red fox", "", "a red fox walks a red fox walks"])
    assert [tuple(r.shape) for r in rows] == [(4, 16), (1, 16), (5, 16)]  # with end mark; cut at 5
    torch.testing.assert_close(encoder.encode(["a  red\nfox"])[0], rows[0], rtol=1e-4, atol=1e-5)


def test_a_folder_that_is_no_tokenizer_is_refused(tmp_path):
    _, weights = tiny_umt5()
    torch.save(weights, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match="no readable tokenizer"):
        UMT5Encoder(tmp_path)
