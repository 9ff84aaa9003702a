"""Both trainers of the small model, from a configuration to weights; stopping and going on changes nothing."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longlive.config import load_config
from longlive.core.errors import CheckpointError, ConfigError, InputError, Interrupted, LongLiveError
from longlive.models import spec
from longlive.models.light_vae import read_codec
from longlive.models.spec import DiTDims, VAEDims
from longlive.models.weights import MERGED_FORMAT, read_state, refuse_lora_on_merged, save_state
from longlive.parallel.mesh import Mesh
from longlive.train import RunOptions, checkpoint, guards, rehearsal, rehearse, run, trainer
from longlive.train.diffusion import DiffusionTask
from longlive.train.export import export_checkpoint
from longlive.train.trainer import Draw, Loop
from longlive.train.vae import VAETask

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

VAE = {
    "model_kwargs": {"model_name": "tiny"},
    "algorithm": {"trainer": "vae"},
    "data": {"image_or_video_shape": [1, 16, 48, 2, 4]},
    "world": {"clips": 2, "chunks": 2, "max_shots": 2},
    "vae": {
        "encoder_base": 4,
        "decoder_base": 4,
        "stages": [
            {"height": 32, "width": 32, "frames": 5, "batch": 2, "fraction": 0.5, "character_crops": 0.75},
            {"height": 32, "width": 64, "frames": 9, "batch": 1, "fraction": 0.5},
        ],
    },
    "training": {"lr": 1.0e-3, "beta1": 0.9, "max_iters": 3, "ema_weight": 0.0, "lr_schedule": "cosine"},
}

AR = {
    "model_kwargs": {"model_name": "tiny"},
    "algorithm": {"trainer": "diffusion", "teacher_forcing": True, "i2v": True},
    "data": {"image_or_video_shape": [1, 16, 48, 2, 4]},
    "world": {"clips": 3, "chunks": 3, "max_shots": 3, "refresh": 1, "wordings": 2, "memory": 0.5},
    "infra": {"gradient_checkpointing": False},
    "training": {
        "optimizer": "muon",
        "lr": 1.0e-3, "beta1": 0.9, "max_iters": 4, "log_iters": 2, "batch_size": 2, "noisy_copies": 2, "ema_weight": 0.9, "ema_start_step": 0,
        "visibility": "window", "shot_offset": True, "position_gap": 512, "position_gap_prob": 0.5, "text_dropout": 0.3, "context_noise": 0.15,
        "context_noise_prob": 0.7, "character_weight": 3.0, "i2v_prob": 0.5, "lr_schedule": "cosine",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    """`tiny` with a network of seconds instead of minutes."""
    dit = DiTDims(dim=32, ffn=64, layers=2, heads=2, text_dim=20, text_len=64)
    monkeypatch.setitem(spec.MODELS, "tiny", replace(spec.TINY, dit=dit))


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    results = run(load_config(VAE), folder, RunOptions(save=False))
    return folder, results


@pytest.fixture
def ar_config(vae_folder):
    return load_config(AR, [f"checkpoints.vae_ckpt={vae_folder[0] / 'vae.safetensors'}"])


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def test_the_vae_trainer_writes_a_codec_with_two_rows_of_statistics(vae_folder):
    folder, results = vae_folder
    assert list(losses(folder)) == [1, 2, 3] and results["psnr"] > 3
    codec = read_codec(folder / "vae.safetensors", VAEDims(encoder_base=16, decoder_base=24))
    assert codec.vae.dims.encoder_base == 4 and codec.mean_KC.shape == (2, 48) and codec.std_KC.min() > 0
    assert not list(folder.glob("checkpoint_model_*"))


def test_what_the_vae_trainer_reports_is_the_mean_of_all_ranks():
    class Two(Mesh):
        """A rank whose neighbour has twice its numbers."""

        def sum(self, tensor):
            return 3 * tensor.detach()

    found = []
    for mesh in (Mesh(), Two(dp_size=2)):
        task = VAETask(load_config(VAE), torch.device("cpu"), mesh)
        loss, columns = task.loss(task.batch(Draw(torch.Generator().manual_seed(1), torch.Generator().manual_seed(1), 0.0)))
        loss.backward()
        found.append((loss.item(), columns["kl"].item(), task.module.conv1.weight.grad))
    (loss, kl, gradient), (both, both_kl, same) = found
    assert both == pytest.approx(1.5 * loss) and both_kl == pytest.approx(1.5 * kl) and torch.equal(gradient, same)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(ar_config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(ar_config, whole)
    run(ar_config, parts)
    shutil.rmtree(checkpoint.folders(parts)[-1])
    assert [f.name for f in checkpoint.folders(parts)] == ["checkpoint_model_000002"]
    run(ar_config, parts)
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    for name in ("raw", "dit"):
        first, second = (read_state(next(f.glob(f"{name}-00001*"))).tensors for f in (whole, parts))
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_stop_signal_saves_and_exits_with_130(ar_config, tmp_path, monkeypatch):
    honest = DiffusionTask.loss

    def loss(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, batch)

    monkeypatch.setattr(DiffusionTask, "loss", loss)
    with pytest.raises(Interrupted) as stopped:
        run(ar_config, tmp_path)
    assert stopped.value.exit_code == 130 and "step 1" in str(stopped.value)
    assert checkpoint.folders(tmp_path)[-1].name == "checkpoint_model_000001" and list(losses(tmp_path)) == [1]


def test_a_later_leg_starts_from_the_weights_alone(ar_config, tmp_path):
    run(ar_config.with_overrides(["training.max_iters=1"]), tmp_path / "one")
    start = tmp_path / "one" / "raw-00001-of-00001.safetensors"
    leg = ar_config.with_overrides([f"checkpoints.generator_ckpt={start}", "training.max_iters=1", "training.lr=1e-12"])
    run(leg, tmp_path / "two")
    before, after = (read_state(f / "raw-00001-of-00001.safetensors").tensors for f in (tmp_path / "one", tmp_path / "two"))
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    assert list(losses(tmp_path / "two")) == [1]


def test_a_checkpoint_of_another_trainer_is_refused(ar_config, tmp_path):
    run(ar_config.with_overrides(["training.max_iters=1"]), tmp_path)
    with pytest.raises(CheckpointError, match="written by trainer 'diffusion'"):
        run(load_config(VAE), tmp_path)
    run(load_config(VAE, ["training.max_iters=1"]), tmp_path, RunOptions(auto_resume=False, save=False))


def test_the_command_refuses_bad_input_with_one_line(tmp_path, capsys):
    from longlive.cli.app import app
    from longlive.cli.app import run as command

    assert command(app, ["train", str(tmp_path / "none.yaml"), "--logdir", str(tmp_path)]) == 2
    assert command(app, ["train", str(CONFIGS / "tiny/train_ar.yaml"), "--logdir", str(tmp_path), "training.lrr=1"]) == 2
    assert command(app, ["train", str(CONFIGS / "train_dmd.yaml"), "--logdir", str(tmp_path)]) == 2
    assert command(app, ["train", str(CONFIGS / "train_ar.yaml"), "--logdir", str(tmp_path), "infra.sequence_parallel_size=1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines) and "training.lr" in lines[1]
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_checkpoint_is_exported_and_starts_a_new_run(ar_config, tmp_path, capsys):
    """D13: a new run takes the weights of a checkpoint and neither its step, its optimizer nor its average."""
    from longlive.cli.app import app
    from longlive.cli.app import run as command

    run(ar_config.with_overrides(["training.max_iters=2"]), tmp_path / "old")
    folder = checkpoint.folders(tmp_path / "old")[-1]
    words = ["export", str(tmp_path / "old")]
    assert command(app, [*words, str(tmp_path / "a.pt"), "--dtype", "fp32"]) == 0
    assert command(app, [*words, str(tmp_path / "b.safetensors"), "--ema", "--dtype", "fp32"]) == 0
    assert command(app, [*words, str(tmp_path / "a.pt")]) == 2 and command(app, [*words, str(tmp_path / "c.bin")]) == 2
    assert command(app, ["export", str(tmp_path / "a.pt"), str(tmp_path / "d.pt"), "--ema"]) == 2
    said = capsys.readouterr()
    assert "step 2, trainer diffusion, weights raw, dtype float32" in said.out and said.err.count("\n") == 3 and "no average" in said.err
    container = torch.load(tmp_path / "a.pt", weights_only=True)
    weights, average = read_state(folder).tensors, read_state(folder, use_ema=True).tensors
    assert all(torch.equal(container["generator"][f"model.{name}"], weights[name]) for name in weights)
    assert all(torch.equal(tensor, average[name]) for name, tensor in read_state(tmp_path / "b.safetensors").tensors.items())
    assert any(not torch.equal(weights[name], average[name]) for name in weights)
    for number, start in enumerate((folder, tmp_path / "a.pt")):
        logdir = tmp_path / f"new{number}"
        run(ar_config.with_overrides([f"checkpoints.generator_ckpt={start}", "training.max_iters=1", "training.lr=1e-12"]), logdir)
        assert list(losses(logdir)) == [1] and json.loads((checkpoint.folders(logdir)[-1] / "run.json").read_text())["step"] == 1
        after = read_state(checkpoint.folders(logdir)[-1]).tensors
        assert all(torch.allclose(after[name], weights[name], atol=1e-6) for name in weights)


def test_weights_that_come_of_merged_ones_say_so_and_take_no_lora(ar_config, tmp_path):
    """Through a run, its checkpoints and an export of either: a LoRA that is in the weights is never merged again."""
    run(ar_config.with_overrides(["training.max_iters=1"]), tmp_path / "plain")
    plain = tmp_path / "plain" / "raw-00001-of-00001.safetensors"
    merged = {"checkpoint_format": MERGED_FORMAT, "merged_lora": True, "merged_adapters": "[]", "lora_ckpt": "style.pt", "generator_ckpt": "base.pt"}
    start = save_state(tmp_path / "merged.safetensors", read_state(plain).tensors, merged)
    run(ar_config.with_overrides([f"checkpoints.generator_ckpt={start}", "training.max_iters=1"]), tmp_path / "tuned")
    run(ar_config.with_overrides([f"checkpoints.generator_ckpt={start}", "training.max_iters=2"]), tmp_path / "tuned")  # goes on
    (tuned,) = checkpoint.folders(tmp_path / "tuned")[-1:]
    for source, out in ((start, "a.pt"), (tuned, "b.safetensors"), (tmp_path / "b.safetensors", "c.pt")):
        export_checkpoint(source, tmp_path / out, use_ema=False, container=out.split(".")[1], dtype=torch.float32)
    for place in ("a.pt", "b.safetensors", "c.pt", tuned, next((tmp_path / "tuned").glob("dit-*"))):
        about = read_state(tmp_path / place).metadata
        assert about["merged_adapters"] == "[]" and about["lora_ckpt"] == "style.pt" and "generator_ckpt" not in about
        with pytest.raises(ConfigError, match="already has a LoRA merged"):
            refuse_lora_on_merged(about, "other.pt")
    refuse_lora_on_merged(read_state(plain).metadata | read_state(checkpoint.folders(tmp_path / "plain")[-1]).metadata, "other.pt")


def test_steps_without_a_finite_gradient_are_skipped_and_too_many_end_the_run(ar_config, tmp_path, monkeypatch):
    honest, bad = DiffusionTask.loss, {1}

    def loss(self, batch):
        value, columns = honest(self, batch)
        return value * (float("nan") if batch.step in bad else 1.0), columns

    monkeypatch.setattr(DiffusionTask, "loss", loss)
    run(ar_config.with_overrides(["training.max_iters=3"]), tmp_path / "one")
    rows = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 0] and rows[1]["loss"] is None and rows[2]["loss"] > 0
    kept = read_state(checkpoint.folders(tmp_path / "one")[0]).tensors  # after step 2, which was skipped
    assert all(tensor.isfinite().all() for tensor in kept.values())
    bad.update(range(100))
    monkeypatch.setattr(trainer, "SKIPS_IN_A_ROW", 3)
    with pytest.raises(LongLiveError, match="gradients of steps 4 to 6 are not finite.*the weights are those of step 3.*training.lr"):
        run(ar_config.with_overrides(["training.max_iters=50"]), tmp_path / "one")


@pytest.mark.parametrize("when", ["loss", "__init__"])
@pytest.mark.parametrize("what", [run, lambda config, logdir: rehearse(config)])
def test_out_of_memory_says_what_to_lower(ar_config, tmp_path, monkeypatch, when, what):
    """In a step and before, in a run and in a dry run."""

    def fail(self, *arguments, **options):
        raise torch.OutOfMemoryError("tried to allocate 80.00 GiB")

    monkeypatch.setattr(DiffusionTask, when, fail)
    with pytest.raises(LongLiveError) as stopped:
        what(ar_config, tmp_path)
    said = str(stopped.value)
    assert "80.00 GiB" in said and "training.batch_size(2) or world.chunks(3)" in said
    assert "gradient_checkpointing: true" in said and "sequence_parallel_size(1)" in said and "\n" not in said


def test_a_dry_run_compares_its_estimate_with_the_memory_that_there_is(ar_config, monkeypatch, caplog):
    peak = rehearse(ar_config).memory.peak
    assert peak < guards.room_for(torch.device("cpu")) and "estimated to take" not in caplog.text
    monkeypatch.setattr(rehearsal, "room_for", lambda device: 0.9 * peak)
    assert rehearse(ar_config).row["loss"] > 0
    assert "a step is estimated to take" in caplog.text and "lower training.batch_size(2) or world.chunks(3)" in caplog.text
    monkeypatch.setattr(rehearsal, "room_for", lambda device: 0.5 * peak)
    monkeypatch.setattr(Loop, "rehearse", lambda self: pytest.fail("a step that has no chance was begun"))
    with pytest.raises(InputError, match="a step is estimated to take .* lower training.batch_size"):
        rehearse(ar_config)
