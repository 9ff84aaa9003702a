"""The configuration files of the repository."""

from pathlib import Path

import pytest

from longlive.config import load_config

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))

DOCUMENTED = """inference inference_i2v inference_sp train_ar train_i2v_ar train_dmd train_i2v_dmd
nvfp4/inference_nvfp4 nvfp4/train_ar_nvfp4 nvfp4/train_dmd_nvfp4_step4""".split()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_file_passes_the_check(path):
    config = load_config(path)
    assert config.chunk_frames == 8


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_file_exists(name):
    assert (ROOT / "configs" / f"{name}.yaml").is_file()


LENGTHS = {"inference": 128, "inference_i2v": 128, "inference_sp": 128, "nvfp4/inference_nvfp4": 384, "fp8/inference_fp8": 8}


@pytest.mark.parametrize("name, frames", LENGTHS.items())
def test_shipped_values(name, frames):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    i = config.inference
    assert (i.local_attn_size, i.sink_size, i.multi_shot_sink, i.multi_shot_rope_offset) == (32, 8, True, 8.0)
    assert (i.sampling_steps, i.guidance_scale) == (4, 1.0)
    assert config.num_output_frames == frames and config.model_kwargs.timestep_shift == 5.0
