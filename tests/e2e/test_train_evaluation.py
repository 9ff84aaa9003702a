"""Evaluation as part of a run: the run does not notice it; once before training, with given images, it is all that happens."""

import json

import documented_places
import pytest
import torch
from train_toys import losses, shrink_tiny, training, write_vae

from longlive.cli import entry
from longlive.cli.app import app
from longlive.cli.app import run as command
from longlive.config import load_config
from longlive.models import spec
from longlive.models.vae_fp8 import Fp8Conv
from longlive.models.weights import read_state
from longlive.train import RunOptions, checkpoint, evaluate, run
from longlive.world.judge import ATTRIBUTES

WORLD = ["data.data_path=null", "world.clips=2", "world.chunks=2", "world.max_shots=2", "training.max_iters=3", "training.ema_weight=0.9"]
EVALUATED = ["evaluation.interval=1", "evaluation.use_ema=true", "evaluation.val_batch_size=2", "inference.sampling_steps=1", "inference.vae_fp8=true"]


@pytest.mark.parametrize("how", [["training.compile=false", "infra.gradient_checkpointing=true"], ["training.visibility=window", "training.optimizer=muon"]])
def test_evaluations_leave_the_run_as_it_was(tmp_path, monkeypatch, how):
    """D1: after every step films (decoded as configured), held-out losses and scores of two sets of weights; then the next step as if there had been none."""
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()
    monkeypatch.setattr(evaluate, "FILMS", 1)
    monkeypatch.setattr("longlive.train.validation.CLIPS", 1)
    monkeypatch.setattr(evaluate.Judge, "read", lambda *_: None)  # the judge takes seconds
    monkeypatch.setattr(evaluate, "score_film", lambda *_: dict.fromkeys(ATTRIBUTES, 0.5))
    decoders, configured = [], evaluate.decode_as_configured
    monkeypatch.setattr(evaluate, "decode_as_configured", lambda given, codec: configured(given, codec) or decoders.append(codec.vae.decoder))
    config = load_config(training("", write_vae(tmp_path)), [*WORLD, *how, "algorithm.i2v=true"])
    fresh = RunOptions(auto_resume=False, save=False)
    run(config, tmp_path / "alone", fresh)
    run(config.with_overrides(EVALUATED), tmp_path / "beside", fresh)
    rows = [json.loads(line) for line in (tmp_path / "beside" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and len({row["val_loss"] for row in rows}) == 3 and rows[0]["judge_cuts_ema"] == 0.5
    assert losses(tmp_path / "alone") == losses(tmp_path / "beside")
    assert [any(isinstance(part, Fp8Conv) for part in decoder.modules()) for decoder in decoders] == [True]
    for name in ("raw", "dit"):
        alone, beside = (read_state(tmp_path / folder / f"{name}-00001-of-00001.safetensors").tensors for folder in ("alone", "beside"))
        assert all(torch.equal(beside[key], tensor) for key, tensor in alone.items())


def test_one_evaluation_before_training(tmp_path, monkeypatch, capsys):
    """The documented image-to-video configuration, with images and prompts as its evaluation has them."""
    from PIL import Image

    documented_places.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures" / "robot.png")
    (tmp_path / "pictures" / "robot.txt").write_text("a robot walks\nlab clean\n")
    words = ["data.eval_data_path=pictures", "data.image_or_video_shape=[1,16,48,4,4]", "infra.sequence_parallel_size=1", "model_num_heads=2"]
    words += ["evaluation.num_frames=[8,16]", "inference.sampling_steps=1", "data.num_workers=0", "data.allow_padding=true", "data.data_path=films"]
    for name in ("video", "caption"):
        (tmp_path / "films" / name / "one").mkdir(parents=True)
    from longlive.engine.sinks import Mp4Sink

    sink = Mp4Sink(tmp_path / "films" / "video" / "one" / "0.mp4")
    sink.write(torch.zeros(61, 64, 64, 3, dtype=torch.uint8))
    sink.close()
    (tmp_path / "films" / "caption" / "one" / "0.json").write_text('{"caption": "a robot"}')
    script = ["--config_path", str(documented_places.ROOT / "configs" / "train_i2v_ar.yaml"), "--logdir", "logs", "--disable-wandb", "--generate-before-train"]
    assert command(entry.train, [*script, *words]) == 0
    (place,) = (tmp_path / "logs" / "evaluation").iterdir()
    films = {path.name for path in place.glob("film_*.mp4")}
    assert place.name == "step_000000" and films == {f"film_000_{frames}f{ema}.mp4" for frames in (8, 16) for ema in ("", "_ema")}
    assert not losses(tmp_path / "logs") and not checkpoint.folders(tmp_path / "logs") and not list((tmp_path / "logs").glob("dit-*"))
    assert command(entry.train, [*script, *words, "evaluation.interval=0"]) == 2
    assert "one evaluation needs" in capsys.readouterr().err
    own = ["train", *script[1:2], "--logdir", "own", *script[4:], *words]
    assert command(app, own) == 0 and [path.name for path in (tmp_path / "own" / "evaluation").iterdir()] == ["step_000000"]
    assert command(app, [*own, "--no_visualize"]) == 2 and "one evaluation needs" in capsys.readouterr().err
    (tmp_path / "pictures" / "robot.png").unlink()
    assert command(entry.train, [*script, *words]) == 2
