"""Truth -> natural English. A caption names every attribute of a shot once, in at most 45 words. Only a character that is recalled from an
earlier shot is named by its colour alone: its shape, size and marking must come from what was seen.

The words of one character stay together (size, marking, colour, shape, then its verb): a text encoder that sees each word with its
neighbours can bind them. The first of two characters stands on the left. Held-out wordings arrange the same words in sentences that
training never uses. The scene-cut prefix is not part of a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .draw import Draw

if TYPE_CHECKING:
    from .story import Role

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "medium": ("medium-sized", "mid-sized"), "large": ("large", "big", "big", "huge")}
COLOUR_WORDS = {
    "red": ("red", "red", "red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green", "green", "green", "emerald"),
    "blue": ("blue", "blue", "blue", "azure"),
    "purple": ("purple", "purple", "purple", "violet"),
    "pink": ("pink",),
    "white": ("white",),
}
SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "cross", "cross", "plus"),
    "diamond": ("diamond", "diamond", "diamond", "rhombus"),
    "crescent": ("crescent", "crescent", "crescent", "moon"),
}
# (before the colour, after the shape)
MARKING_WORDS = {
    "plain": (("", ""), ("", ""), ("plain", "")),
    "dotted": (("dotted", ""), ("spotted", ""), ("", "with a dot")),
    "striped": (("striped", ""), ("striped", ""), ("", "with stripes")),
    "eyes": (("wide-eyed", ""), ("", "with two eyes"), ("", "with eyes")),
}
# (it ..., it is ...)
ACTION_WORDS = {
    "moves": (
        ("moves from side to side", "moving from side to side"),
        ("glides back and forth", "gliding back and forth"),
        ("slides to and fro", "sliding to and fro"),
        ("moves back and forth", "moving back and forth"),
    ),
    "bounces": (
        ("bounces", "bouncing"),
        ("bounces up and down", "bouncing up and down"),
        ("hops up and down", "hopping up and down"),
        ("jumps", "jumping"),
    ),
    "orbits": (
        ("orbits", "orbiting"),
        ("orbits in a loop", "orbiting in a loop"),
        ("goes round and round", "going round and round"),
        ("flies in loops", "flying in loops"),
    ),
    "spins": (("spins", "spinning"), ("spins on the spot", "spinning on the spot"), ("rotates", "rotating"), ("twirls", "twirling")),
    "grows": (
        ("grows and shrinks", "growing and shrinking"),
        ("grows", "growing"),
        ("swells and shrinks", "swelling and shrinking"),
        ("gets bigger and smaller", "getting bigger and smaller"),
    ),
    "waits": (("waits", "waiting"), ("waits quietly", "waiting quietly"), ("rests", "resting"), ("stays put", "staying put")),
}
SETTING_WORDS = {
    "meadow": ("in a meadow", "in a flowery meadow", "on a grassy meadow", "in a field of grass"),
    "night": ("in a city at night", "at night in the city", "under the stars at night", "in the city by night"),
    "beach": ("on a beach", "on a sandy beach", "on the beach by the sea", "at the seaside"),
    "laboratory": ("in a laboratory", "in a lab", "inside a laboratory", "in a science lab"),
    "desert": ("in a desert", "in the desert", "in a dry desert", "among desert dunes"),
}
# Clauses; and what may stand as a sentence of its own.
CAMERA_WORDS = {
    "still": ("the camera stays still", "the camera does not move", "the camera is fixed"),
    "left": ("the camera pans left", "the camera pans to the left", "the view moves left"),
    "right": ("the camera pans right", "the camera pans to the right", "the view moves right"),
    "zoom": ("the camera zooms in and out", "the camera zooms", "the view zooms in and out"),
    "tilt": ("the camera tilts up and down", "the camera tilts", "the view tilts up and down"),
}
CAMERA_NOUNS = {
    "still": "a static shot",
    "left": "a pan to the left",
    "right": "a pan to the right",
    "zoom": "a zoom in and out",
    "tilt": "a tilt up and down",
}

# A character recalled by its colour alone
RECALLED_WORDS = (
    "the same {colour} character",
    "that same {colour} one",
    "the familiar {colour} figure",
    "the returning {colour} one",
    "the {colour} one from before",
    "the {colour} figure again",
    "the {colour} character seen earlier",
)

# {who}: characters with finite verbs; {whom}: with participles; {place}; {camera}: a clause; {shot}: a clause or a noun
TRAIN_FRAMES = (
    "{who} {place}. {shot}.",
    "{place}, {who}. {shot}.",
    "{shot}. {who} {place}.",
    "{shot}. {place}, {who}.",
    "{who} {place} while {camera}.",
    "{place}, {who} while {camera}.",
    "we see {whom} {place}. {shot}.",
    "{place} there is {whom}. {shot}.",
    "{camera} as {who} {place}.",
    "{who} {place} and {camera}.",
    "a scene {place} with {whom}. {shot}.",
    "{camera}, and {place} {who}.",
)
HELD_OUT_FRAMES = (
    "{place} we see {whom} as {camera}.",
    "{camera} while {place} {who}.",
    "there is {whom} {place}. {shot}.",
    "{who}. {shot}. a scene {place}.",
    "a scene with {whom} {place} while {camera}.",
)


def _noun(role: "Role", draw: Draw) -> str:
    look = role.character
    before, after = draw.pick(MARKING_WORDS[look.marking])
    words = [draw.pick(SIZE_WORDS[look.size]), before, draw.pick(COLOUR_WORDS[look.colour]), draw.pick(SHAPE_WORDS[look.shape]), after]
    article = draw.pick(("the", "the same", "a")) if role.known else "a"
    return " ".join([article, *(w for w in words if w)])


def _recalled_noun(role: "Role", draw: Draw) -> str:
    return draw.pick(RECALLED_WORDS).format(colour=draw.pick(COLOUR_WORDS[role.character.colour]))


def _cast(nouns: list[str], verbs: list[str], manner: int) -> str:
    """One or two characters with their verbs; two are joined in one of three manners, of which the last needs a sentence of its own."""
    if len(nouns) == 1:
        return f"{nouns[0]} {verbs[0]}"
    a, b = (f"{noun} {verb}" for noun, verb in zip(nouns, verbs))
    return (f"{a} and {b}", f"{a} on the left and {b} on the right", f"on the left {a} and on the right {b}")[manner]


def _sentence_case(text: str) -> str:
    return ". ".join(s[:1].upper() + s[1:] for s in text.split(". "))


def caption(roles: Sequence["Role"], setting: str, camera: str, draw: Draw, held_out: bool, recall: Draw) -> str:
    """One caption of a shot, at most 45 words. `held_out` picks the sentence frames.

    The choice of words comes from `draw`, and for the names of recalled roles from `recall`: recalling one changes no other word.
    """
    frame = draw.pick(HELD_OUT_FRAMES if held_out else TRAIN_FRAMES)
    full = [_noun(role, draw) for role in roles]
    nouns = [_recalled_noun(role, recall) if role.recalled else noun for role, noun in zip(roles, full)]
    pairs = [draw.pick(ACTION_WORDS[role.action]) for role in roles]
    text = frame.format(
        who=_cast(nouns, [p[0] for p in pairs], draw.below(3)),
        whom=_cast(nouns, [p[1] for p in pairs], draw.below(2)),
        place=draw.pick(SETTING_WORDS[setting]),
        camera=draw.pick(CAMERA_WORDS[camera]),
        shot=draw.pick((*CAMERA_WORDS[camera], CAMERA_NOUNS[camera])),
    )
    return _sentence_case(text)
