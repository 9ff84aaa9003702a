"""Sizes read from checkpoints."""

import json
from dataclasses import replace

import pytest
import torch

from longlive.core.errors import CheckpointError
from longlive.models.sizes import dit_dims, read_model_config, shapes_of, vae_dims
from longlive.models.spec import TINY, WAN22_TI2V_5B
from longlive.models.wan_dit import WanDiT
from longlive.models.wan_vae import WanVAE


def shapes(factory):
    with torch.device("meta"):
        return shapes_of(factory().state_dict())


SMALL = replace(TINY.dit, dim=96, ffn=160, layers=3, heads=3, text_dim=40, freq_dim=64, text_len=512)


def test_a_small_transformer_is_recognised_in_place_of_the_large_one():
    found = shapes(lambda: WanDiT(SMALL))
    assert dit_dims(found, WAN22_TI2V_5B.dit, {"num_heads": 3}) == SMALL
    assert dit_dims(found, TINY.dit, {"num_heads": 3, "text_len": 7}).text_len == 7


@pytest.mark.parametrize("spec", [TINY, WAN22_TI2V_5B], ids=lambda s: s.name)
def test_models_recognise_themselves_without_a_config(spec):
    assert dit_dims(shapes(lambda: WanDiT(spec.dit)), spec.dit) == spec.dit
    assert vae_dims(shapes(lambda: WanVAE(spec.vae)), spec.vae) == spec.vae


def test_pruned_and_small_decoders_are_recognised():
    found = shapes(lambda: WanVAE(WAN22_TI2V_5B.vae.pruned(0.75)))
    assert vae_dims(found, WAN22_TI2V_5B.vae) == WAN22_TI2V_5B.vae.pruned(0.75)


def test_other_networks_are_left_to_the_strict_loader():
    assert dit_dims({"conv1.weight": (3, 3)}, TINY.dit) is TINY.dit
    assert vae_dims({"blocks.0.x": (3,)}, TINY.vae) is TINY.vae
    other = dict(shapes(lambda: WanDiT(SMALL)), **{"patch_embedding.weight": (96, 16, 1, 2, 2)})
    assert dit_dims(other, TINY.dit) is TINY.dit


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(CheckpointError, match="config.json with num_heads"):
        dit_dims(shapes(lambda: WanDiT(SMALL)), WAN22_TI2V_5B.dit, {"num_heads": 5})


def test_model_config(tmp_path):
    assert read_model_config(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3}))
    assert read_model_config(tmp_path) == {"num_heads": 3}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json"):
        read_model_config(tmp_path)
