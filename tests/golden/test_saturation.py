"""What the agreement leaves out of the outlier matrix is one block, and there ours is the nearer one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longlive.evaluation.parity import read_folder
from longlive.evaluation.parity.nvfp4 import SATURATED, keep
from longlive.ops import fp4
from longlive.ops.fp8 import DTYPE
from longlive.ops.nvfp4 import quantise

ENTRY = next(entry for entry in read_folder(Path(__file__).with_name("data")) if entry.name == "nvfp4_outlier")


@pytest.mark.parametrize("rule", ["mse", "mae", "abs_max"])
def test_one_block_is_left_out_and_ours_is_right(rule):
    asked = ENTRY.asking(list(ENTRY.outputs), SATURATED)
    compared = keep(asked, f"1d.{rule}.scales")
    assert (~compared).sum() == 1
    assert keep(asked, f"1d.{rule}.values").sum() == 8 * compared.sum() and keep(asked, f"1d.{rule}.amax") is None
    row, group = (~compared).nonzero()[0].tolist()
    place = slice(group * 16, group * 16 + 16)
    x, packed = ENTRY.inputs["x"], quantise(ENTRY.inputs["x"], rule)
    codes = fp4.decode(fp4.unpack(ENTRY.outputs[f"1d.{rule}.values"]))[row, place]
    theirs = codes * ENTRY.outputs[f"1d.{rule}.scales"].view(DTYPE).float()[row, group] * packed.decode_scale
    wanted, ours = x[row, place].float(), packed.dequantise(torch.float32)[row, place]
    assert (ours - wanted).square().sum() < (theirs - wanted).square().sum()
    largest = wanted.abs().argmax()
    assert theirs[largest] == 0 and ours[largest] * wanted[largest] > 0


def test_without_the_setting_everything_is_compared():
    assert keep(ENTRY.asking(["1d.mse.scales"]), "1d.mse.scales") is None
