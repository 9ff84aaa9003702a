"""The documented NVFP4 training configurations, in a dry run of the shrunk small model: what differs from the files is data, size and model alone."""

from pathlib import Path

import pytest
from dmd_toys import write_generator
from train_toys import shrink_tiny

from longlive.cli.app import run
from longlive.cli.entry import train
from longlive.models import spec

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "nvfp4").glob("train_*.yaml"))
SMALL = [
    "model_kwargs.model_name=tiny", "data.data_path=null", "data.eval_data_path=null", "data.image_or_video_shape=[1,16,48,2,4]",
    "infra.sequence_parallel_size=1", "checkpoints.generator_ckpt=null", "evaluation.interval=0", "training.gradient_accumulation_steps=1",
    "training.min_num_training_frames=16", "training.num_training_frames=16", "training.slice_last_frames=8", "training.batch_size=1",
]  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_documented_nvfp4_training_takes_a_step(path, monkeypatch, tmp_path, capsys, caplog):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()
    weights = [f"checkpoints.generator_ckpt={write_generator(tmp_path)}"]
    flags = ["--logdir", str(tmp_path / "logs"), "--wandb-save-dir", "wandb", "--disable-wandb", "--dry-run"]
    assert run(train, ["--config_path", str(path), *flags, *SMALL, *weights]) == 0, capsys.readouterr().err
    said = caplog.text + capsys.readouterr().err
    form = "trained" if "_ar_" in path.stem else "frozen"  # student and teacher share one frozen network under a LoRA
    assert f"generator: 20 linear layers computed as nvfp4 {form}" in said
    assert not (tmp_path / "logs").exists()
