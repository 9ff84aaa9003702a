"""Which linear layers are quantised."""

from __future__ import annotations

import pytest
import torch

from longlive.core.errors import ConfigError
from longlive.models.spec import WAN22_TI2V_5B
from longlive.models.wan_dit import WanDiT
from longlive.models.weights import build_on_meta
from longlive.precision.selection import quantised_linears


@pytest.fixture(scope="module")
def model():
    return build_on_meta(lambda: WanDiT(WAN22_TI2V_5B.dit))


def test_300_of_306_linears_of_the_5b_model(model):
    names = quantised_linears(model)
    everything = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(names) == 300 and len(everything) == 306 and all(n.startswith("blocks.") for n in names)
    assert len(quantised_linears(model, default=False)) == 306


def test_more_layers_may_be_kept(model):
    assert len(quantised_linears(model, [r"re:^blocks\.(0|29)\.", "blocks.3.ffn.0"])) == 300 - 20 - 1


def test_an_entry_that_names_nothing_is_refused(model):
    with pytest.raises(ConfigError, match="'blocks.3.fnn.0' is no module of the model; did you mean blocks.3.ffn.0"):
        quantised_linears(model, ["blocks.3.fnn.0"])
    with pytest.raises(ConfigError, match="no regular expression"):
        quantised_linears(model, ["re:("])
    with pytest.raises(ConfigError, match="all 306 linear layers"):
        quantised_linears(model, ["re:."])
