"""The world's commands write what the documentation lays out, and refuse what cannot work."""

import json

import torch

from longlive.cli.app import app, run
from longlive.core.geometry import chunk_pixel_range
from longlive.data.videos import probe
from longlive.world.judge import ATTRIBUTES


def test_export_writes_one_pair_per_shot(tmp_path, capsys):
    words = ["world", "export", str(tmp_path), "--clips", "1", "--seed", "4", "--chunks", "2", "--min-shots", "2"]
    assert run(app, words) == 0
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*"))
    assert names == ["caption/000000/0.json", "caption/000000/1.json", "video/000000/0.mp4", "video/000000/1.mp4"]
    assert json.loads((tmp_path / names[0]).read_text())["caption"]
    assert [probe(tmp_path / name).frames for name in names[2:]] == [29, chunk_pixel_range(1)[1] - 29]
    assert run(app, words) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_render_makes_a_page_and_refuses_other_names(tmp_path):
    assert run(app, ["world", "render", str(tmp_path / "page.png"), "--clips", "1", "--chunks", "3"]) == 0
    assert run(app, ["world", "render", str(tmp_path / "page.gif")]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["page.png"]


def test_eval_writes_the_seven_scores(tmp_path):
    target = tmp_path / "scores.json"
    assert run(app, ["eval", "world", "--films", "1", "--seed", "2", "--truth", "--json", str(target), "inference.device=cpu"]) == 0
    values = json.loads(target.read_text())
    assert list(values["scores"]) == list(ATTRIBUTES) and all(0 <= score <= 1 for score in values["scores"].values())
    assert values["films"] == 1 and values["seed"] == 2
    assert run(app, ["eval", "world", "--films", "0", "--truth"]) == 2


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for words in (
        ["world", "export", str(tmp_path / "file"), "--clips", "1"],
        ["eval", "world", "--films", "9999", "--truth", "--json", str(tmp_path / "file" / "x.json")],
        ["eval", "world", "--films", "9999", "--truth", "--json", str(tmp_path)],
    ):
        assert run(app, words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_film_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    pictures = iter([torch.zeros(64, 3, 32, 32)])

    def interrupted(params):
        for picture in pictures:
            return picture
        raise KeyboardInterrupt

    monkeypatch.setattr("longlive.world.render.render", interrupted)
    assert run(app, ["world", "export", str(tmp_path), "--clips", "1", "--chunks", "4", "--max-shots", "1"]) == 130
    assert list(tmp_path.rglob("000000"))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_sample_that_is_replaced_keeps_no_shot_of_the_old_story(tmp_path):
    for name in ("video/000000/1.mp4", "caption/000000/1.json", "caption/000000/global.json", "video/000007/1.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert run(app, ["world", "export", str(tmp_path), "--clips", "1", "--chunks", "1", "--max-shots", "1", "--overwrite"]) == 0
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"video/000000/0.mp4", "caption/000000/0.json", "caption/000000/global.json", "video/000007/1.mp4"}
