"""Runs in NVFP4 and FP8 at toy size: they learn, resume bit for bit, say how they were trained; roles of distillation in several precisions."""

import json
import shutil

import pytest
import torch
from dmd_toys import distillation, gradients, toy_task
from train_toys import shrink_tiny

from longlive.config import load_config
from longlive.core.log import warn_once
from longlive.engine.parts import load_dit
from longlive.models import spec
from longlive.models.weights import read_state
from longlive.precision.linear import EmulatedLinear, QuantisedLinear
from longlive.precision.training import TRAINED_AS, Fp8Trained, Nvfp4Frozen, Nvfp4Trained
from longlive.train import RunOptions, checkpoint, run
from longlive.train.low_precision import GENERATOR, TEACHER, as_trained, recipe_of, wants

AR = {
    "model_kwargs": {"model_name": "tiny"},
    "algorithm": {"trainer": "diffusion", "teacher_forcing": True},
    "data": {"image_or_video_shape": [1, 16, 48, 2, 4]},
    "world": {"clips": 2, "chunks": 2, "max_shots": 2, "refresh": 1, "wordings": 2},
    "infra": {
        "gradient_checkpointing": True, "model_quant_scale_rule": "static_6", "model_quant_activation_scale_rule": "mse",
        "model_quant_gradient_scale_rule": "mse",
    },
    "training": {"lr": 1.0e-3, "beta1": 0.9, "max_iters": 4, "log_iters": 2, "batch_size": 1, "ema_weight": 0.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()


def losses(folder):
    return [(row["loss"], row["grad_norm"]) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("words, kind", [("infra.model_quant=true", "nvfp4 trained"), ("fp8_quant=true", "fp8 trained")])
def test_a_run_resumes_bit_for_bit_and_says_how_it_was_trained(tmp_path, words, kind):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = load_config(AR, [words])
    run(config, whole)
    shutil.copytree(whole, parts)
    shutil.rmtree(checkpoint.folders(parts)[-1])
    run(config, parts)
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    plain = tmp_path / "plain"
    run(load_config(AR), plain, RunOptions(save=False))
    assert losses(plain) != losses(whole) and losses(whole)[-1][0] == pytest.approx(losses(plain)[-1][0], rel=0.1)
    about = json.loads(read_state(next(whole.glob("raw-*"))).metadata[TRAINED_AS])
    assert about["kind"] == kind and (kind == "fp8 trained" or (about["weight_rule"], about["gradient_rule"], about["tile"]) == ("static_6", "mse", 16))


def trained(tmp_path):
    run(load_config(AR, ["infra.model_quant=true", "training.max_iters=1"]), tmp_path, RunOptions(save=False))
    return next(tmp_path.glob("raw-*"))


def test_what_was_trained_is_served_with_the_same_rules_or_a_warning(tmp_path, caplog):
    path = trained(tmp_path)
    place = {"checkpoints": {"generator_ckpt": str(path)}, "model_kwargs": {"model_name": "tiny"}}

    def loaded(*words):
        caplog.clear()
        warn_once.cache_clear()
        return load_dit(load_config(place, list(words)), spec.MODELS["tiny"], torch.device("cpu"), torch.float32)[0]

    rules = ["model_quant_backend=emulated", "infra.model_quant_scale_rule=static_6", "infra.model_quant_activation_scale_rule=mse"]
    same = loaded("model_quant=true", *rules)
    layer = same.blocks[0].ffn[0]
    assert "trained" not in caplog.text and isinstance(layer, EmulatedLinear) and layer.stored.tile == 16
    served = load_dit(load_config(place), spec.MODELS["tiny"], torch.device("cpu"), torch.float32)[0]
    as_trained(load_config(AR, ["infra.model_quant=true"]), served, spec.MODELS["tiny"])
    assert served.blocks[0].ffn[0].stored == layer.stored
    for words in ([], ["fp8_quant=true"], ["model_quant=true", "infra.model_quant_scale_rule=mse"], ["model_quant=true", *rules, "model_quant_backend=w4a16"]):
        loaded(*words)
        assert "was trained as nvfp4" in caplog.text, words


def test_roles_of_distillation_take_the_precision_that_they_are_told(tmp_path):
    student, teacher = {"generator_quant": True, "gradient_checkpointing": False}, {"real_score_quant": True}
    task = toy_task(tmp_path, infra=student | teacher | {"fake_score_quant": False, "model_quant_scale_rule": "mse"})
    cast = task.cast
    assert cast.student.dit is cast.teacher.dit and cast.critic.dit is not cast.student.dit and task.stepper is None
    assert isinstance(cast.student.dit.blocks[0].ffn[0], Nvfp4Frozen) and not isinstance(cast.critic.dit.blocks[0].ffn[0], QuantisedLinear)
    for player in range(2):
        loss, found = gradients(task, player)
        assert loss.isfinite() and found and any(g.abs().max() > 0 for g in found.values())
    again = [gradients(task, 0, step=3)[1] for _ in range(2)]
    assert all(torch.equal(again[0][name], again[1][name]) for name in again[0])
    full = toy_task(tmp_path, adapter=None, infra={"generator_quant": True, "gradient_checkpointing": False})
    assert isinstance(full.module.blocks[0].ffn[0], Nvfp4Trained) and not isinstance(full.cast.teacher.dit.blocks[0].ffn[0], QuantisedLinear)
    eight = toy_task(tmp_path, fp8_quant=True)
    assert isinstance(eight.module.blocks[0].ffn[0], Fp8Trained) and gradients(eight, 0)[1]


def test_a_distilled_lora_over_packed_weights_is_trained_and_written(tmp_path):
    config = load_config(distillation(tmp_path, infra={"model_quant": True, "fake_score_quant": False}))
    assert wants(config, GENERATOR) and wants(config, TEACHER) and recipe_of(config, TEACHER).weight_rule == "static_6"
    results = run(config.with_overrides(["training.max_iters=2"]), tmp_path / "run", RunOptions(save=False))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and isinstance(results, dict)
