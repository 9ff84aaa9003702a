"""The plan's arithmetic against recorded counts of the 5B model (spec inference §0, §5.1)."""

import pytest

from longlive.core.geometry import Geometry
from longlive.engine.estimate import chunk_flop, decode_flop, dit_parameters, vae_parameters
from longlive.models.spec import WAN22_TI2V_5B


def test_counts_of_the_5b_model():
    dims = WAN22_TI2V_5B.dit
    assert dit_parameters(dims) == pytest.approx(4_999_787_712, rel=0.01)
    assert chunk_flop(dims, 7040, 4 * 7040) == pytest.approx(136.1e12, rel=0.02)
    assert decode_flop(256, Geometry(704, 1280), 8) == pytest.approx(530e12, rel=0.01)
    assert vae_parameters(WAN22_TI2V_5B.vae) == pytest.approx(704.7e6, rel=0.01)
