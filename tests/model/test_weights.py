"""Checkpoints: every documented container and layout loads; anything else is refused in one line that says what and how to go on; memory stays small."""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from longlive.config.load import default_config
from longlive.core.errors import CheckpointError, ConfigError
from longlive.engine.parts import load_dit
from longlive.models import keymaps
from longlive.models.light_vae import pruning_rate, read_codec, vae_place
from longlive.models.spec import TINY, VAE_TYPES, WAN22_TI2V_5B, WAN22_VAE, DiTDims, VAEDims, vae_type
from longlive.models.wan_dit import WanDiT
from longlive.models.wan_vae import WanVAE
from longlive.models.weights import StateFile, build_on_meta, load_into, read_state, refuse_lora_on_merged, save_state, weights_hash

DIMS = DiTDims(dim=64, ffn=96, layers=2, heads=1, text_dim=20, text_len=16, freq_dim=32)
VAE = VAEDims(encoder_base=4, decoder_base=4)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return {name: torch.randn_like(t) for name, t in WanDiT(DIMS).state_dict().items()}


@pytest.fixture(scope="module")
def vae_state():
    return WanVAE(VAE).state_dict()


def loaded(path, **how):
    dit = build_on_meta(lambda: WanDiT(DIMS))
    load_into(dit, path, kind="generator", **how)
    return dit.state_dict()


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dressed(state, form):
    """The same weights as the wrappers of training frameworks leave them."""
    if form == "fsdp":
        return {"model._fsdp_wrapped_module." + k.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): v for k, v in state.items()}
    if form == "checkpointed and compiled":
        return {"_orig_mod.model." + k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v for k, v in state.items()}
    return {{"bare": "", "wrapper": "model.", "ddp": "module.model."}[form] + k: v for k, v in state.items()}


@pytest.mark.parametrize("form", ["bare", "wrapper", "ddp", "fsdp", "checkpointed and compiled"])
@pytest.mark.parametrize("entry", ["generator", "model", None])
def test_published_containers_load(tmp_path, state, form, entry):
    names = dressed(state, form)
    torch.save({entry: names, "step": 7} if entry else names, tmp_path / "model.pt")
    same(loaded(tmp_path / "model.pt"), state)
    assert read_state(tmp_path / "model.pt").metadata == ({"step": 7} if entry else {})


def test_the_ema_is_taken_only_when_asked_for(tmp_path, state):
    ema = {name: t + 1 for name, t in state.items()}
    torch.save({"generator": state, "generator_ema": dressed(ema, "fsdp")}, tmp_path / "both.pt")
    same(loaded(tmp_path / "both.pt"), state)
    same(loaded(tmp_path / "both.pt", use_ema=True), ema)
    torch.save({"generator_ema": ema}, tmp_path / "ema.pt")
    with pytest.raises(CheckpointError, match="only generator_ema; set inference.use_ema: true"):
        loaded(tmp_path / "ema.pt")


@pytest.mark.parametrize("given", ["index", "folder", "second shard"])
def test_shards_load_from_any_of_their_names(tmp_path, state, given):
    halves = [dict(list(state.items())[:20]), dict(list(state.items())[20:])]
    stem = "diffusion_pytorch_model"
    for i, half in enumerate(halves, 1):
        save_file(half, tmp_path / f"{stem}-{i:05d}-of-00002.safetensors")
    where = {name: f"{stem}-{i:05d}-of-00002.safetensors" for i, half in enumerate(halves, 1) for name in half}
    (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    path = {"index": f"{stem}.safetensors.index.json", "folder": "", "second shard": f"{stem}-00002-of-00002.safetensors"}[given]
    same(loaded(tmp_path / path), state)
    (tmp_path / f"{stem}-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00001-of-00002.safetensors is missing: 1 of 2 parts"):
        loaded(tmp_path / path)


def to_diffusers(name):
    """Our DiT key in diffusers' words, written by hand and apart from the table under test."""
    for ours, theirs in (
        ("head.modulation", "scale_shift_table"), ("head.head", "proj_out"), ("modulation", "scale_shift_table"), ("norm3", "norm2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"), ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"), ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"), ("ffn.0", "ffn.net.0.proj"), ("ffn.2", "ffn.net.2"),
        ("self_attn.o", "attn1.to_out.0"), ("cross_attn.o", "attn2.to_out.0"), ("self_attn.norm", "attn1.norm"), ("cross_attn.norm", "attn2.norm"),
        *((f"self_attn.{x}", f"attn1.to_{x}") for x in "qkv"), *((f"cross_attn.{x}", f"attn2.to_{x}") for x in "qkv"),
    ):  # fmt: skip
        if ours in name:
            return name.replace(ours, theirs)
    return name


def test_the_diffusers_layout_loads(tmp_path, state):
    theirs = {to_diffusers(name): t for name, t in state.items()}
    assert len(theirs) == len(state) and "blocks.1.attn2.to_out.0.weight" in theirs and "blocks.0.norm2.weight" in theirs
    save_state(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", theirs)
    same(loaded(tmp_path / "transformer"), state)


def test_the_keys_of_the_full_models_survive_the_way_through_diffusers_names():
    dit = build_on_meta(lambda: WanDiT(WAN22_TI2V_5B.dit)).state_dict()
    names = [to_diffusers(name) for name in dit]
    assert [keymaps.native("generator", names)(name) for name in names] == list(dit)


@pytest.mark.parametrize("entry", ["state_dict", "gen_model", "generator", None])
def test_vae_files_say_their_own_width(tmp_path, vae_state, entry):
    torch.save({entry: vae_state} if entry else vae_state, tmp_path / "vae.pth")
    codec = read_codec(tmp_path / "vae.pth")
    assert codec.vae.dims == VAE and codec.mean_KC.shape == (1, 48)
    same(codec.vae.state_dict(), dict(vae_state))


def test_unwrapping_prefers_state_dict(tmp_path, vae_state):
    torch.save({"generator": {}, "gen_model": {}, "state_dict": vae_state}, tmp_path / "vae.pth")
    assert read_codec(tmp_path / "vae.pth").vae.dims == VAE


def test_a_light_vae_in_diffusers_names_without_encoder_decodes(tmp_path, vae_state):
    rename = {
        "conv2.": "post_quant_conv.",
        "decoder.conv1.": "decoder.conv_in.",
        "decoder.head.0.": "decoder.norm_out.",
        "decoder.head.2.": "decoder.conv_out.",
    }
    theirs = {"dynamic_feature_projection_heads.0.weight": torch.zeros(2)}
    for name, tensor in vae_state.items():
        if name.startswith(("decoder.", "conv2.")):
            theirs[next((name.replace(a, b, 1) for a, b in rename.items() if name.startswith(a)), name)] = tensor
    torch.save({"gen_model": theirs}, tmp_path / "light.pth")
    codec = read_codec(tmp_path / "light.pth")
    assert codec.vae.encoder is None and codec.vae.dims.decoder_base == 4
    with torch.no_grad():
        assert codec.decode(torch.zeros(1, 2, 48, 1, 1)).shape == (1, 3, 5, 16, 16)


def test_pruning_is_read_from_the_file():
    for rate in (0.0, 0.5, 0.75):
        assert pruning_rate(build_on_meta(lambda: WanVAE(WAN22_VAE.pruned(rate))).state_dict()) == rate
    assert vae_type("").path.endswith("Wan2.2_VAE.pth") and vae_type("MG_LightVAE_v2").rate == 0.75
    for name in (*VAE_TYPES, "wan2.2"):
        assert default_config("wan2.2-ti2v-5b", [f"inference.vae_type={name}"]).inference.vae_type == name
    with pytest.raises(ValueError, match="did you mean 'mg_lightvae'"):
        vae_type("mg_lightva")


def test_statistics_travel_with_the_file(tmp_path, vae_state):
    mean, std = torch.randn(2, 48), torch.rand(2, 48)
    save_state(tmp_path / "vae.safetensors", {**vae_state, "latent_mean": mean, "latent_std": std})
    codec = read_codec(tmp_path / "vae.safetensors", dtype=torch.bfloat16)
    assert torch.equal(codec.mean_KC, mean) and torch.equal(codec.std_KC, std) and codec.dtype == torch.bfloat16
    save_state(tmp_path / "half.safetensors", {**vae_state, "latent_mean": mean})
    with pytest.raises(CheckpointError, match="latent_mean but not the other"):
        read_codec(tmp_path / "half.safetensors")


def test_the_diffusers_vae_folder_is_found(tmp_path, vae_state):
    save_state(tmp_path / "wan_models/Wan2.2-TI2V-5B/vae/diffusion_pytorch_model.safetensors", vae_state)
    assert read_codec(vae_place("wan", tmp_path)).vae.dims == VAE


def test_sizes_come_from_the_checkpoint(tmp_path, state):
    save_state(tmp_path / "dit.safetensors", state)
    config = default_config("tiny", [f"checkpoints.generator_ckpt={tmp_path / 'dit.safetensors'}"])
    dit, _ = load_dit(config, TINY, torch.device("cpu"), torch.bfloat16)
    assert (dit.dims.layers, dit.dims.dim, dit.dims.ffn) == (2, 64, 96) and not any(p.requires_grad for p in dit.parameters())
    assert {p.dtype for p in dit.parameters()} == {torch.bfloat16}


def broken(folder, state, vae_state):
    """name -> (how to make the file, words of the message)."""
    whole = folder / "whole.safetensors"
    save_file(dict(state), whole)
    torch.save(state, folder / "whole.pt")
    raw, zipped = whole.read_bytes(), (folder / "whole.pt").read_bytes()
    lora = {f"base_model.model.blocks.0.ffn.0.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
    return {
        "empty.safetensors": (b"", "is empty"),
        "empty.pt": (b"", "is empty"),
        "half.safetensors": (raw[: len(raw) // 2], "is truncated"),
        "stub.safetensors": (raw[:5], "is truncated"),
        "half.pt": (zipped[: len(zipped) // 2], "is truncated or damaged"),
        "old.pth": (b"\x80\x02abc", "is truncated or damaged"),
        "words.pt": (b"<html>not found</html>", "is not a weight file"),
        "words.safetensors": (b"<html>not found</html>", "is not a safetensors file"),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        "objects.pt": ({"generator": state, "args": argparse.Namespace(lr=1)}, "Python objects beside tensors"),
        "list.pt": ([1, 2], "holds a list"),
        "nothing.pt": ({"step": 3}, "holds no generator"),
        "lora.pt": ({"generator_lora": lora}, "only a LoRA .* checkpoints.lora_ckpt"),
        "lora_bare.pt": (lora, "holds a LoRA file, not a generator .* checkpoints.lora_ckpt"),
        "vae.pth": (dict(vae_state), "holds a VAE file, not a generator"),
        "nvfp4.pt": ({"blocks.0.ffn.0.quantized_weight_values": torch.zeros(2)}, "NVFP4-quantised"),
        "word.pt": ({"generator": "G"}, "is a str, not a dictionary"),
    }


def test_bad_files_are_refused_in_one_line(tmp_path, state, vae_state):
    for name, (content, words) in broken(tmp_path, state, vae_state).items():
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(CheckpointError, match=words) as caught:
            loaded(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value), name


def test_missing_files_name_their_neighbour(tmp_path):
    (tmp_path / "model_bf16.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"did you mean .*model_bf16.pt"):
        read_state(tmp_path / "model_b16.pt")
    with pytest.raises(CheckpointError, match="there is no folder"):
        read_state(tmp_path / "nowhere" / "model.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is a folder and holds nothing"):
        read_state(tmp_path / "empty")


def test_differences_name_the_first_keys(tmp_path, state):
    changed = {name: t for name, t in state.items() if not name.startswith("blocks.1.ffn")}
    changed |= {"head.head.weight": torch.zeros(3, 64), "extra.weight": torch.zeros(1)}
    save_state(tmp_path / "odd.safetensors", changed)
    words = "missing blocks.1.ffn.0.weight, .* and 1 more; unexpected extra.weight; wrong shape: head.head.weight is \\[3, 64\\], expected \\[192, 64\\]"
    with pytest.raises(CheckpointError, match=words):
        loaded(tmp_path / "odd.safetensors")


def test_loading_fills_modules_that_have_memory_in_place(tmp_path, state):
    save_state(tmp_path / "dit.safetensors", {name: t.bfloat16() for name, t in state.items()})
    dit = WanDiT(DIMS)
    before = {name: p.data_ptr() for name, p in dit.named_parameters()}
    load_into(dit, tmp_path / "dit.safetensors", kind="generator")
    assert all(p.data_ptr() == before[name] and p.dtype == torch.float32 for name, p in dit.named_parameters())
    torch.testing.assert_close(dit.state_dict()["head.head.weight"], state["head.head.weight"], rtol=0.01, atol=0.01)


def test_tensors_in_memory_survive_being_loaded(state):
    """Pages are given back for mapped files only: giving back plain memory would clear it."""
    kept = {name: t.clone() for name, t in state.items()}
    load_into(WanDiT(DIMS), StateFile(tensors=dict(state)), kind="generator")
    same(state, kept)


def test_files_in_the_old_torch_format_load(tmp_path, state):
    tied = dict(state) | {"blocks.1.ffn.0.weight": state["blocks.0.ffn.0.weight"]}
    torch.save(tied, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(loaded(tmp_path / "old.pth", dtype=torch.float64), {name: t.double() for name, t in tied.items()})


def test_lora_is_refused_on_merged_weights():
    for metadata in ({"merged_lora": "x.pt"}, {"merged_lora": True}, {"checkpoint_format": "longlive_generator_merged_lora"}):
        with pytest.raises(ConfigError, match="already has a LoRA merged"):
            refuse_lora_on_merged(metadata, "lora.pt")
        refuse_lora_on_merged(metadata, None)
    refuse_lora_on_merged({"merged_lora": False}, "lora.pt")


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = save_state(tmp_path / "new" / "a.safetensors", {"x": torch.arange(4.0)[::2]}, {"step": 3, "name": "n"})
    state = read_state(path)
    assert torch.equal(state.tensors["x"], torch.tensor([0.0, 2.0])) and state.metadata == {"step": "3", "name": "n"}

    def full(tensors, file, words):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longlive.models.weights.save_file", full)
    with pytest.raises(ValueError, match="No space left"):
        save_state(path, {"x": torch.zeros(1)})
    assert torch.equal(read_state(path).tensors["x"], torch.tensor([0.0, 2.0])) and [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_the_hash_follows_the_content(tmp_path):
    a, b = save_state(tmp_path / "a.safetensors", {"x": torch.zeros(9)}), save_state(tmp_path / "b.safetensors", {"x": torch.ones(9)})
    assert weights_hash(a).startswith("sha256:") and weights_hash(a) != weights_hash(b) and weights_hash(a) == weights_hash(a)


MEASURE = """
import sys, torch, psutil
from torch import nn
from longlive.models.weights import StateFile, build_on_meta, load_into
class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(1024, 2048, bias=False) for _ in range(24))
torch.zeros(1 << 20).bfloat16()
process, peak = psutil.Process(), 0
def watch(function):
    def wrapped(*args, **kwargs):
        global peak
        out = function(*args, **kwargs)
        peak = max(peak, process.memory_info().rss)
        return out
    return wrapped
torch.Tensor.to = watch(torch.Tensor.to)
before = process.memory_info().rss
model = build_on_meta(Big)
load_into(model, sys.argv[1], dtype=torch.bfloat16)
print(peak - before, process.memory_info().rss - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_loading_holds_one_tensor_more_than_the_model(tmp_path, ending):
    """A 200 MB float32 file into a 100 MB bfloat16 model: the peak of resident memory stays below model + one source tensor + slack."""
    tensors = {f"parts.{i}.weight": torch.full((2048, 1024), float(i)) for i in range(24)}
    path = tmp_path / f"big.{ending}"
    save_state(path, tensors) if ending == "safetensors" else torch.save({"generator": tensors}, path)
    del tensors
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    peak, after, model = map(int, done.stdout.split())
    largest, slack = 2048 * 1024 * 4, 24 * 2**20
    assert model == 24 * 2048 * 1024 * 2
    assert peak < model + 2 * largest + slack and after < model + slack, (peak >> 20, after >> 20, model >> 20)


def test_meta_construction_takes_no_memory():
    model: nn.Module = build_on_meta(lambda: WanDiT(WAN22_TI2V_5B.dit))
    assert all(p.is_meta for p in model.parameters()) and sum(p.numel() for p in model.parameters()) == 4_999_787_712


def test_a_pickle_of_something_else_gets_one_line(tmp_path, recwarn):
    (tmp_path / "other.pt").write_bytes(pickle.dumps(subprocess.run, protocol=4))
    with pytest.raises(CheckpointError, match="truncated or no torch file"):
        read_state(tmp_path / "other.pt")
    assert not recwarn.list
