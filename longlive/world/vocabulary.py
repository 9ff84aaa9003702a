"""What the world is made of: the names of all attributes, the palette, the sizes, and which combinations training never sees."""

from __future__ import annotations

HEIGHT, WIDTH = 192, 320

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "crescent")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
SIZES = ("small", "medium", "large")
MARKINGS = ("plain", "dotted", "striped", "eyes")
SETTINGS = ("meadow", "night", "beach", "laboratory", "desert")
ACTIONS = ("moves", "bounces", "orbits", "spins", "grows", "waits")
CAMERAS = ("still", "left", "right", "zoom", "tilt")

# 8-bit RGB. Saturated or white, while every setting is muted: a character's pixels are known by their colour alone.
PALETTE = (
    (225, 30, 40),
    (255, 130, 0),
    (255, 230, 20),
    (10, 150, 50),
    (40, 95, 250),
    (140, 45, 205),
    (255, 120, 195),
    (252, 252, 252),
)
OUTLINE = (18, 18, 24)
RADIUS = (24.0, 32.0, 41.0)  # pixels at 192x320
SPLITS = ("train", "held-out")


def held_out(shape: str, colour: str) -> bool:
    """Whether training never shows `shape` in `colour`: a quarter of the pairs, two colours of every shape, two shapes of every colour."""
    return (SHAPES.index(shape) + COLOURS.index(colour)) % 4 == 1
