"""Quantised tensors as objects: frozen, comparable, saved and read back, safe inside a model that is cast."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from longlive.core.errors import CheckpointError, InputError
from longlive.ops import mxfp4, nvfp4
from longlive.ops.fp8 import quantise_rows
from longlive.ops.packed import BITS, Packed, PackedTensor, from_state

X = torch.randn(20, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
EVERY = {
    "nvfp4": nvfp4.quantise(X, "mae", tile=16),
    "nvfp4 swizzled": nvfp4.quantise(X, "static_4").swizzled(),
    "mxfp4": mxfp4.quantise(X, "ocp"),
    "fp8": quantise_rows(X),
}


@pytest.fixture(params=EVERY, ids=str)
def packed(request) -> PackedTensor:
    return EVERY[request.param]


def test_state_and_description_give_an_equal_tensor(packed):
    again = from_state({k: v.clone() for k, v in packed.state().items()}, packed.describe())
    assert again == packed and torch.equal(again.dequantise(), packed.dequantise()) and again.dtype == torch.bfloat16


def test_one_bit_makes_it_another(packed):
    for name, part in packed.state().items():
        other = part.clone()
        other.view(BITS[part.dtype]).view(-1)[0] ^= 1
        assert dataclasses.replace(packed, **{name: other}) != packed
    assert packed != X and packed != "fp8"


def test_it_is_frozen_and_refuses_a_cast(packed):
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.codes = packed.codes
    with pytest.raises(InputError, match="cannot be cast to torch.bfloat16; use dequantise"):
        packed.to(torch.bfloat16)
    assert packed.to("cpu") == packed


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.double, nn.Module.float, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_casting_a_model_leaves_it_alone(packed, cast):
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "packed": Packed(packed)})
    cast(model)
    assert model["packed"].tensor == packed


def test_a_model_moves_and_loads_it(packed):
    with torch.device("meta"):
        empty = Packed(packed.to("meta"))
    state = Packed(packed).state_dict()
    assert all(not v.is_floating_point() for v in state.values())
    empty.load_state_dict(state, assign=True)
    assert empty.tensor == packed


def test_bytes():
    assert nvfp4.quantise(torch.zeros(128, 64)).bytes == 128 * 64 * 9 // 16 + 4
    assert mxfp4.quantise(torch.zeros(128, 64)).bytes == 128 * 64 * 17 // 32
    assert quantise_rows(torch.zeros(128, 64)).bytes == 128 * 64 + 4 * 128


def test_what_cannot_be_a_quantised_tensor_is_refused(packed):
    parts, description = packed.state(), packed.describe()
    with pytest.raises(CheckpointError, match="'fp3' is unknown"):
        from_state(parts, description | {"format": "fp3"})
    with pytest.raises(CheckpointError, match="lacks its scales"):
        from_state({k: v for k, v in parts.items() if k != "scales"}, description)
    with pytest.raises(CheckpointError, match="have shape"):
        from_state(parts | {"codes": parts["codes"][:-1]}, description)
    with pytest.raises(CheckpointError, match="a cast of the file destroyed them"):
        from_state(parts | {"scales": parts["scales"].to(torch.bfloat16)}, description)
    with pytest.raises(CheckpointError, match="lacks 'shape'"):
        from_state(parts, {k: v for k, v in description.items() if k != "shape"})
    with pytest.raises(CheckpointError, match="'int3' is no dtype"):
        from_state(parts, description | {"dtype": "int3"})


def test_a_rule_that_contradicts_its_own_numbers_is_refused():
    packed = EVERY["nvfp4"]
    with pytest.raises(CheckpointError, match="which is another rule"):
        from_state(packed.state(), packed.describe() | {"e4m3_max": 448.0})
    with pytest.raises(CheckpointError, match="rule 'best'"):
        from_state(packed.state(), packed.describe() | {"rule": "best"})


def test_both_layouts_hold_the_same():
    packed = nvfp4.quantise(X, "mse")
    assert packed.swizzled() != packed and packed.swizzled().linear() == packed and packed.linear() is packed
    assert torch.equal(packed.swizzled().dequantise(), packed.dequantise())
