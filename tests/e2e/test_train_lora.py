"""A LoRA by teacher forcing on the small model: only it learns, it is written and read as one, and a stopped run goes on."""

import json

import pytest
import torch
from dmd_toys import write_generator
from train_toys import losses, shrink_tiny, training, write_vae

from longlive.config import load_config
from longlive.core.errors import ConfigError
from longlive.models import spec
from longlive.models.lora_files import read_lora
from longlive.parallel.mesh import Mesh
from longlive.train import RunOptions, rehearse, run
from longlive.train.lora_training import LoraDiffusionTask, diffusion_task

WORLD = ["data.data_path=null", "world.clips=2", "world.chunks=2", "world.max_shots=2", "training.max_iters=4", "training.log_iters=2"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()
    tree = training("", write_vae(tmp_path), adapter={"rank": 4, "alpha": 8})
    return load_config(tree, [*WORLD, f"checkpoints.generator_ckpt={write_generator(tmp_path)}", "training.ema_weight=0.5", "training.ema_start_step=1"])


def test_only_the_lora_learns(config, tmp_path):
    task = diffusion_task(config, torch.device("cpu"), Mesh())
    assert isinstance(task, LoraDiffusionTask) and [role.name for role in task.roles] == ["generator_lora"]
    assert all(p.requires_grad == (".lora." in name) for name, p in task.module.named_parameters())
    assert not isinstance(diffusion_task(config.with_overrides(["adapter=null"]), torch.device("cpu"), Mesh()), LoraDiffusionTask)
    assert rehearse(config).memory.peak > 0


def test_it_is_written_and_a_stopped_run_goes_on(config, tmp_path):
    run(config, tmp_path / "whole", RunOptions())
    run(config.with_overrides(["training.max_iters=2"]), tmp_path / "half", RunOptions())
    run(config, tmp_path / "half", RunOptions())
    assert losses(tmp_path / "half") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 4
    adapters = [read_lora(tmp_path / folder / "lora.pt") for folder in ("whole", "half")]
    for name, layer in adapters[0].layers.items():
        assert torch.equal(layer.b_OR, adapters[1].layers[name].b_OR) and layer.b_OR.abs().max() > 0
    assert adapters[0].alpha == 8 and read_lora(tmp_path / "whole" / "lora").layers.keys() == adapters[0].layers.keys()
    assert set(json.loads((tmp_path / "whole" / "lora" / "adapter_config.json").read_text())) >= {"r", "lora_alpha"}


def test_one_rank_of_adapter_only(config, tmp_path):
    run(config.with_overrides(["training.max_iters=1"]), tmp_path / "run", RunOptions(save=False))
    again = config.with_overrides([f"checkpoints.lora_ckpt={tmp_path / 'run' / 'lora.pt'}", "adapter.rank=3"])
    with pytest.raises(ConfigError, match=r"adapter.rank\(3\) but .* has rank 4"):
        run(again, tmp_path / "next", RunOptions())
