"""Checkpoints of quantised weights: ours and the published container, and every way in which one can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from longlive.core.errors import CheckpointError
from longlive.models.files import open_file
from longlive.models.fouroversix import container, is_fouroversix, read, read_container, rule_of, write
from longlive.models.quantised_files import HEADER, from_plain, is_quantised, possible_rules, to_plain
from longlive.models.weights import save_state
from longlive.ops import mxfp4
from longlive.ops.fp8 import quantise_rows
from longlive.ops.nvfp4 import RULES, quantise

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "nvfp4_linear.safetensors"
NAME, PATH = "blocks.0.ffn.0.weight", "model.blocks.0.ffn.0.quantized_weight_"


def matrix(rows=70, columns=48, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


REST = {"blocks.0.ffn.0.bias": torch.ones(70, dtype=torch.bfloat16), "head.head.weight": matrix(4, 4)}


def packed(rule="mse", **more):
    return {NAME: quantise(matrix(), rule, **more), "blocks.0.ffn.2.weight": quantise(matrix(128, 64, 1), rule, **more)}


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("tile", [1, 16])
def test_the_published_container_gives_back_what_was_put_in(rule, tile):
    content = container(packed(rule, tile=tile), REST, {"activation_scale_rule": "mse"}, model_name="Wan2.2-TI2V-5B")
    assert content["checkpoint_format"] == "longlive_generator_nvfp4" and content["checkpoint_version"] == 1 and rule_of(content) == rule
    assert is_fouroversix(content["generator"])
    weights, rest = read_container(content, content["generator"])
    assert weights == packed(rule, tile=tile) and same_tensors(rest, REST)


def test_its_tensors_have_the_published_shapes_and_types():
    state = write(packed(), REST)
    found = {key.removeprefix(PATH): (list(t.shape), t.dtype) for key, t in state.items() if key.startswith(PATH)}
    assert found == {
        "values": ([128, 32], torch.uint8), "scale_factors": ([512], torch.float8_e4m3fn),
        "amax": ([1], torch.float32), "metadata": ([4], torch.int32),
    }  # fmt: skip
    assert state[PATH + "metadata"].tolist() == [70, 48, 128, 64] and NAME not in state and "model." + NAME not in state


def test_it_survives_torch_save(tmp_path):
    torch.save(container(packed(), REST, {}), tmp_path / "model_4o6.pt")
    content, _, _ = open_file(tmp_path / "model_4o6.pt")
    assert read_container(content, content["generator"])[0] == packed()


@pytest.mark.parametrize("rule", ["static_6", "mse"])
@pytest.mark.parametrize("amax_shape", [(), (1,)])
def test_tensors_of_the_published_code_are_read(rule, amax_shape):
    """Recorded buffers of a materialised layer; the CPU backend leaves amax without dimensions, the CUDA backend with one."""
    with safe_open(GOLDEN, "pt") as file:
        g = {key: file.get_tensor(key) for key in file.keys()}
    parts = {"values": "w_values", "amax": "w_amax", "metadata": "w_metadata"}
    state = {PATH + part: g[f"out/{rule}.{name}"] for part, name in parts.items()}
    state[PATH + "amax"] = state[PATH + "amax"].reshape(amax_shape)
    state[PATH + "scale_factors"] = g[f"out/{rule}.w_scale_factors"].view(torch.float8_e4m3fn)
    weights, rest = read(state, rule)
    assert weights == {NAME: quantise(g["in/weight"], rule)} and not rest


@pytest.mark.parametrize("made", list(RULES))
@pytest.mark.parametrize("said", list(RULES))
def test_a_wrong_rule_is_refused_from_the_numbers(made, said):
    state = write(packed(made), REST)
    if RULES[made][:2] == RULES[said][:2]:
        assert read(state, said)[0][NAME].dequantise().equal(packed(made)[NAME].dequantise())
    else:
        with pytest.raises(CheckpointError, match=f"said to be quantised by {said}, but its numbers come from .*off by"):
            read(state, said)


def test_what_the_numbers_say():
    assert possible_rules(quantise(torch.zeros(4, 16), "mse")) == tuple(RULES)
    assert possible_rules(quantise(matrix(), "static_4", tile=16)) == ("static_4",)
    assert possible_rules(quantise(matrix(), "mae").swizzled()) == ("mse", "mae", "abs_max")
    assert possible_rules(quantise(matrix(), "mse", amax=torch.tensor(100.0))) == ()


def test_configuration_and_container_must_agree():
    content = container(packed(), REST, {})
    state = content["generator"]
    assert read_container(content, state, "l1_norm")[0] == packed()  # scales alike
    with pytest.raises(CheckpointError, match="quantised by mse and the configuration says static_6; set the weight scale rule to mse"):
        read_container(content, state, "static_6")
    assert read_container(state, state, "mse")[0] == packed()
    with pytest.raises(CheckpointError, match="names no scale rule"):
        read_container(state, state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"checkpoint_format": "longlive_generator_te_nvfp4"}, "is not read; save it again as merged bf16"),
        ({"checkpoint_version": 2}, "version 2"),
        ({"quantization": {}}, "scale rule None"),
        ({"quantization": {"scale_rule": "best"}}, "scale rule 'best'"),
    ],
)
def test_other_containers_are_refused(change, says):
    content = container(packed(), REST, {}) | change
    with pytest.raises(CheckpointError, match=says):
        rule_of(content)


def test_the_rule_of_the_weights_comes_before_the_general_one():
    content = container(packed(), REST, {})
    assert rule_of(content | {"quantization": {"scale_rule": "static_6", "weight_scale_rule": "mae"}}) == "mae"
    assert rule_of(content | {"quantization": {"scale_rule": "static_6", "weight_scale_rule": None}}) == "static_6"


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("scale_factors", None, "lacks quantized_weight_scale_factors"),
        ("scale_factors", lambda t: t.to(torch.bfloat16), "a cast of the whole file destroyed it"),
        ("scale_factors", lambda t: t[:-4], "508 scales do not fit"),
        ("amax", lambda t: t.half(), "a cast of the whole file destroyed it"),
        ("amax", lambda t: t.expand(2), "amax 1, not 4 and 2"),
        ("amax", lambda t: t * float("nan"), "the largest value .amax. nan"),
        ("amax", lambda t: -t, "the largest value .amax. -"),
        ("values", lambda t: t[:64], "do not fit metadata"),
        ("metadata", lambda t: t + 1, "do not fit metadata"),
    ],
)
def test_damage_is_refused(part, change, says):
    state = write(packed(), REST)
    tensor = state.pop(PATH + part)
    if change is not None:
        state[PATH + part] = change(tensor)
    with pytest.raises(CheckpointError, match=says):
        read(state, "mse")


def test_strange_keys_are_refused_and_the_transposed_copy_is_left_out():
    state = write(packed(), REST)
    assert read(state | {PATH + "transposed_values": torch.zeros(1)}, "mse")[0] == packed()
    with pytest.raises(CheckpointError, match="no part of a packed weight"):
        read(state | {PATH + "zero_points": torch.zeros(1)}, "mse")
    with pytest.raises(CheckpointError, match="both packed and unpacked"):
        read(state | {"model." + NAME: torch.zeros(1)}, "mse")


def test_what_a_container_cannot_hold_is_refused():
    with pytest.raises(CheckpointError, match="one scale rule for its weights, not 2"):
        container(packed("mse") | {"x.weight": quantise(matrix(), "static_6")}, REST, {})
    with pytest.raises(CheckpointError, match="has no place"):
        write({"x.modulation": quantise(matrix())}, {})


EVERY = {**packed(), "a.weight": quantise(matrix(), "static_6", tile=16), "b.weight": mxfp4.quantise(matrix()), "c.weight": quantise_rows(matrix())}


def test_our_file_gives_back_what_was_put_in(tmp_path):
    save_state(tmp_path / "w.safetensors", *to_plain(EVERY | {"s.weight": packed()[NAME].swizzled()}, REST))
    tensors, metadata, _ = open_file(tmp_path / "w.safetensors")
    assert is_quantised(metadata)
    quantised, rest = from_plain(tensors, metadata)
    assert quantised == EVERY | {"s.weight": EVERY[NAME]} and same_tensors(rest, REST)
    assert tensors[NAME + ".nvfp4.gscale"] == EVERY[NAME].amax / 1536
    assert json.loads(metadata[HEADER])["tensors"][NAME]["e4m3_max"] == 256


def test_a_file_without_quantised_weights_is_all_rest():
    assert from_plain(REST, {})[0] == {} and same_tensors(from_plain(REST, {})[1], REST) and not is_quantised({})


def changed(header_change=lambda h: None, tensor_change=lambda t: None):
    tensors, metadata = to_plain(EVERY, REST)
    header = json.loads(metadata[HEADER])
    header_change(header)
    tensor_change(tensors)
    return tensors, {HEADER: json.dumps(header)}


@pytest.mark.parametrize(
    ("header", "tensors", "says"),
    [
        (lambda h: h.update(version=2), None, "version 2 and this program reads 1"),
        (lambda h: h["tensors"][NAME].update(rule="static_6", e4m3_max=448.0), None, f"{NAME} is said to be quantised by static_6, but"),
        (lambda h: h["tensors"][NAME].update(rule="static_6"), None, "another rule"),
        (lambda h: h["tensors"][NAME].update(format="fp2"), None, "'fp2' is unknown"),
        (lambda h: h["tensors"].pop(NAME), None, "metadata does not describe"),
        (lambda h: h.pop("tensors"), None, "cannot be read"),
        (None, lambda t: t.pop(NAME + ".nvfp4.scales"), f"{NAME}: a nvfp4 tensor lacks its scales"),
        (None, lambda t: t.update({NAME + ".nvfp4.gscale": torch.tensor(1.0)}), "gscale is not amax / 1536"),
        (None, lambda t: t.update({NAME + ".nvfp4.amax": -t[NAME + ".nvfp4.amax"], NAME + ".nvfp4.gscale": -t[NAME + ".nvfp4.gscale"]}), "the largest value"),
        (None, lambda t: t.update({"c.weight.fp8.scales": t["c.weight.fp8.scales"].bfloat16()}), "a cast of the file destroyed them"),
    ],
)
def test_a_damaged_file_of_ours_is_refused(header, tensors, says):
    nothing = lambda value: None  # noqa: E731
    with pytest.raises(CheckpointError, match=says):
        from_plain(*changed(header or nothing, tensors or nothing))


def test_a_name_is_quantised_or_not():
    with pytest.raises(CheckpointError, match="both quantised and not"):
        to_plain(EVERY, {NAME: matrix()})
