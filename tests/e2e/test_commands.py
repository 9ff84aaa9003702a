"""The commands around a film: generate's refusals, storyboard check and plan, decode. In process, through the real command line."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import documented_places
import pytest
import torch

from longlive.cli.app import app, run
from longlive.cli.decode_scripts import decode_light, decode_vae
from longlive.config import default_config
from longlive.core.story import Shot, Storyboard
from longlive.data.videos import probe
from longlive.engine.films import generate_films

STORY = """\
title: Home
characters: {ball: a small red circle}
shots:
  - prompt: "{ball} waits in a meadow."
    chunks: 2
  - prompt: "At night, {ball} bounces."
    seconds: 4
"""


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "home.yaml"
    path.write_text(STORY)
    return path


def test_check_says_ok_with_advice_or_names_the_line(story, capsys):
    assert run(app, ["storyboard", "check", str(story)]) == 0
    out = capsys.readouterr().out
    assert "advice: shots 1-2" in out and out.rstrip().endswith("home.yaml, 2 shots")
    story.write_text(STORY.replace("seconds", "second"))
    assert run(app, ["storyboard", "check", str(story)]) == 2
    error = capsys.readouterr().err
    assert "home.yaml:7: unknown key 'second'" in error and "did you mean 'seconds'" in error and error.count("\n") == 1


def test_check_asks_for_no_long_prompts_where_all_is_told_in_the_words_of_the_small_model(capsys):
    assert run(app, ["storyboard", "check", str(documented_places.ROOT / "examples" / "homeward.yaml")]) == 0
    assert "advice" not in capsys.readouterr().out


def test_plan_reads_a_configuration_as_generate_does(story, tmp_path, capsys):
    (tmp_path / "three.yaml").write_text("model_kwargs: {model_name: tiny}\nnum_output_frames: 24\ninference: {device: cpu}\n")
    assert run(app, ["storyboard", "plan", str(story), "--config", str(tmp_path / "three.yaml")]) == 0
    assert "3 chunks, 24 latent frames" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["generate"], ["storyboard", "plan"]])
def test_a_configuration_of_another_model_than_asked_for_is_refused(story, tmp_path, capsys, command):
    (tmp_path / "tiny.yaml").write_text("model_kwargs: {model_name: tiny}\n")
    words = [*command, str(story), "--config", str(tmp_path / "tiny.yaml"), "inference.device=cpu"]
    assert run(app, [*words, "--model", "wan2.2-ti2v-5b"]) == 2
    error = capsys.readouterr().err
    assert "--model wan2.2-ti2v-5b and --config" in error and error.count("\n") == 1
    if command == ["storyboard", "plan"]:
        assert run(app, [*words, "--model", "tiny"]) == 0


def test_plan_counts_chunks_frames_and_seconds(story, capsys):
    assert run(app, ["storyboard", "plan", str(story), "inference.device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["1", "2", "0-60", "0.0-2.5"] and lines[2].split()[:4] == ["2", "3", "61-156", "2.5-6.5"]
    assert lines[3] == "2 shots, 5 chunks, 40 latent frames, 157 frames = 6.5 s at 24 fps"
    assert "GiB of memory" in lines[4] and "of time" in lines[4]


@pytest.mark.parametrize("words, said", [(["num_output_frames=12"], "num_output_frames(12)"), (["sampling_stps=2"], "sampling_steps"), (["stray"], "stray")])
def test_generate_refuses_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert run(app, ["generate", "A red circle.", "--output", "out", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["gone.txt", "", "cat.png", "empty", "binary.txt"])
def test_sources_that_cannot_be_filmed(tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(app, ["generate", source, "--output", "out"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return documented_places.write(tmp_path_factory.mktemp("commands"))


SMALL = ["data.image_or_video_shape=[1,16,48,4,4]", "inference.sampling_steps=1", "inference.device=cpu", "inference.dtype=float32"]


def test_generate_then_decode_gives_the_same_film(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(places)
    words = ["generate", "A red circle bounces.", "--model", "wan2.2-ti2v-5b", "num_output_frames=16", *SMALL]
    assert run(app, [*words, "--output", str(tmp_path / "film")]) == 0
    assert run(app, [*words, "--output", str(tmp_path / "film")]) == 2  # it exists
    assert run(app, [*words, "--output", str(tmp_path / "latents"), "save_latents_only=true"]) == 0
    (latents,) = (tmp_path / "latents").glob("*.pt")
    assert torch.load(latents).shape == (16, 48, 4, 4)
    assert run(app, ["decode", str(tmp_path / "latents"), "--output", str(tmp_path / "decoded"), "inference.device=cpu"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(decode_vae, ["--input_dir", str(tmp_path / "latents"), "--output_dir", str(tmp_path / "script")]) == 0
    films = [next((tmp_path / folder).glob("*.mp4")) for folder in ("film", "decoded", "script")]
    assert [probe(film).frames for film in films] == [61, 61, 61] and films[2].name.startswith("video_rank0-")
    assert run(app, ["decode", str(tmp_path / "latents"), "--output", str(tmp_path / "decoded")]) == 2
    capsys.readouterr()


def test_decode_refuses_what_holds_no_latents(places, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(places)
    torch.save({"a": 1}, tmp_path / "dict.pt")
    torch.save(torch.zeros(3, 4), tmp_path / "flat.pt")
    (tmp_path / "text.pt").write_text("x")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(print, protocol=4))
    (tmp_path / "empty").mkdir()
    for name in ("dict.pt", "flat.pt", "text.pt", "pickle.pt", "empty", "gone.pt"):
        assert run(app, ["decode", str(tmp_path / name)]) == 2
        assert name in (error := capsys.readouterr().err) and error.count("\n") == 1 and "PyTorch 2.6" not in error
    assert not recwarn.list
    assert not list(tmp_path.glob("*.mp4"))


def test_the_light_vae_script_finds_its_checkpoint(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(places)
    torch.save(torch.zeros(8, 48, 4, 4), tmp_path / "a.pt")
    words = ["--input_dir", str(tmp_path), "--dtype", "float32"]
    assert run(decode_light, words) == 2
    assert "MG-LightVAE_v2.pth" in capsys.readouterr().err
    assert run(decode_light, [*words, "--vae_path", "wan_models/Wan2.2-TI2V-5B/Wan2.2_VAE.pth"]) == 0
    assert probe(tmp_path / "video_a.mp4").frames == 29
    rate = ["--vae_path", "wan_models/Wan2.2-TI2V-5B/Wan2.2_VAE.pth", "--lightvae_pruning_rate", "0.5", "--overwrite"]
    assert run(decode_light, [*words, *rate]) == 2
    capsys.readouterr()
    (tmp_path / "a.json").write_text('{"model": "tiny", "config": {"inference": {"vae_type": "wan"}}}')
    assert run(decode_light, words) == 2
    assert "latents of tiny" in capsys.readouterr().err


def test_a_seed_on_the_command_line_beats_the_storyboards(story, tmp_path):
    from longlive.engine.sources import boards_for_generate

    story.write_text("seed: 5\n" + STORY)
    assert boards_for_generate(default_config("tiny"), story)[0].seed == 5
    assert boards_for_generate(default_config("tiny", ["logging.seed=9"]), story)[0].seed is None


def test_the_length_of_a_film(story, tmp_path, caplog):
    from longlive.engine.sources import boards_for_generate

    def chunks(source, *words):
        return [[shot.chunks for shot in board.shots] for board in boards_for_generate(default_config("tiny", list(words)), source)]

    assert chunks("A red circle.") == [[4]] and chunks("A red circle.", "num_output_frames=8") == [[1]]
    assert chunks(story) == [[2, 3]] and not caplog.records
    assert chunks(story, "num_output_frames=24") == [[2, 1]] and len(caplog.records) == 1
    folder = tmp_path / "cases" / "one"
    folder.mkdir(parents=True)
    for index in range(3):
        (folder / f"{index}.json").write_text(json.dumps({"caption": f"shot {index}"}))
    assert chunks(tmp_path / "cases") == [[2, 2, 2]]


def test_a_film_is_the_same_whatever_stands_before_it_in_the_list(pipeline, tmp_path):
    boards = [Storyboard(shots=(Shot(prompt=f"p{i}", chunks=1),)) for i in range(2)]
    small = ["model_kwargs.num_frame_per_block=2", "model_kwargs.local_attn_size=8", "model_kwargs.sink_size=2"]
    config = default_config("tiny", [*small, "data.image_or_video_shape=[1,8,48,2,4]", "save_latents_only=true"])
    two = generate_films(config, boards, tmp_path / "a", pipeline=pipeline)
    other = generate_films(config, [replace(boards[0], shots=(Shot(prompt="else", chunks=2),)), boards[1]], tmp_path / "b", pipeline=pipeline)
    assert torch.equal(torch.load(two[1].film), torch.load(other[1].film)) and Path(two[1].receipt).exists()
