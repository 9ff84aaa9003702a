"""Natural English -> truth: what a storyboard written in the world's words says, so that the judge can score a film of it.

The reverse of `captions.py`, over the same word lists. Words of one character stand together: size, marking, colour, shape, then its verb;
the first of two characters stands on the left. A character of an earlier shot may be recalled by its colour alone. Where a character stands in
pixels is not said, and the judge does not ask.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..core.errors import InputError
from ..core.story import Storyboard, plan
from .captions import ACTION_WORDS, CAMERA_NOUNS, CAMERA_WORDS, COLOUR_WORDS, MARKING_WORDS, RECALLED_WORDS, SETTING_WORDS, SHAPE_WORDS, SIZE_WORDS
from .story import Character, Role, ShotTruth, WorldStory

PLACES = {1: (160.0,), 2: (92.0, 228.0)}  # home_x by the number of characters, pixels
HOME_Y = 108.0


def _meanings(words: Mapping[str, Iterable[str]]) -> dict[str, str]:
    return {phrase: name for name, phrases in words.items() for phrase in phrases if phrase}


def _either(phrases: Iterable[str]) -> str:
    """A pattern for any of the phrases, longest first."""
    return "(?:" + "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True)) + ")"


SIZE, COLOUR, SHAPE = _meanings(SIZE_WORDS), _meanings(COLOUR_WORDS), _meanings(SHAPE_WORDS)
BEFORE = _meanings({name: [before for before, _ in pairs] for name, pairs in MARKING_WORDS.items()})
AFTER = _meanings({name: [after for _, after in pairs] for name, pairs in MARKING_WORDS.items()})
ACTION = _meanings({name: [form for pair in pairs for form in pair] for name, pairs in ACTION_WORDS.items()})
SETTING = _meanings(SETTING_WORDS)
CAMERA = _meanings(CAMERA_WORDS) | _meanings({name: (noun,) for name, noun in CAMERA_NOUNS.items()})

RECALLED = "(?:" + "|".join(re.escape(words).replace(r"\{colour\}", _either(COLOUR)) for words in RECALLED_WORDS) + ")"
TOLD = (
    rf"(?:(?P<size>{_either(SIZE)}) )?(?:(?P<before>{_either(BEFORE)}) )?(?P<colour>{_either(COLOUR)}) (?P<shape>{_either(SHAPE)})"
    rf"(?: (?P<after>{_either(AFTER)}))?"
)
CHARACTER = re.compile(rf"\b(?:(?P<again>{RECALLED})|{TOLD}) (?:is )?(?P<action>{_either(ACTION)})\b")


def read_shot(prompt: str, chunks: int = 1, known: Sequence[Character] = ()) -> ShotTruth:
    """What `prompt` says. `known`: the characters of earlier shots, newest last. Raises InputError that names what is not said in the world's words."""
    text = " ".join(prompt.lower().split())
    found = list(CHARACTER.finditer(text))
    if not 1 <= len(found) <= 2:
        raise InputError(f"{prompt[:60]!r} names {len(found)} characters that can be judged; write one or two, such as 'a small red circle bounces'")
    roles = tuple(_role(match, x, known, prompt) for match, x in zip(found, PLACES[len(found)]))
    setting, camera = _one(text, SETTING, "setting", prompt), _one(text, CAMERA, "camera", prompt)
    return ShotTruth(setting=setting, camera=camera, roles=roles, chunks=chunks, offset=0.0, caption=prompt)


def read_story(board: Storyboard, chunks: int | None = None) -> WorldStory:
    """The truth of a whole storyboard, shot by shot; `chunks` as in `core.story.plan`. Raises InputError when a shot cannot be judged."""
    plans = plan(board, chunks)
    lengths = [sum(p.shot == index for p in plans) for index in range(len(board.shots))]
    shots: list[ShotTruth] = []
    for shot, length in zip(board.shots, lengths):
        if length:
            shots.append(read_shot(shot.prompt, length, [role.character for told in shots for role in told.roles]))
    return WorldStory(shots=tuple(shots), seed=board.seed or 0, split="train")


def _role(match: re.Match, home_x: float, known: Sequence[Character], prompt: str) -> Role:
    role = Role(character=_look(match, known, prompt), action=ACTION[match["action"]], home_x=home_x, home_y=HOME_Y, direction=1)
    return replace(role, known=True, recalled=True) if match["again"] else role


def _look(match: re.Match, known: Sequence[Character], prompt: str) -> Character:
    if match["again"]:
        colour = COLOUR[re.search(_either(COLOUR), match["again"])[0]]
        same = [character for character in known if character.colour == colour]
        if not same:
            raise InputError(f"{prompt[:60]!r} recalls a {colour} character, but no earlier shot shows one; tell its shape")
        return same[-1]
    marking = BEFORE.get(match["before"] or "") or AFTER.get(match["after"] or "") or "plain"
    return Character(shape=SHAPE[match["shape"]], colour=COLOUR[match["colour"]], size=SIZE.get(match["size"] or "", "medium"), marking=marking)


def _one(text: str, meanings: Mapping[str, str], what: str, prompt: str) -> str:
    """The one meaning that stands in the text. Several phrases may say it; two meanings are a contradiction."""
    said = {meanings[match] for match in re.findall(rf"\b{_either(meanings)}\b", text)}
    if len(said) != 1:
        known = ", ".join(sorted(set(meanings.values())))
        raise InputError(f"{prompt[:60]!r} names {len(said)} {what}s that can be judged ({known}); name one in the words of the examples")
    return said.pop()
