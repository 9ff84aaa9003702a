"""Storyboard files: what they say, where an error is, and the advice of the prompt guide."""

import pytest

from longlive.core.errors import InputError
from longlive.data.storyboard_advice import advise
from longlive.data.storyboard_file import read_storyboard, seconds_to_chunks

GOOD = """\
title: Home
seed: 7
size: {height: 192, width: 320}
characters:
  ball: a small red circle
shots:
  - prompt: "{ball} moves right. {{literal}}"
    chunks: 2
  - prompt: In the night {ball} waits.
    seconds: 4
"""


def board_of(tmp_path, text):
    path = tmp_path / "film.yaml"
    path.write_text(text, encoding="utf-8")
    return read_storyboard(path)


def test_a_storyboard_says_what_is_filmed(tmp_path):
    board = board_of(tmp_path, GOOD)
    assert (board.name, board.title, board.seed, board.size) == ("film", "Home", 7, (192, 320))
    assert [s.prompt for s in board.shots] == ["a small red circle moves right. {literal}", "In the night a small red circle waits."]
    assert [s.chunks for s in board.shots] == [2, 3]


@pytest.mark.parametrize(
    "old, new, line, word",
    [
        ("seed: 7", "sed: 7", 2, "'seed'"),
        ("seed: 7", "seed: -1", 2, "-1"),
        ("seed: 7", "seed: yes", 2, "yes"),
        ("seed: 7", "title: again", 2, "twice"),
        ("height: 192", "height: 190", 3, "190"),
        (", width: 320", "", 3, "width"),
        ("{ball} moves", "{bal} moves", 7, "{ball}"),
        ("{{literal}}", "{", 7, "{{"),
        ("chunks: 2", "chunks: 0", 8, "'0'"),
        ("chunks: 2", "chunks: 1.5", 8, "'1.5'"),
        ("chunks: 2", "chunk: 2", 8, "'chunks'"),
        ("    chunks: 2\n", "", 7, "duration"),
        ("seconds: 4", "seconds: .inf", 10, ".inf"),
        ("seconds: 4", "seconds: 4\n    chunks: 3", 10, "not both"),
        ("seconds: 4", "seconds: 4\n    image: none.png", 11, "none.png"),
        ("In the night {ball} waits.", "", 9, "empty"),
        ("In the night {ball} waits.", "{ball: 1}", 9, "text"),
        ("chunks: 2", "chunks: [", 9, "YAML"),
        ("In the night {ball} waits.", "{ball} waits.", 9, "quotes"),
        ("In the night {ball} waits.", '"half an emoji \\ud83d"', 9, "UTF-8"),
        ("chunks: 2", f"chunks: {10**20}", 8, "at most"),
        ("seconds: 4", f"seconds: {10**20}", 10, "at most"),
        ("seconds: 4", "seconds: 4\n    image: film.yaml", 11, "not a readable image"),
        ("seed: 7", "video: film.yaml", 2, "not a readable video"),
        ("seed: 7", "video: damaged.png", 2, "damaged"),
    ],
)
def test_errors_name_the_line(tmp_path, old, new, line, word):
    assert old in GOOD
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    with pytest.raises(InputError) as caught:
        board_of(tmp_path, GOOD.replace(old, new, 1))
    message = str(caught.value)
    assert f"film.yaml:{line}:" in message and word in message and "\n" not in message


@pytest.mark.parametrize("text", ["", "title: x\n", "shots: []\n", "shots: {}\n", "- a\n", "just text\n", "shots:\n"])
def test_no_shots(tmp_path, text):
    with pytest.raises(InputError, match="film.yaml:"):
        board_of(tmp_path, text)


def test_seconds_become_whole_chunks():
    assert [seconds_to_chunks(s) for s in (0.1, 1.3, 2.0, 2.7, 10)] == [1, 1, 2, 2, 8]


def test_advice_follows_the_guide(tmp_path):
    words = "\\n\\n".join(["A compact silver robot with one blue optic walks slowly through the clean robotics lab. " * 3] * 5)
    good = board_of(tmp_path, f'shots:\n  - prompt: "{words}"\n    chunks: 1\n  - prompt: "{words} It turns."\n    chunks: 1\n')
    assert advise(good) == []
    text = " ".join(advise(board_of(tmp_path, GOOD)))
    assert "300" in text and "paragraphs" in text and "no descriptor" not in text
    lost = 'shots:\n  - prompt: "A silver robot walks."\n  - prompt: "- the same machine sleeps"\n'
    text = " ".join(advise(board_of(tmp_path, lost)))
    assert "the same machine" in text and "share no descriptor" in text and "lists" in text
