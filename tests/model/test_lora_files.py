"""LoRA files: every layout means the same adapter; what is not LoRA, or not of this model, is said in one line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dit_toys import toy_dit
from lora_toys import SPEC, toy_adapter, velocity
from safetensors.torch import load_file, save_file

from longlive.core.errors import CheckpointError, InputError
from longlive.models.lora import Adapter, add, adapter_state, attach, lora_layers
from longlive.models.lora_files import WRITERS, holds_lora, is_lora, layer_name, read_lora, write_lora
from longlive.models.shipped import ADAPTERS, adapter_path
from longlive.models.spec import TINY
from longlive.models.wan_dit import WanDiT

Q = "blocks.0.self_attn.q"


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: layer.scale * layer.b_OR.double() @ layer.a_RI.double() for name, layer in adapter.layers.items()}


def same(found: Adapter, expected: Adapter, **tolerance):
    a, b = deltas(found), deltas(expected)
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **{"rtol": 1e-6, "atol": 1e-7, **tolerance}, msg=name)


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_reads_back_as_the_same_adapter(tmp_path, layout):
    adapter = toy_adapter(alpha=4.0, dtype=torch.float32)
    path = write_lora(tmp_path / f"style{WRITERS[layout][0]}", adapter, layout)
    found = read_lora(path)
    assert found.name == "style" and found.rank == 3
    same(found, adapter)
    assert not [p for p in tmp_path.rglob("*.tmp")]
    with pytest.raises(InputError, match="exists"):
        write_lora(path, adapter, layout)


@pytest.mark.parametrize("layout", WRITERS)
def test_layers_of_different_ranks_and_scales_keep_them(tmp_path, layout):
    wide, narrow = toy_adapter(rank=4, alpha=2.0, dtype=torch.float32), toy_adapter(rank=2, alpha=6.0, only="cross_attn", seed=7, dtype=torch.float32)
    mixed = replace(wide, layers=wide.layers | narrow.layers)
    found = read_lora(write_lora(tmp_path / f"mixed{WRITERS[layout][0]}", mixed, layout))
    same(found, mixed)
    assert found.rank is None and mixed.rank is None


def test_written_names_are_those_of_each_tool(tmp_path):
    adapter = toy_adapter(only=Q, dtype=torch.float32)
    out = replace(adapter, layers={"blocks.7.cross_attn.o": adapter.layers[Q], "blocks.7.ffn.0": adapter.layers[Q]})
    names = {}
    for layout in ("diffusers", "comfyui", "kohya"):
        names[layout] = sorted(load_file(write_lora(tmp_path / f"{layout}.safetensors", out, layout)))
    assert names["diffusers"][:2] == ["transformer.blocks.7.attn2.to_out.0.lora_A.weight", "transformer.blocks.7.attn2.to_out.0.lora_B.weight"]
    assert names["diffusers"][2] == "transformer.blocks.7.ffn.net.0.proj.lora_A.weight"
    assert names["comfyui"][:2] == ["diffusion_model.blocks.7.cross_attn.o.alpha", "diffusion_model.blocks.7.cross_attn.o.lora_down.weight"]
    assert names["kohya"][0] == "lora_unet_blocks_7_cross_attn_o.alpha" and names["kohya"][-1] == "lora_unet_blocks_7_ffn_0.lora_up.weight"
    peft = write_lora(tmp_path / "peft", out, "peft")
    assert sorted(load_file(peft / "adapter_model.safetensors"))[0] == "base_model.model.blocks.7.cross_attn.o.lora_A.weight"
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6.0, "LORA") and "blocks.7.ffn.0" in config["target_modules"]
    content = torch.load(write_lora(tmp_path / "a.pt", out, dtype=torch.bfloat16), weights_only=True)
    assert set(content) == {"generator_lora", "lora_rank", "lora_alpha"}
    assert {t.dtype for t in content["generator_lora"].values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        ("base_model.model.blocks.0.ffn.2", "blocks.0.ffn.2"),
        ("base_model.model.model.blocks.0.ffn.2", "blocks.0.ffn.2"),
        ("blocks.11.cross_attn.v", "blocks.11.cross_attn.v"),
        ("transformer.blocks.11.attn2.to_v", "blocks.11.cross_attn.v"),
        ("transformer.blocks.3.ffn.net.0.proj", "blocks.3.ffn.0"),
        ("diffusion_model.blocks.3.ffn.2", "blocks.3.ffn.2"),
        ("model.diffusion_model.blocks.3.self_attn.o", "blocks.3.self_attn.o"),
        ("lora_unet_blocks_3_self_attn_q", Q.replace("0", "3")),
        ("lora_unet_blocks_3_attn1_to_out_0", "blocks.3.self_attn.o"),
        ("lora_transformer_blocks_12_ffn_net_0_proj", "blocks.12.ffn.0"),
        ("lora_unet_blocks_12_ffn_net_2", "blocks.12.ffn.2"),
        ("lora_unet_blocks_12_ffn_0", "blocks.12.ffn.0"),
    ],
)
def test_layer_names_of_other_tools(written, ours):
    assert layer_name(written) == ours


@pytest.mark.parametrize("ending", ["lora_A.default.weight", "lora_A.weight", "lora_down.weight", "lora.down.weight"])
def test_endings_of_other_tools(tmp_path, ending):
    layer = toy_adapter(only=Q, dtype=torch.float32).layers[Q]
    other = ending.replace("A", "B").replace("down", "up")
    save_file({f"base_model.model.{Q}.{ending}": layer.a_RI, f"base_model.model.{Q}.{other}": layer.b_OR}, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors")
    assert is_lora(tmp_path / "x.safetensors")
    assert list(found.layers) == [Q] and found.layers[Q].alpha is None and found.layers[Q].scale == 1.0
    assert torch.equal(found.layers[Q].a_RI, layer.a_RI) and found.with_alpha(6.0).layers[Q].scale == 2.0


def test_training_containers_hold_two_adapters(tmp_path):
    dit = toy_dit()
    attach(dit, SPEC, rank=2)
    state = {key: tensor.detach() for key, tensor in adapter_state(dit).items()}
    critic = {key: tensor + 1 for key, tensor in state.items()}
    torch.save({"generator_lora": state, "critic_lora": critic, "step": 7}, tmp_path / "model.pt")
    assert read_lora(tmp_path / "model.pt").metadata["step"] == 7
    found = read_lora(tmp_path / "model.pt", entry="critic_lora", name="critic")
    assert found.name == "critic" and torch.equal(found.layers[Q].b_OR, critic[f"base_model.model.{Q}.lora_B.weight"])
    assert holds_lora(tmp_path / "model.pt")
    torch.save(state, tmp_path / "bare.pt")
    assert set(read_lora(tmp_path / "bare.pt").layers) == set(found.layers) and not holds_lora(tmp_path / "bare.pt")


def test_rank_stabilised_and_diffusers_scales_are_understood(tmp_path):
    adapter = toy_adapter(rank=4, alpha=8.0, only=Q, dtype=torch.float32)
    folder = write_lora(tmp_path / "peft", adapter, "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert read_lora(folder).layers[Q].scale == 8.0 / 4**0.5
    assert read_lora(folder / "adapter_model.safetensors").layers[Q].scale == 8.0 / 4**0.5
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {"self_attn.q": 2.0}}))
    assert read_lora(folder).layers[Q].scale == 0.5
    tensors = {f"transformer.blocks.0.attn1.to_q.lora_{side}.weight": t for side, t in zip("AB", (adapter.layers[Q].a_RI, adapter.layers[Q].b_OR))}
    save_file(tensors, tmp_path / "d.safetensors", {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 12})})
    assert read_lora(tmp_path / "d.safetensors").layers[Q].scale == 3.0


def test_what_is_no_lora_of_wan_is_refused_by_its_keys(tmp_path):
    a, b = torch.zeros(2, 48), torch.zeros(48, 2)
    good = {f"diffusion_model.{Q}.lora_A.weight": a, f"diffusion_model.{Q}.lora_B.weight": b}
    cases = {
        "diff": (good | {f"diffusion_model.{Q}.diff_b": torch.zeros(48)}, "diff_b fit no LoRA layer"),
        "flux": (
            {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": a, "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": b},
            "fit no LoRA layer",
        ),
        "te": (good | {"lora_te_text_model_encoder.lora_down.weight": a.clone()}, "lora_te_text_model_encoder.lora_down.weight fit no"),
        "half": ({f"{Q}.lora_A.weight": a}, "has no B"),
        "ranks": ({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": torch.zeros(48, 3)}, "two ranks"),
        "twice": (good | {f"{Q}.lora_A.weight": a.clone()}, "two keys mean A of blocks.0.self_attn.q"),
    }
    for name, (tensors, words) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=words) as caught:
            read_lora(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value) and name in str(caught.value)
    torch.save({"step": 3}, tmp_path / "nothing.pt")
    with pytest.raises(CheckpointError, match="no generator_lora entry"):
        read_lora(tmp_path / "nothing.pt")
    folder = write_lora(tmp_path / "dora", toy_adapter(only=Q), "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora = True is more than plain LoRA"):
        read_lora(folder)


def test_an_adapter_of_another_model_is_refused_in_one_line():
    wide = toy_adapter(only=Q)
    layers = {Q: replace(wide.layers[Q], a_RI=torch.zeros(3, 96)), "blocks.9.ffn.0": wide.layers[Q]}
    with pytest.raises(CheckpointError, match=r"blocks.9.ffn.0 is not in it \(and 1 more\)") as caught:
        add(toy_dit(), SPEC, replace(wide, layers=layers))
    with pytest.raises(CheckpointError, match="blocks.0.self_attn.q is 96 -> 48 in the LoRA and 48 -> 48 in the model"):
        add(toy_dit(), SPEC, replace(wide, layers={Q: layers[Q]}))
    assert "\n" not in str(caught.value)


def test_writing_asks_for_a_layout_and_its_ending(tmp_path):
    with pytest.raises(InputError, match="unknown LoRA layout 'onnx'"):
        write_lora(tmp_path / "a.pt", toy_adapter(), "onnx")
    with pytest.raises(InputError, match="ends with .safetensors"):
        write_lora(tmp_path / "a.pt", toy_adapter(), "kohya")
    with pytest.raises(InputError, match="a folder"):
        write_lora(tmp_path / "a.pt", toy_adapter(), "peft")


@torch.no_grad()
def test_peft_reads_our_folder_and_computes_the_same(tmp_path):
    from peft import PeftModel

    adapter = toy_adapter(rank=4, alpha=2.0, dtype=torch.float32)
    mixed = replace(adapter, layers=adapter.layers | toy_adapter(rank=2, alpha=6.0, only="cross_attn", dtype=torch.float32).layers)
    folder = write_lora(tmp_path / "peft", mixed, "peft")
    ours, theirs = toy_dit(torch.float32), toy_dit(torch.float32)
    add(ours, SPEC, read_lora(folder))
    PeftModel.from_pretrained(theirs, str(folder))  # it changes the network in place
    torch.testing.assert_close(velocity(ours), velocity(theirs), rtol=1e-4, atol=1e-5)
    assert (velocity(ours) - velocity(toy_dit(torch.float32))).abs().max() > 0.01


def test_a_truncated_lora_is_the_nearest_of_its_rank():
    layer = toy_adapter(rank=4, alpha=6.0, only=Q).layers[Q]
    product = (layer.scale * layer.b_OR @ layer.a_RI).float()
    singular = torch.linalg.svdvals(product)
    for rank in (1, 3, 4, 9):
        near = layer.truncated(rank)
        off = near.scale * near.b_OR @ near.a_RI - product
        assert near.rank == min(rank, 4) and near.scale == 1.0 and near.features == layer.features
        assert off.norm().item() == pytest.approx(singular[rank:].norm().item(), abs=1e-5)
    with pytest.raises(InputError, match="at least 1"):
        toy_adapter(only=Q).truncated(0)


def test_adapters_that_ship_are_named():
    for name in ADAPTERS:
        adapter = read_lora(adapter_path(name))
        assert adapter.metadata["steps"] == name.removeprefix("tiny-").removesuffix("steps") and adapter.rank == adapter.alpha
        assert set(adapter.layers) == set(lora_layers(WanDiT(TINY.dit), TINY))
    assert adapter_path("own.pt") == Path("own.pt")
