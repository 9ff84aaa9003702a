"""Where frames are decoded: the documented keys, on a machine that seems to have GPUs."""

import pytest
import torch

from longlive.config.load import default_config
from longlive.core.errors import InputError
from longlive.engine.pipeline import decode_place

FIRST, SECOND, CPU = torch.device("cuda:0"), torch.device("cuda:1"), torch.device("cpu")


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    "keys, device, expected",
    [
        (["streaming_vae=false"], FIRST, ("inline", FIRST)),
        (["streaming_vae=false", "async_vae=true", "vae_device=cuda:1"], FIRST, ("inline", FIRST)),
        (["streaming_vae=true", "async_vae=true"], FIRST, ("side-stream", FIRST)),
        (["streaming_vae=true", "async_vae=true"], CPU, ("inline", CPU)),
        (["streaming_vae=true", "vae_device=cuda:1"], FIRST, ("other-device", SECOND)),
        (["streaming_vae=true", "vae_device=cpu"], FIRST, ("other-device", CPU)),
        (["streaming_vae=true", "async_vae=true", "vae_device=cuda"], FIRST, ("side-stream", FIRST)),
    ],
)
def test_keys_choose_the_stage(keys, device, expected):
    config = default_config("tiny", [f"inference.{key}" for key in keys])
    assert decode_place(config, device) == expected


@pytest.mark.parametrize("name", ["cuda:2", "gpu"])
def test_a_device_that_is_not_there_is_named(name):
    config = default_config("tiny", ["inference.streaming_vae=true", f"inference.vae_device={name}"])
    with pytest.raises(InputError, match="inference.vae_device"):
        decode_place(config, FIRST)
