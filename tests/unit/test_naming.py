"""File names: as documented where they can be, safe and unique where not; and the prompts file."""

import pytest

from longlive.core.errors import InputError
from longlive.core.story import Shot, Storyboard, plan
from longlive.engine.naming import base_name, check_folder, film_texts, prompts_text, safe_text


def test_a_plain_prompt_names_its_film_as_documented():
    text = "A compact silver robot walks through a clean robotics lab."
    assert base_name(2, safe_text(text), 1, "regular") == "rank2-A compact silver robot walks through a clean robotics lab.-1_regular"
    assert safe_text("x" * 5000) == "x" * 100


@pytest.mark.parametrize(
    "text",
    ["a/b\\c", "..", ". . .", "it's \"quoted\" `x` $HOME", "a\nb\x00c", "..", "", "  ", "\ud800 lone", "\u202e rtl", "a:b*c?<d>|"],
)
def test_any_text_is_a_safe_name(text, tmp_path):
    name = safe_text(text)
    assert name and not set(name) & set("/\\:*?\"'<>|`$\n\x00\u202e")
    (tmp_path / base_name(0, name, 0, "regular")).write_text("x")


@pytest.mark.parametrize("text", ["红色的圆" * 50, "🎈" * 200, "é" * 300])
def test_other_alphabets_fit_into_a_file_name(text, tmp_path):
    name = base_name(1000, safe_text(text), 100, "regular") + "-12345678_prompts.txt.tmp"
    assert len(name.encode()) <= 255
    (tmp_path / name).write_text("x")


def test_names_are_unique_in_any_letter_case():
    texts = film_texts(["A film", "a film", "another", "A film"], [0, 1, 2, 3])
    assert len({t.casefold() for t in texts}) == 4 and texts[2] == "another" and texts[0].startswith("A film-")
    assert film_texts(["A film", "b"], [0, 1]) == ["A film", "b"]
    assert film_texts(["A film", "A film"], [4, 9], save_with_index=True) == ["4", "9"]


def test_the_prompts_file_merges_equal_neighbours():
    board = Storyboard(shots=(Shot(prompt="a", chunks=3), Shot(prompt="b", chunks=1)))
    assert prompts_text(plan(board)) == "[0,1,2] a\n[3] The scene transitions. b\n"


def test_a_folder_is_checked_without_making_it(tmp_path):
    check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError):
        check_folder(tmp_path / "f" / "b")
