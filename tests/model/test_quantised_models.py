"""Quantised networks: converted at load, read from quantised files, cast, with LoRA beside them; what cannot be is refused in one line."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_pipeline import SPEC

from longlive.config import default_config
from longlive.core.errors import CheckpointError, ConfigError
from longlive.engine import parts
from longlive.models import fouroversix
from longlive.models.lora import attach, branches
from longlive.models.quantised_files import to_plain
from longlive.models.spec import TINY
from longlive.models.wan_dit import WanDiT
from longlive.models.weights import save_state
from longlive.ops import nvfp4
from longlive.ops.packed import BITS
from longlive.precision import configured
from longlive.precision.linear import Fp8Linear, QuantisedLinear
from longlive.precision.selection import quantised_linears

CPU = torch.device("cpu")
WAYS = {
    "fp8": ["fp8_quant=true"],
    "w4a8": ["model_quant=true", "model_quant_backend=w4a8"],
    "w4a16": ["model_quant=true", "model_quant_backend=w4a16"],
    "emulated": ["model_quant=true", "model_quant_backend=emulated", "infra.model_quant_scale_rule=mse"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """base.safetensors; packed.pt (published container, mse) and packed.safetensors (ours) of the same weights, quantised from float32."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    dit = WanDiT(SPEC.dit)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    state = dit.state_dict()
    save_state(folder / "base.safetensors", state)
    names = [f"{name}.weight" for name in quantised_linears(dit)]
    packed = {name: nvfp4.quantise(state[name], "mse") for name in names}
    rest = {name: t for name, t in state.items() if name not in packed}
    torch.save(fouroversix.container(packed, rest, {}, model_name="tiny"), folder / "packed.pt")
    save_state(folder / "packed.safetensors", *to_plain(packed, rest))
    return folder


def settings(files, *words, file="base.safetensors"):
    return default_config("tiny", [f"checkpoints.generator_ckpt={files / file}", *words])


def loaded(files, *words, file="base.safetensors", dtype=torch.float32):
    return parts.load_dit(settings(files, *words, file=file), TINY, CPU, dtype)[0]


def layers(dit):
    return {name: m for name, m in dit.named_modules() if isinstance(m, QuantisedLinear)}


@pytest.mark.parametrize("way", WAYS)
def test_layers_of_the_blocks_are_quantised_and_close_to_the_plain_ones(files, way):
    """All ten of a block; FP8 leaves the two that read the text alone, unless the default filter is off."""
    dit, plain = loaded(files, *WAYS[way]), loaded(files)
    assert len(layers(dit)) == (8 if way == "fp8" else 10) * SPEC.dit.layers and {m.backend for m in layers(dit).values()} == {way}
    torch.manual_seed(1)
    for name, layer in layers(dit).items():
        x = torch.randn(2, 5, layer.in_features)
        right = plain.get_submodule(name)(x)
        error = (layer(x) - right).norm() / right.norm()
        assert 0 < error < (0.05 if way == "fp8" else 0.2), (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_that_is_told_names_the_type_of_the_rest(files, monkeypatch, dtype):
    told = []
    monkeypatch.setattr(configured, "warn_once", told.append)
    loaded(files, "model_quant=true", dtype=dtype)
    (line,) = told
    assert "(w4a16), all else in " + str(dtype).removeprefix("torch.") in line and "model_quant_backend chooses another way" in line and "BF16" not in line


@pytest.mark.parametrize("way", WAYS)
def test_a_blanket_cast_leaves_quantised_weights_alone(files, way):
    dit = loaded(files, *WAYS[way])
    before = {name: {k: t.clone() for k, t in m.stored.state().items()} for name, m in layers(dit).items()}
    dit.to(torch.bfloat16).half().double().to(device=CPU, dtype=torch.bfloat16)
    for name, m in layers(dit).items():
        for part, tensor in m.stored.state().items():
            kind = BITS[tensor.dtype]
            assert tensor.dtype == before[name][part].dtype and torch.equal(tensor.view(kind), before[name][part].view(kind)), (name, part)
    layer = dit.blocks[0].ffn[0]
    assert layer(torch.randn(1, 3, layer.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("file", ["packed.pt", "packed.safetensors"])
def test_a_quantised_file_is_the_model_quantised_at_load(files, file):
    words = ["model_quant=true", "model_quant_backend=w4a16", "infra.model_quant_scale_rule=mse"]
    read, made = (layers(loaded(files, *words, file=f)) for f in (file, "base.safetensors"))
    assert read.keys() == made.keys()
    for name in read:
        mine, theirs = read[name].stored, made[name].stored
        assert torch.equal(mine.codes, theirs.codes) and torch.equal(mine.scales, theirs.scales) and torch.equal(mine.amax, theirs.amax)


@pytest.mark.parametrize(
    "words, file, part",
    [
        ([], "packed.pt", "set model_quant: true"),
        (["fp8_quant=true"], "packed.safetensors", "set model_quant: true"),
        (["model_quant=true", "infra.model_quant_scale_rule=static_6"], "packed.pt", "quantised by mse and the configuration says static_6"),
        (["model_quant=true", "infra.model_quant_scale_rule=static_6"], "packed.safetensors", "quantised by mse and the configuration says static_6"),
        (["model_quant=true", "infra.model_quant_scale_rule=mse", "model_quant_skip_first_blocks=1"], "packed.pt", "or skip no block"),
        (["model_quant=true", "model_quant_use_transformer_engine=true"], "packed.pt", "packed NVFP4 weights and model_quant_use_transformer_engine"),
        (["model_quant=true", "model_quant_use_transformer_engine=true"], "base.safetensors", "TransformerEngine is not installed"),
        (["model_quant=true", "model_quant_backend=native"], "base.safetensors", "no FP4 tensor cores"),
        (["fp8_quant=true", "fp8_backend=torchao"], "base.safetensors", "torchao"),
        (["model_quant=true", "model_quant_filtered_modules=[blocks.0.ffn.1000]"], "base.safetensors", "no module of the model"),
        (["model_quant=true", f"model_quant_skip_first_blocks={SPEC.dit.layers}"], "base.safetensors", "no linear layer is left"),
        (["model_quant=true", "model_quant_filtered_modules=[blocks.0.ffn.0]"], "packed.pt", "filtered out in the configuration"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_alternative(files, words, file, part):
    with pytest.raises((ConfigError, CheckpointError)) as error:
        loaded(files, *words, file=file)
    assert part in str(error.value) and "\n" not in str(error.value) and ";" in str(error.value)


def test_fallback_from_transformer_engine_is_asked_for(files):
    words = ["model_quant=true", "model_quant_use_transformer_engine=true", "model_quant_te_fallback_to_fouroversix=true"]
    assert {m.backend for m in layers(loaded(files, *words)).values()} == {"w4a16"}


def test_fp8_spares_the_layers_that_read_the_text_by_default_only(files):
    text = {f"blocks.{i}.cross_attn.{leaf}" for i in range(SPEC.dit.layers) for leaf in "kv"}
    assert not text & layers(loaded(files, "fp8_quant=true")).keys()
    assert text <= layers(loaded(files, "fp8_quant=true", "model_quant_use_default_filtered_modules=false")).keys()


def test_blocks_at_both_ends_and_filtered_layers_stay(files):
    names = layers(loaded(files, "fp8_quant=true", "model_quant_skip_first_blocks=1", "model_quant_filtered_modules=['re:cross_attn']"))
    assert names and all(n.startswith("blocks.1.") and "cross" not in n for n in names)


def test_live_lora_stands_beside_quantised_layers_and_none_is_merged_into_packed_ones(files, tmp_path):
    dit = WanDiT(SPEC.dit)
    attach(dit, TINY, rank=2)
    lora = {f"base_model.model.{n}.lora_{side}.weight": torch.randn(t.shape) * 0.1 for n, b in branches(dit) for side, t in (("A", b.a), ("B", b.b))}
    torch.save({"generator_lora": lora}, tmp_path / "few.pt")
    given = [f"checkpoints.lora_ckpt={json.dumps(str(tmp_path / 'few.pt'))}", "adapter={}", "model_quant=true", "infra.model_quant_scale_rule=mse"]
    live = loaded(files, *given, file="packed.pt")
    layer, x = live.blocks[0].ffn[0], torch.randn(1, 3, SPEC.dit.dim)
    assert isinstance(layer, QuantisedLinear) and not torch.equal(layer(x), layer.product(x))
    torch.testing.assert_close(layer(x) - layer.product(x), layer.lora[0](x, torch.zeros(1, 3, layer.out_features)), rtol=1e-3, atol=1e-4)
    merged = loaded(files, *given, "merge_lora=true")
    assert isinstance(merged.blocks[0].ffn[0], QuantisedLinear) and not torch.equal(merged.blocks[0].ffn[0].product(x), layer.product(x))
    with pytest.raises(ConfigError, match="into which no LoRA can be merged; set merge_lora: false"):
        loaded(files, *given, "merge_lora=true", file="packed.pt")


def test_gradients_pass_through_frozen_quantised_layers(files):
    layer = loaded(files, "fp8_quant=true").blocks[0].ffn[0]
    assert isinstance(layer, Fp8Linear)
    x = torch.randn(1, 3, layer.in_features, requires_grad=True)
    layer(x).backward(grad := torch.randn(1, 3, layer.out_features))
    torch.testing.assert_close(x.grad, grad @ layer.dense(torch.float32))
