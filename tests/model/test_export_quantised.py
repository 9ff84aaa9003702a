"""scripts/save_merged_nvfp4_generator.py: what it writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_pipeline import SPEC

from longlive.cli.app import run
from longlive.cli.scripts import save_nvfp4
from longlive.config import default_config
from longlive.config.show import config_yaml
from longlive.models import fouroversix
from longlive.models.lora import attach, branches
from longlive.models.packed_state import split_packed
from longlive.models.spec import TINY
from longlive.models.wan_dit import WanDiT
from longlive.models.weights import read_state, save_state
from longlive.ops import nvfp4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    dit = WanDiT(SPEC.dit)
    save_state(folder / "base.safetensors", dit.state_dict())
    attach(dit, TINY, rank=2)
    lora = {f"base_model.model.{n}.lora_{side}.weight": torch.randn(t.shape) * 0.1 for n, b in branches(dit) for side, t in (("A", b.a), ("B", b.b))}
    torch.save({"generator_lora": lora}, folder / "few.pt")
    words = [f"checkpoints.generator_ckpt={folder / 'base.safetensors'}", "model_quant=true", "infra.model_quant_scale_rule=mse"]
    (folder / "nvfp4.yaml").write_text(config_yaml(default_config("tiny", words)))
    return folder


def save(files, out, *flags):
    return run(save_nvfp4, ["--config_path", str(files / "nvfp4.yaml"), "--output_path", str(files / out), "--device", "cpu", *flags])


def test_lora_is_merged_before_weights_are_packed(files):
    assert save(files, "merged.pt", "--lora_ckpt", str(files / "few.pt"), "--dtype", "fp32") == 0
    assert save(files, "plain.pt", "--lora_ckpt", str(files / "few.pt"), "--dtype", "fp32", "--no_merge_lora") == 0
    content = torch.load(files / "merged.pt", weights_only=True)
    assert content["checkpoint_format"] == fouroversix.FORMAT and content["merged_lora"] is True and content["quantization"]["weight_scale_rule"] == "mse"
    base, lora = read_state(files / "base.safetensors").tensors, torch.load(files / "few.pt", weights_only=True)["generator_lora"]
    name = "blocks.0.ffn.0"
    change = lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
    packed, _ = split_packed(read_state(files / "merged.pt"))
    right = nvfp4.quantise(torch.addmm(base[f"{name}.weight"], *(lora[f"base_model.model.{name}.lora_{s}.weight"] for s in "BA")), "mse")
    assert torch.equal(packed[f"{name}.weight"].codes, right.codes) and change.norm() > 0
    plain, _ = split_packed(read_state(files / "plain.pt"))
    assert torch.equal(plain[f"{name}.weight"].codes, nvfp4.quantise(base[f"{name}.weight"], "mse").codes)


def test_ours_describes_itself(files, capsys):
    assert save(files, "ours.safetensors", "--dtype", "fp32") == 0
    assert "longlive_quantised)" in capsys.readouterr().out
    state = read_state(files / "ours.safetensors")
    header = json.loads(state.metadata["longlive_quantised"])
    assert len(header["tensors"]) == 10 * SPEC.dit.layers
    packed, rest = split_packed(state)
    assert all(weight.rule == "mse" and weight.tile == 1 for weight in packed.values()) and "patch_embedding.weight" in rest.tensors


@pytest.mark.parametrize(
    "out, flags, part",
    [
        ("a.pt", ["--backend", "fp4"], "--backend 'fp4' is none of fouroversix, transformer_engine"),
        ("base.safetensors", [], "exists; name another file"),
        ("a.bin", [], "end it with .pt or .safetensors"),
        ("a.pt", ["--generator_ckpt", "OURS"], "NVFP4-quantised"),
        ("a.pt", ["--lora_ckpt", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_bad_input_is_one_line(files, capsys, out, flags, part):
    if "OURS" in flags:
        save(files, "again.pt")
        flags = [str(files / "again.pt") if flag == "OURS" else flag for flag in flags]
        capsys.readouterr()
    assert save(files, out, *flags) == 2
    err = capsys.readouterr().err.strip()
    assert part in err and "\n" not in err and not (files / "a.pt").exists()
