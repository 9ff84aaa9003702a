"""What number formats cost a whole forward of the 5B network."""

import pytest
import torch

from longlive.bench.precision import BF16, FLOAT32, PrecisionSettings, Scene, relative
from longlive.precision.capability import FP8_FAMILIES, probe

BYTES = 60e9  # float32 weights and pages, and what computes on them
ROOM = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > BYTES and probe("cuda").family in FP8_FAMILIES
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ROOM, reason="needs 60 GB and FP8 tensor cores")]


def test_fp8_errs_at_most_3_times_as_much_as_bf16_and_w4a8_9_times():
    """|y - right| / |right| against float32, random weights, a steady chunk against a full window; measured 2.8 and 7.9 times."""
    scene = Scene(PrecisionSettings(), torch.device("cuda:0"))
    right = scene.forward(scene.network(FLOAT32), scene.store(BF16, torch.float32))()
    pages = scene.store(BF16, torch.bfloat16)
    bf16, fp8, w4a8 = (relative(scene.forward(scene.network(name), pages)(), right) for name in (BF16, "fp8", "w4a8"))
    assert bf16 < 0.02 and fp8 < 3 * bf16 and w4a8 < 9 * bf16
