"""The manifest: sorted, indexed once, the same everywhere, and nothing left out in silence."""

import json
import logging
import os
import shutil

import pytest
from clip_toys import write_caption, write_clip, write_dataset

from longlive.core.errors import InputError
from longlive.data import manifest as module
from longlive.data.manifest import CACHE_NAME, NO_CAPTION, NO_VIDEO, UNREADABLE, index_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("set"), {"b": [30], "a": [12, 8, 6]})


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))


def opened(monkeypatch):
    """The names of the files that are probed from now on."""
    names = []
    original = module.probe
    monkeypatch.setattr(module, "probe", lambda path: names.append(path.name) or original(path))
    return names


def test_folders_by_name_and_clips_by_number(copy):
    for k in (10, 2):
        write_clip(copy / "video" / "a" / f"{k}.mp4", 4)
        write_caption(copy, "a", k, f"a {k}")
    write_clip(copy / "video" / "a" / "intro.MKV", 5)
    write_caption(copy, "a", "intro", "hello")
    (copy / "video" / "a" / "notes.txt").write_text("no video")
    found = index_dataset(copy)
    assert [s.name for s in found.samples] == ["a", "b"]
    assert [c.file.rpartition("/")[2] for c in found.samples[0].clips] == ["0.mp4", "1.mp4", "2.mp4", "10.mp4", "intro.MKV"]
    clip = found.samples[1].clips[0]
    assert (clip.file, clip.caption, clip.frames, clip.fps, clip.width, clip.height) == ("video/b/0.mp4", "b 0", 30, 24.0, 64, 32)
    assert found.problems == ()


def test_everything_that_cannot_be_used_is_named(copy):
    (copy / "caption" / "a" / "0.json").unlink()
    (copy / "caption" / "a" / "1.json").write_text('{"caption": " "}')
    (copy / "video" / "b" / "0.mp4").write_bytes(b"no video at all")
    write_caption(copy, "b", "7", "nobody")
    found = index_dataset(copy)
    assert [(p.kind, p.file) for p in found.problems] == [
        (NO_CAPTION, "video/a/0.mp4"),
        (NO_CAPTION, "video/a/1.mp4"),
        (UNREADABLE, "video/b/0.mp4"),
        (NO_VIDEO, "caption/b/7.json"),
    ]
    assert "expected caption/a/0.json" in found.problems[0].reason and str(copy) not in found.problems[2].reason
    assert [(s.name, len(s.clips)) for s in found.samples] == [("a", 1)]


def test_a_link_that_leads_nowhere_is_said_to_be_one(copy):
    for name, target in (("video/b/0.mp4", "../../clip.mp4"), ("video/a/1.mp4", "1.mp4"), ("caption/a/2.json", "gone.json")):
        (copy / name).unlink()
        (copy / name).symlink_to(target)
    (copy / "caption" / "a" / "1.json").unlink()
    problems = {p.file: (p.kind, p.reason) for p in index_dataset(copy).problems}
    assert problems == {
        "video/a/1.mp4": (NO_VIDEO, "video/a/1.mp4 is a link that leads nowhere (1.mp4)"),
        "video/a/2.mp4": (NO_CAPTION, "expected caption/a/2.json, a link that leads nowhere (gone.json)"),
        "video/b/0.mp4": (NO_VIDEO, "video/b/0.mp4 is a link that leads nowhere (../../clip.mp4)"),
    }
    write_clip(copy / "clip.mp4", 7)
    assert [c.frames for s in index_dataset(copy).samples for c in s.clips if s.name == "b"] == [7]  # in spite of what was kept of it


def test_files_are_opened_once(copy, monkeypatch):
    names = opened(monkeypatch)
    first = index_dataset(copy)
    assert sorted(names) == ["0.mp4", "0.mp4", "1.mp4", "2.mp4"]
    names.clear()
    assert index_dataset(copy) == first and names == []
    write_clip(copy / "video" / "a" / "1.mp4", 9)
    (copy / "video" / "a" / "2.mp4").unlink()
    changed = index_dataset(copy)
    assert names == ["1.mp4"] and [c.frames for c in changed.samples[0].clips] == [12, 9]
    names.clear()
    write_caption(copy, "b", 0, "another one")
    assert index_dataset(copy).samples[1].clips[0].caption == "another one" and names == ["0.mp4"]
    assert not list(copy.glob("*.tmp")) and not list(copy.glob(".*.tmp"))


def test_the_digest_is_that_of_the_content(dataset, copy):
    for path in copy.rglob("*.mp4"):
        os.utime(path, (1, 1))
    one, other = index_dataset(dataset), index_dataset(copy)
    assert one.root != other.root and one.digest == other.digest
    write_caption(copy, "a", 0, "changed")
    assert index_dataset(copy).digest != one.digest


def test_a_damaged_cache_is_written_again(copy, caplog):
    first = index_dataset(copy)
    (copy / CACHE_NAME).write_text("{broken")
    assert index_dataset(copy) == first and "indexed again" in caplog.text
    assert json.loads((copy / CACHE_NAME).read_text())["version"] == module.VERSION


def test_the_cache_may_lie_elsewhere(copy, tmp_path, caplog):
    index_dataset(copy, tmp_path / "cache" / "m.json")
    assert (tmp_path / "cache" / "m.json").is_file() and not (copy / CACHE_NAME).exists()
    with pytest.raises(InputError, match="data.manifest_path"):
        index_dataset(copy, copy / "caption" / "a" / "0.json" / "m.json")
    (copy / CACHE_NAME).mkdir()
    with caplog.at_level(logging.WARNING):
        assert len(index_dataset(copy).samples) == 2
    assert "cannot keep the manifest" in caplog.text


def test_another_layout_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no video/ folder"):
        index_dataset(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is not a folder"):
        index_dataset(tmp_path / "file")
    with pytest.raises(InputError, match="does not exist"):
        index_dataset(tmp_path / "nothing")
