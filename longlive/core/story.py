"""Shots and storyboards: what is shown, chunk by chunk.

A storyboard is a list of shots; a plan is one `ChunkPlan` per chunk: its prompt, and whether a new shot begins there.
Cuts come from the shots. The scene-cut prefix is text that is put before the first prompt of each later shot; it never decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import InputError

SCENE_CUT_PREFIX = "The scene transitions. "
MOST_CHUNKS = 1_000_000  # two weeks of film; more is a slip of the keyboard


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One shot. `chunks` is its duration in chunks (None: shared out evenly); `image` a path to its first frame."""

    prompt: str
    chunks: int | None = None
    image: str | None = None

    def __post_init__(self):
        if self.chunks is not None and self.chunks < 1:
            raise InputError(f"a shot of {self.chunks} chunks: every shot lasts at least one chunk")
        if self.chunks is not None and self.chunks > MOST_CHUNKS:
            raise InputError(f"a shot of {self.chunks} chunks: a shot lasts at most {MOST_CHUNKS}; give a smaller number")
        if not is_text(self.prompt):
            raise InputError(f"the prompt {ascii(self.prompt[:40])} holds characters that no text has; write it in UTF-8")


@dataclass(frozen=True, kw_only=True)
class Storyboard:
    """A film in words. `name` identifies it in file names; `seed` None means the configured one."""

    shots: tuple[Shot, ...]
    name: str = ""
    title: str = ""
    seed: int | None = None
    image: str | None = None
    video: str | None = None
    size: tuple[int, int] | None = None
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        if not self.shots:
            raise InputError(f"storyboard {self.name or self.title!r} has no shots; give it at least one")


@dataclass(frozen=True)
class ChunkPlan:
    """What one chunk shows. `cut` is True on the first chunk of every shot but the first."""

    prompt: str
    cut: bool
    shot: int


def is_text(words: str) -> bool:
    """Whether `words` can be written as UTF-8: broken bytes of a command line and halves of an emoji cannot."""
    try:
        words.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def even_durations(shots: int, chunks: int) -> list[int]:
    """`chunks` shared evenly over `shots`, the remainder to the first ones. More shots than chunks: one each, the rest get none."""
    base, extra = divmod(chunks, shots)
    return [base + (i < extra) for i in range(shots)]


def fit_durations(durations: list[int], chunks: int) -> list[int]:
    """Clips `durations` in order to `chunks`; a shortfall extends the last shot that was used (spec inference §9.1)."""
    left, fitted = chunks, []
    for d in durations:
        fitted.append(min(d, left))
        left -= fitted[-1]
    last = max(i for i, d in enumerate(fitted) if d)
    fitted[last] += left
    return fitted


def plan(storyboard: Storyboard, chunks: int | None = None, prefix: str = SCENE_CUT_PREFIX) -> tuple[ChunkPlan, ...]:
    """One ChunkPlan per chunk. `chunks` None: the sum of the shots' durations, which must then all be given.

    Where the durations do not add up to `chunks`, shots at the end are dropped or the last one is stretched (`fit_durations`).
    """
    durations = [s.chunks for s in storyboard.shots]
    if None in durations:
        if chunks is None:
            raise InputError(f"shot {durations.index(None)} has no duration and the film no length; give one of the two")
        if any(d is not None for d in durations):
            raise InputError("some shots have a duration and some have none; give it for all or for none")
        durations = even_durations(len(durations), chunks)
    durations = fit_durations(durations, chunks if chunks is not None else sum(durations))
    plans = []
    for index, (shot, count) in enumerate(zip(storyboard.shots, durations)):
        for k in range(count):
            cut = k == 0 and bool(plans)
            plans.append(ChunkPlan((prefix if cut else "") + shot.prompt, cut, index))
    return tuple(plans)
