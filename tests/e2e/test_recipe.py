"""The whole recipe at toy length: VAE, autoregressive model, few-step student, export, film, through the real command line."""

import importlib.util
from pathlib import Path

import pytest
import torch
from train_toys import shrink_tiny

from longlive.cli.app import app, run
from longlive.data.videos import probe
from longlive.models import spec

RECIPE = Path(__file__).resolve().parents[2] / "benchmarks" / "recipe.py"


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()
    found = importlib.util.spec_from_file_location("recipe", RECIPE)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_recipe_runs_from_nothing_to_a_film(recipe, tmp_path):
    ran = []
    recipe.run_recipe(tmp_path, True, lambda name, words: ran.append(name) or run(app, words))
    assert ran == ["vae", "ar", "dmd", "export", "film"]
    (film,) = (tmp_path / "film").glob("*.mp4")
    assert probe(film).frames == 61  # of 16 latent frames
    student = torch.load(tmp_path / "student.pt", weights_only=True)
    assert student["lora_rank"] == 32 and len(student["generator_lora"]) == 2 * 10 * 2


def test_a_leg_that_fails_ends_the_recipe(recipe, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        recipe.run_recipe(tmp_path, True, lambda name, words: 7)
    assert stopped.value.code == 7
