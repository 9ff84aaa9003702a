"""`longlive data check` and `longlive encode` from end to end, on small files and on an exported world."""

import json

import pytest
import torch
from clip_toys import damage, write_dataset

from longlive.cli.app import app, run
from longlive.config import default_config
from longlive.data.encoding import encoded
from longlive.data.loader import BatchLoader
from longlive.data.open import loader_settings, open_source

SHAPE = "data.image_or_video_shape=[1,16,48,2,4]"  # two chunks of 32 x 64 pixels


@pytest.fixture
def root(tmp_path):
    return write_dataset(tmp_path / "set", {"a": [61], "b": [29, 32], "c": [20]})


def report(capsys, *words):
    code = run(app, ["data", "check", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_check_counts_and_names(root, capsys):
    (root / "caption" / "a" / "0.json").unlink()
    code, found = report(capsys, root, SHAPE)
    assert code == 0
    assert (found["folders"], found["usable"], found["clips"], found["chunks_needed"]) == (2, 1, 3, 2)
    assert found["short"] == [["c", 0]] and found["kinds"] == {"no caption": 1} and found["stretched"] == 0
    assert found["rates"] == {"24": 3} and found["sizes"] == {"32x64": 3} and found["folder_chunks"] == [0, 1, 2]
    assert run(app, ["data", "check", str(root), SHAPE]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 folders can be used" in out and "video/a/0.mp4: no caption: expected" in out and "c: too short: fills 0 of 2 chunks" in out


def test_check_without_settings_asks_for_one_chunk(root, capsys):
    code, found = report(capsys, root)
    assert code == 0 and found["chunks_needed"] == 1 and found["usable"] == 2


def test_check_sees_other_proportions(root, capsys):
    assert report(capsys, root, "data.image_or_video_shape=[1,8,48,4,4]")[1]["stretched"] == 4


def test_damage_inside_a_file_needs_decode(root, capsys):
    damage(root / "video" / "a" / "0.mp4")
    assert report(capsys, root)[1]["usable"] == 2
    code, found = report(capsys, root, "--decode")
    assert code == 0 and found["usable"] == 1 and found["problems"][0]["file"] == "video/a/0.mp4" and found["decoded"]


@pytest.mark.parametrize("words", [("data.image_or_video_shape=[1,80,48,2,4]",), ("--config", "missing.yaml"), ("stray",)])
def test_nothing_usable_and_bad_words_are_exit_code_2(root, capsys, words):
    assert run(app, ["data", "check", str(root), *words]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_check_of_another_folder_is_refused(tmp_path, capsys):
    assert run(app, ["data", "check", str(tmp_path)]) == 2
    assert "holds no video/ folder" in capsys.readouterr().err


def test_encoded_shards_train_as_the_videos_do(root, tmp_path, capsys):
    """The shipped VAE and text encoder; `data.load_raw_video` decides where samples come from."""
    from longlive.cli.encode import _codec
    from longlive.data.shards import StoredText
    from longlive.models.spec import model_spec
    from longlive.models.text import text_encoder

    words = [SHAPE, "inference.device=cpu", "data.num_workers=0", "training.batch_size=2"]
    assert run(app, ["encode", str(root), str(tmp_path / "out"), "--seed", "3", *words]) == 0
    assert "wrote 2 streams of 2 folders and 7 prompts" in capsys.readouterr().out
    config = default_config("tiny", [*words, f"data.data_path={root}"])
    shards = default_config("tiny", [*words, f"data.data_path={tmp_path / 'out'}", "data.load_raw_video=false"])
    codec, named = _codec(config, model_spec("tiny"), torch.device("cpu"))
    video = BatchLoader(open_source(config, 3), loader_settings(config))
    shard = BatchLoader(open_source(shards, 3, codec=named["weights"]), loader_settings(shards))
    stored, encoder = StoredText(tmp_path / "out"), text_encoder(model_spec("tiny"))
    for _ in range(2):
        one, other = next(video), next(shard)
        assert one.prompts == other.prompts and one.cuts == other.cuts
        assert torch.equal(encoded(codec, one).latents_BFCHW, other.latents_BFCHW)
        prompts = [*one.prompts[0], ""]
        assert all(torch.equal(a, b) for a, b in zip(stored.encode(prompts), encoder.encode(prompts)))
    for word in ("other", "data.scene_cut_prefix=x"):
        assert run(app, ["encode", str(root), str(tmp_path / "out"), word, *words]) == 2


def test_an_exported_world_passes_and_loads(tmp_path, capsys):
    assert run(app, ["world", "export", str(tmp_path), "--clips", "1", "--chunks", "2", "--min-shots", "2", "--max-shots", "2"]) == 0
    capsys.readouterr()
    shape = "data.image_or_video_shape=[1,16,48,12,20]"
    code, found = report(capsys, tmp_path, shape, "--decode")
    assert code == 0 and (found["usable"], found["clips"], found["stretched"], found["problems"]) == (1, 2, 0, [])
    config = default_config("tiny", [shape, f"data.data_path={tmp_path}", "data.num_workers=0"])
    batch = next(BatchLoader(open_source(config, 0), loader_settings(config)))
    captions = [json.loads((tmp_path / "caption" / "000000" / f"{k}.json").read_text())["caption"] for k in range(2)]
    assert batch.frames_BTHW3.shape == (1, 61, 192, 320, 3) and batch.cuts == ((False, True),)
    assert batch.prompts == ((captions[0], config.data.scene_cut_prefix + captions[1]),)
