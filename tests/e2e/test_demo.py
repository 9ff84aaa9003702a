"""`longlive demo` from storyboards to films, sheets and scores, with random networks in place of the shipped ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny_pipeline import random_pipeline

from longlive.cli.app import app, run
from longlive.data.videos import probe
from longlive.engine.pipeline import Pipeline
from longlive.world.judge import Judge
from longlive.world.judge_net import JudgeNet

STORY = """
shots:
  - {prompt: "A red star waits in a meadow. The camera stays still.", chunks: 1}
  - {prompt: "A red star bounces on a beach. The camera pans left.", chunks: 1}
"""


@pytest.fixture
def random_networks(monkeypatch):
    """Gives the configurations that were loaded."""
    configs = []

    def load(config, *about, **more):
        configs.append(config)
        return random_pipeline(chunk_frames=8, window_frames=32, sink_frames=8, steps=1)

    monkeypatch.setattr(Pipeline, "load", load)
    monkeypatch.setattr(Judge, "load", lambda: Judge(JudgeNet()))
    return configs


def test_a_demo_writes_film_sheet_and_scores_and_may_be_run_again(random_networks, tmp_path, capfd):
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "two.yaml").write_text(STORY)
    for _ in range(2):
        assert run(app, ["demo", str(tmp_path / "stories"), "--output", str(tmp_path / "out")]) == 0
    (film,) = (tmp_path / "out").glob("*.mp4")
    assert film.name == "rank0-two-0_regular.mp4"
    assert probe(film).frames == 61
    with Image.open(film.with_suffix(".png")) as sheet:
        assert sheet.height > 2 * 192
    for config in random_networks:
        assert (config.checkpoints.lora_ckpt, config.inference.sampling_steps, config.inference.guidance_scale) == ("tiny-4steps", 4, 1.0)
    assert len(random_networks) == 2
    words = capfd.readouterr().out
    assert all(name in words for name in ("judge:", "colour", "setting", "cuts", str(film.with_suffix(".png"))))


@pytest.mark.parametrize("text", [None, "shots: [{prompt: A knight rides through the woods., chunks: 1}]"])
def test_nothing_is_written_for_a_folder_that_cannot_be_judged(tmp_path, capsys, text):
    (tmp_path / "stories").mkdir()
    if text:
        (tmp_path / "stories" / "one.yaml").write_text(text)
    assert run(app, ["demo", str(tmp_path / "stories"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert not Path(tmp_path / "out").exists()
