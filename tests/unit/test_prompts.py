"""Sources of prompts: layouts, order, durations, and one-line refusals. The recorded cases run under tests/golden."""

import json
import logging

import pytest

from longlive.core.errors import InputError
from longlive.core.schedule import chunk_schedule
from longlive.core.story import plan
from longlive.data.prompts import SourceSettings, read_path, read_source


def write_case(folder, captions, durations=None):
    folder.mkdir(parents=True)
    for index, caption in enumerate(captions):
        (folder / f"{index}.json").write_text(json.dumps({"caption": caption}), encoding="utf-8")
    if durations is not None:
        (folder / "shot_durations.txt").write_text(durations)
    return folder.parent


def refused(source, chunks=8, **settings):
    with pytest.raises(InputError) as caught:
        read_source(source, chunks, SourceSettings(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sentence_is_one_film():
    (board,) = read_source("A red circle / square 'moves' right.", 3)
    assert [p.prompt for p in plan(board, 3)] == ["A red circle / square 'moves' right."] * 3


@pytest.mark.parametrize("prompt", ["x" * 5000, "红色的圆 в лесу 🎈 moves", "a " * 2500])
def test_any_text_is_a_sentence(prompt):
    assert read_source(prompt, 2)[0].shots[0].prompt == prompt.strip()


def test_broken_text_is_refused_not_written(tmp_path):
    half_emoji, lone_byte = chr(0xD83D), chr(0xDCFF)
    assert "UTF-8" in refused(f"a red circle {lone_byte}")
    write_case(tmp_path / "caption" / "case", [f"a red circle {half_emoji}"])
    assert "UTF-8" in refused(tmp_path)


@pytest.mark.parametrize("source", ["", "  \n", "missing.txt", "no/such/folder", "films/my story.yaml"])
def test_no_prompt_and_no_file(source):
    refused(source)


def test_a_text_file_keeps_leading_spaces_and_drops_blank_lines(tmp_path):
    (tmp_path / "p.txt").write_text("one  \n\n \t\n two\r\n", encoding="utf-8")
    assert [b.shots[0].prompt for b in read_source(tmp_path / "p.txt", 2)] == ["one", " two"]


def test_files_that_are_no_prompts(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "cat.png").write_bytes(b"\x89PNG")
    for name in ("empty.txt", "binary.txt", "cat.png"):
        assert name in refused(tmp_path / name)


def test_caption_folder_with_and_without_the_outer_folder(tmp_path):
    write_case(tmp_path / "caption" / "case", ["a", "b"], "1, 3")
    for root in (tmp_path, tmp_path / "caption"):
        (board,) = read_path(root, 4)
        assert [p.cut for p in plan(board, 4)] == [False, True, False, False]
        assert board.name == "case"
    assert str(tmp_path / "caption") in refused(tmp_path / "caption" / "case")


@pytest.mark.parametrize("durations", ["2", "1 2 3", "0 2", "-1 2", "two 2", "", "1.5 2", "٣ 2"])
def test_durations_that_do_not_fit_the_shots(tmp_path, durations):
    write_case(tmp_path / "case", ["a", "b"], durations)
    assert "shot_durations.txt" in refused(tmp_path)


@pytest.mark.parametrize("text", ['{"caption": ""}', '{"caption": 3}', "[]", "{", "", '{"text": "x"}'])
def test_every_shot_needs_a_caption(tmp_path, text):
    root = write_case(tmp_path / "case", ["a", "b"])
    (tmp_path / "case" / "1.json").write_text(text)
    assert "1.json" in refused(root)


def test_durations_are_fitted_with_one_warning_that_names_the_shots(tmp_path, caplog):
    write_case(tmp_path / "case", ["first", "second", "third"], "4 9 9")
    with caplog.at_level(logging.WARNING, logger="longlive"):
        (board,) = read_path(tmp_path, 8)
        plan(board, 8)
    (record,) = caplog.records
    assert "'second'" in record.message and "'third'" in record.message and "'first'" not in record.message
    assert [s.chunks for s in board.shots] == [4, 4]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="longlive"):
        read_path(tmp_path, 22)
    assert not caplog.records


def test_cuts_come_from_shots_never_from_strings(tmp_path):
    write_case(tmp_path / "case", ["The scene transitions. a", "b"])
    (board,) = read_path(tmp_path, 4)
    for prefix in ("The scene transitions. ", ""):
        assert [p.cut for p in plan(board, 4, prefix)] == [False, False, True, False]


def test_images_with_prompts(tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 30)).save(tmp_path / "cat.png")
    assert "cat.txt" in refused(tmp_path)
    (tmp_path / "cat.txt").write_text(" \n")
    assert "cat.txt" in refused(tmp_path)
    (tmp_path / "cat.txt").write_text("one\n\n two \n")
    (board,) = read_source(tmp_path, 3)
    assert board.image == str(tmp_path / "cat.png") and [s.prompt for s in board.shots] == ["one", "two"]
    refused(tmp_path, i2v=False)


def test_clip_folders_follow_the_clips(tmp_path):
    from longlive.data.clip_folders import walk_clips
    from longlive.data.videos import ClipInfo

    clips = [(ClipInfo(29 + 32, 24.0), "a"), (ClipInfo(20, 24.0), "short"), (ClipInfo(200, 48.0), "b")]
    settings = SourceSettings()
    assert walk_clips(clips, None, settings) == [("a", 2), ("b", 3)]
    assert walk_clips(clips, 3, settings) == [("a", 2), ("b", 1)]
    assert walk_clips(clips, None, SourceSettings(uniform_prompt=True)) == [("a", 2)]
    assert walk_clips(clips[2:], None, SourceSettings(max_chunks_per_shot=1)) == [("b", 1), ("b", 1)]


def test_an_endless_film_is_refused_at_once():
    with pytest.raises(InputError, match="at most"):
        chunk_schedule(8 * 10**12, 8)
