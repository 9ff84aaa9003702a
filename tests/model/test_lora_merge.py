"""LoRA merged into weights: exact sums, one rounding, and never twice."""

import json
from dataclasses import replace

import pytest
import torch
from dit_toys import toy_dit
from lora_toys import SPEC, toy_adapter, velocity
from safetensors.torch import safe_open

from longlive.core.errors import CheckpointError, ConfigError, InputError
from longlive.models.files import release
from longlive.models.lora import LoraStack, add
from longlive.models.lora_merge import merge_weight, merged_generator, merging, write_merged
from longlive.models.sizes import shapes_of
from longlive.models.wan_dit import WanDiT
from longlive.models.weights import build_on_meta, load_into, native_state, read_state, refuse_lora_on_merged, save_state

PAIR = ((toy_adapter("few", seed=1, dtype=torch.float32), 1.0), (toy_adapter("style", rank=2, alpha=1.0, seed=2, only="ffn", dtype=torch.float32), -0.5))


def stored(tmp_path, dtype=torch.float32):
    return save_state(tmp_path / "base.safetensors", {name: t.to(dtype) for name, t in toy_dit(torch.float32).state_dict().items()})


def state_of(path):
    return native_state(read_state(path, kind="generator"), "generator")


def test_one_rounding_from_the_exact_sum():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = toy_adapter(dtype=torch.float32).layers["blocks.0.ffn.0"]
    exact = weight.double() + layer.scale * layer.b_OR.double() @ layer.a_RI.double()
    once, stepwise = (merge_weight(weight, [(layer, 1.0)], torch.bfloat16, stepwise=s) for s in (False, True))
    assert once.dtype == torch.bfloat16
    assert (once != exact.bfloat16()).sum() <= 2  # float32 sums that fall on the other side of a tie
    assert (once - exact).abs().mean() < 0.95 * (stepwise - exact).abs().mean()
    assert torch.equal(merge_weight(weight, [(layer, 0.0)], torch.bfloat16), weight)


@torch.no_grad()
def test_merged_at_load_is_the_live_stack(tmp_path):
    live = toy_dit(torch.float32)
    for adapter, weight in PAIR:
        add(live, SPEC, adapter, weight=weight)
    state = state_of(stored(tmp_path))
    change = merging(PAIR, SPEC, shapes_of(state.tensors), torch.float32)
    merged = build_on_meta(lambda: WanDiT(SPEC.dit))
    load_into(merged, state, kind="generator", dtype=torch.float32, change=change)
    torch.testing.assert_close(velocity(merged), velocity(live), rtol=1e-4, atol=1e-5)
    LoraStack(live).enable(on=False)
    assert (velocity(merged) - velocity(live)).abs().max() > 0.01


def test_a_float32_base_is_rounded_once_on_its_way_to_bfloat16(tmp_path):
    state = state_of(stored(tmp_path))
    name = "blocks.1.cross_attn.q"
    kept, (adapter, _) = state.tensors[f"{name}.weight"].clone(), PAIR[0]
    dit = build_on_meta(lambda: WanDiT(SPEC.dit))
    load_into(dit, state, kind="generator", dtype=torch.bfloat16, change=merging(PAIR[:1], SPEC, shapes_of(state.tensors), torch.bfloat16))
    expected = (kept + adapter.layers[name].scale * adapter.layers[name].b_OR @ adapter.layers[name].a_RI).bfloat16()
    assert torch.equal(dit.get_submodule(name).weight, expected)
    assert torch.equal(dit.get_submodule("blocks.1.cross_attn.norm_q").weight, toy_dit(torch.float32).blocks[1].cross_attn.norm_q.weight.bfloat16())


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_merged_file_says_what_is_in_it_and_takes_no_lora_again(tmp_path, ending):
    path = tmp_path / f"merged{ending}"
    base = stored(tmp_path)
    tensors, about = merged_generator(state_of(base), PAIR, SPEC, dtype=torch.bfloat16)
    write_merged(path, tensors, about)
    state = state_of(path)
    assert set(state.tensors) == set(toy_dit().state_dict()) and {t.dtype for t in state.tensors.values()} == {torch.bfloat16}
    assert state.metadata["checkpoint_format"] == "longlive_generator_merged_lora" and state.metadata["dtype"] == "bfloat16"
    assert state.metadata["generator_ckpt"] == str(base)
    inside = json.loads(state.metadata["merged_adapters"])
    assert [(a["name"], a["weight"], a["rank"]) for a in inside] == [("few", 1.0, 3), ("style", -0.5, 2)]
    with pytest.raises(ConfigError, match="already has a LoRA merged into it"):
        merged_generator(state, PAIR, SPEC, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="already has a LoRA merged into it"):
        refuse_lora_on_merged(state.metadata, "style.safetensors")
    with pytest.raises(InputError, match="exists"):
        write_merged(path, tensors, about)
    if ending == ".pt":
        content = torch.load(path, weights_only=True)
        assert "model.blocks.0.ffn.0.weight" in content["generator"] and content["merged_lora"] is True
    else:
        assert safe_open(path, "pt").metadata()["merged_lora"] == "true"


def test_merging_gives_mapped_pages_back_and_keeps_what_it_made(tmp_path, monkeypatch):
    given_back = []
    monkeypatch.setattr("longlive.models.lora_merge.release", lambda tensor: (given_back.append(tensor), release(tensor)))
    state = state_of(stored(tmp_path))
    count, before = len(state.tensors), {name: t.clone() for name, t in state.tensors.items()}
    tensors, _ = merged_generator(state, PAIR, SPEC, dtype=torch.float32)
    assert len(given_back) == count and not state.tensors
    assert torch.equal(tensors["head.head.bias"], before["head.head.bias"])
    assert not torch.equal(tensors["blocks.0.ffn.0.weight"], before["blocks.0.ffn.0.weight"])


def test_mistakes(tmp_path):
    adapter, _ = PAIR[0]
    stranger = replace(adapter, layers={"blocks.40.ffn.0": adapter.layers["blocks.0.ffn.0"]})
    with pytest.raises(CheckpointError, match="blocks.40.ffn.0 is not in it"):
        merged_generator(state_of(stored(tmp_path)), [(stranger, 1.0)], SPEC, dtype=torch.float32)
    with pytest.raises(InputError, match="finite"):
        merging([(adapter, float("inf"))], SPEC, shapes_of(toy_dit().state_dict()), torch.float32)
    with pytest.raises(InputError, match="end it with"):
        write_merged(tmp_path / "a.zip", {}, {})
