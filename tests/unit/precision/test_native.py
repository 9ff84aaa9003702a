"""The FP4 tensor cores' product without the cores: a stand-in for torch's scaled_mm that decodes the swizzled buffers it is handed and multiplies in float64.

And the probe: which backend each family of cards gets, and what it is told where it lacks one.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longlive.core.errors import ConfigError
from longlive.ops import fp4, fp4_matmul, nvfp4
from longlive.ops.scale_layout import unswizzle
from longlive.precision.backends import BACKENDS, FLOATING, PACKED, best_packed, choose
from longlive.precision.capability import Capability, family_of
from longlive.precision.linear import EmulatedLinear, NativeLinear


def decoding_scaled_mm(a, b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a, swizzle_b, bias, output_dtype):
    """What cuBLASLt is documented to do with such arguments (spec nvfp4 §1.5, §1.6, §5.1); anything else is refused."""
    assert a.dtype == b.dtype == torch.float4_e2m1fn_x2 and a.is_contiguous() and b.t().is_contiguous() and output_dtype == torch.bfloat16
    kinds = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    orders = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    assert scale_recipe_a == scale_recipe_b == kinds and swizzle_a == swizzle_b == orders and bias.dtype == torch.bfloat16
    values = []
    for packed, (scales, whole) in ((a, scale_a), (b.t(), scale_b)):
        rows, columns = packed.shape[0], packed.shape[1] * 2
        assert scales.dtype == torch.float8_e4m3fn and scales.dim() == 1 and whole.dtype == torch.float32 and whole.dim() == 0
        assert scales.numel() == -(-rows // 128) * 128 * -(-columns // 64) * 4
        codes = fp4.decode(fp4.unpack(packed.contiguous().view(torch.uint8))).double().unflatten(1, (-1, 16))
        block = unswizzle(scales.view(torch.uint8), rows, columns // 16).view(torch.float8_e4m3fn).double()
        values.append((codes * block[..., None]).flatten(1) * whole.double())
    return (values[0] @ values[1].t() + bias.double()).to(output_dtype)


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="this torch has no scaled_mm with block scales")
@pytest.mark.parametrize("rule", ["mse", "static_6"])
@pytest.mark.parametrize("rows, width, out", [(5, 64, 32), (130, 192, 160)])
def test_native_hands_over_what_its_twin_computes(monkeypatch, rule, rows, width, out):
    monkeypatch.setattr(F, "scaled_mm", decoding_scaled_mm)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(out, width, generator=generator).bfloat16(), torch.randn(out, generator=generator).bfloat16()
    x = torch.randn(2, rows, width, generator=generator).bfloat16()
    packed = nvfp4.quantise(weight, rule)
    native, twin = NativeLinear(packed, bias, rule), EmulatedLinear(packed, bias, rule)
    torch.testing.assert_close(native(x), twin(x), rtol=2**-7, atol=1e-3)
    native.to(torch.float16).to(torch.bfloat16)
    torch.testing.assert_close(native(x), twin(x), rtol=2**-7, atol=1e-3)


def test_products_are_exact_in_bfloat16():
    """The twin may multiply in bfloat16: code x scale loses nothing there."""
    t = nvfp4.quantise(torch.randn(64, 256) * torch.logspace(-4, 3, 64)[:, None], "mse")
    assert torch.equal(fp4_matmul.products(t).float(), t.products())


def card(family, **more):
    options = {"scaled_mm": True, "scaled_mm_blocks": True, "triton": True, **more}
    return Capability(family=family, name=f"a card of {family}", **options)


@pytest.mark.parametrize(
    "capability, family",
    [((8, 0), "ampere"), ((8, 6), "ampere"), ((8, 9), "ada"), ((9, 0), "hopper"), ((10, 0), "blackwell"), ((10, 3), "blackwell"),
     ((12, 0), "blackwell-consumer"), ((7, 5), "unknown"), ((11, 0), "unknown")],
)  # fmt: skip
def test_families(capability, family):
    assert family_of(*capability) == family


@pytest.mark.parametrize(
    "family, best", [("cpu", "w4a16"), ("ampere", "w4a16"), ("ada", "w4a8"), ("hopper", "w4a8"), ("blackwell", "native"), ("blackwell-consumer", "native")]
)
def test_the_best_backend_of_every_family(family, best):
    assert best_packed(card(family)) == best
    assert choose(None, "model_quant_backend", PACKED, best_packed(card(family)), card(family)).name == best


def test_native_falls_to_what_torch_has():
    assert best_packed(card("blackwell", scaled_mm_blocks=False)) == "w4a16"


@pytest.mark.parametrize(
    "name, capability, reason",
    [
        ("native", card("hopper"), "no FP4 tensor cores: they come with Blackwell; set model_quant_backend: w4a8 or emulated"),
        ("native", card("blackwell", scaled_mm_blocks=False), "no torch.nn.functional.scaled_mm"),
        ("w4a8", card("ampere"), "no FP8 tensor cores: they come with Ada, Hopper and Blackwell; set model_quant_backend: w4a16"),
        ("fp8", card("ampere"), "set fp8_quant: false to run in bf16"),
        ("fp8", card("hopper", scaled_mm=False), "this torch has no scaled_mm"),
        ("torchao", card("hopper"), "pip install torchao"),
        ("te", card("hopper", transformer_engine=True), "datacentre Blackwell only"),
        ("te", card("blackwell"), "TransformerEngine is not installed"),
    ],
)
def test_a_card_that_lacks_a_backend_is_told_why_and_what_instead(name, capability, reason):
    with pytest.raises(ConfigError) as error:
        choose(name, "key", tuple(BACKENDS), name, capability)
    assert reason in str(error.value) and ";" in str(error.value)


def test_published_backend_names_and_unknown_ones():
    assert choose("pytorch", "model_quant_backend", PACKED, "w4a16", card("cpu")).name == "emulated"
    assert choose("cutlass", "model_quant_backend", PACKED, "w4a16", card("blackwell")).name == "native"
    with pytest.raises(ConfigError, match="'fp9' is none of fp8, torchao"):
        choose("fp9", "fp8_backend", FLOATING, "fp8", card("hopper"))


def test_transformer_engine_layers_are_built_as_documented(monkeypatch):
    """Against a stand-in for the package: recipe without what training needs, packed weights, our weights copied in."""
    import sys
    from contextlib import contextmanager
    from types import ModuleType

    from longlive.precision.packages import TransformerEngineLinear

    calls = []

    @contextmanager
    def scope(name, **how):
        calls.append((name, how["enabled"]))
        yield

    class Recipe:
        def __init__(self, **options):
            calls.append(("recipe", options))

    class Linear(torch.nn.Linear):
        def __init__(self, i, o, bias, params_dtype, device, **more):
            calls.append(("linear", more))
            super().__init__(i, o, bias=bias, dtype=params_dtype, device=device)

    te, common, recipes, top = (ModuleType(name) for name in ("te", "common", "recipes", "top"))
    te.Linear, recipes.NVFP4BlockScaling = Linear, Recipe
    te.fp8_model_init = lambda enabled, recipe: scope("init", enabled=enabled)
    te.fp8_autocast = lambda enabled, fp8_recipe: scope("autocast", enabled=enabled)
    top.pytorch, top.common, common.recipe = te, common, recipes
    names = {"transformer_engine": top, "transformer_engine.pytorch": te, "transformer_engine.common": common, "transformer_engine.common.recipe": recipes}
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    plain = torch.nn.Linear(8, 4).bfloat16()
    layer = TransformerEngineLinear(plain, {"nvfp4_4over6": "all"}, {"tp_size": 1}, True)
    x = torch.randn(1, 3, 8).bfloat16()
    assert torch.equal(layer(x), plain(x)) and not any(p.requires_grad for p in layer.parameters())
    assert (layer.in_features, layer.out_features) == (8, 4)
    off = {"disable_rht": True, "disable_stochastic_rounding": True, "disable_2d_quantization": True, "nvfp4_4over6": "all"}
    assert calls == [("recipe", off), ("init", True), ("linear", {"tp_size": 1}), ("autocast", True)]
