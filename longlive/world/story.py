"""Stories: who is where, doing what, under which camera, shot by shot, drawn from a seed alone.

A story is exact truth. Its captions say all of it, its renderer shows all of it, its judge looks for all of it. A story that needs memory
leaves out what an earlier caption said: a recalled character is named by its colour alone, which says who is who.
Shots are whole chunks. The first and the last shot show the whole cast; a shot between may miss one member, or show a guest.
Settings differ between neighbouring shots. Within a shot two characters differ in colour; the first of two stands on the left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.errors import InputError
from ..core.geometry import chunk_pixel_range
from ..core.story import Shot, Storyboard
from .captions import caption
from .draw import Draw
from .vocabulary import ACTIONS, CAMERAS, COLOURS, MARKINGS, SETTINGS, SHAPES, SIZES, SPLITS, held_out


@dataclass(frozen=True, kw_only=True)
class Character:
    """A look that stays the same in every shot."""

    shape: str
    colour: str
    size: str
    marking: str


@dataclass(frozen=True, kw_only=True)
class Role:
    """A character in one shot. `home_x`, `home_y` pixels at 192x320; `direction` +1 or -1, the way the action starts.

    known: an earlier shot shows it and its caption says all of it; recalled: known, and this caption names it by its colour alone.
    """

    character: Character
    action: str
    home_x: float
    home_y: float
    direction: int
    known: bool = False
    recalled: bool = False


@dataclass(frozen=True, kw_only=True)
class ShotTruth:
    """One shot of `chunks` chunks. `offset` is where on the setting's panorama it starts, in pixels; `roles` from left to right."""

    setting: str
    camera: str
    roles: tuple[Role, ...]
    chunks: int
    offset: float
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class WorldStory:
    """Truth of one film."""

    shots: tuple[ShotTruth, ...]
    seed: int
    split: str

    @property
    def chunks(self) -> int:
        return sum(shot.chunks for shot in self.shots)

    @property
    def frames(self) -> int:
        """Pixel frames of the film."""
        return chunk_pixel_range(self.chunks - 1)[1]

    @property
    def shot_of_chunk(self) -> list[int]:
        """Index of the shot that each chunk belongs to."""
        return [index for index, shot in enumerate(self.shots) for _ in range(shot.chunks)]

    @property
    def cuts(self) -> list[bool]:
        """Per chunk: whether a new shot begins there (False for chunk 0)."""
        shots = self.shot_of_chunk
        return [c > 0 and shots[c] != shots[c - 1] for c in range(len(shots))]

    @property
    def captions(self) -> list[str]:
        """Per chunk, without the scene-cut prefix."""
        return [self.shots[shot].caption for shot in self.shot_of_chunk]

    @property
    def shot_starts(self) -> list[int]:
        """First pixel frame of each shot."""
        return [0] + [chunk_pixel_range(c)[0] for c, cut in enumerate(self.cuts) if cut]

    @property
    def shot_frames(self) -> list[tuple[int, int]]:
        """Half-open range of pixel frames of each shot."""
        starts = self.shot_starts
        return list(zip(starts, starts[1:] + [self.frames]))

    def storyboard(self) -> Storyboard:
        """The same story in words only, for the engine."""
        shots = tuple(Shot(prompt=shot.caption, chunks=shot.chunks) for shot in self.shots)
        return Storyboard(shots=shots, name=f"world-{self.split}-{self.seed}", title=f"World story {self.seed}", seed=self.seed)


def _character(draw: Draw, taken: tuple[str, ...], split: str, marked: bool) -> Character:
    """Shape and colour uniform over the pairs of `split` whose colour is not in `taken`."""
    wanted = split == "held-out"
    pairs = [(s, c) for s in SHAPES for c in COLOURS if c not in taken and held_out(s, c) == wanted]
    shape, colour = draw.pick(pairs)
    return Character(shape=shape, colour=colour, size=draw.pick(SIZES), marking=draw.pick(MARKINGS[1:] if marked else MARKINGS))


def _durations(draw: Draw, chunks: int, shots: int) -> list[int]:
    cuts = sorted(draw.sample(range(1, chunks), shots - 1))
    return [b - a for a, b in zip([0] + cuts, cuts + [chunks])]


def _on_stage(draw: Draw, shots: int, cast: int, away: float) -> list[list[int]]:
    """Members of the cast in each shot, from left to right. Number `cast` stands for a guest."""
    stage = []
    for index in range(shots):
        members = draw.sample(range(cast), cast)
        if 0 < index < shots - 1 and draw.chance(away):
            members = members[:1] if cast > 1 else [cast]
        stage.append(members)
    return stage


def _role(draw: Draw, character: Character, action: str, place: int, count: int, known: bool, recalled: bool) -> Role:
    x = 160 + draw.spread(24) if count == 1 else (92, 228)[place] + draw.spread(6)
    y, direction = 108 + draw.spread(12), draw.pick((-1, 1))
    return Role(character=character, action=action, home_x=x, home_y=y, direction=direction, known=known, recalled=recalled)


def sample_story(
    seed: int,
    *,
    chunks: int = 6,
    shots: tuple[int, int] = (3, 3),
    characters: tuple[int, int] = (1, 2),
    split: str = "train",
    memory: float = 0.0,
    away: float = 0.25,
) -> WorldStory:
    """A story of `chunks` chunks in `shots` (lowest, highest) shots with `characters` (lowest, highest) members of the cast.

    The same arguments give the same story everywhere. All attributes are uniform, but whoever ever spins has a marking, so that it can be seen.
    split: "train" never shows a combination that is held out and never uses a held-out wording; "held-out" uses nothing else.
    memory: chance that a character is recalled where it is known; it changes how captions name it and nothing else. away: chance that a shot
    between the first and the last misses a member of the cast. Raises InputError for what cannot be told.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; use one of {', '.join(SPLITS)}")
    low, high = shots[0], min(shots[1], chunks)
    if not 1 <= low <= high:
        raise InputError(f"{shots[0]} to {shots[1]} shots do not fit in {chunks} chunks: every shot lasts at least one chunk")
    if not 1 <= characters[0] <= characters[1] <= 2:
        raise InputError(f"characters {characters}: a scene has one or two; use (1, 2)")
    if not (0 <= memory <= 1 and 0 <= away <= 1):
        raise InputError(f"memory {memory}, away {away}: both are chances; use 0 to 1")
    draw, recall = Draw("story", split, seed), Draw("recall", split, seed)
    count, cast_size = draw.between(low, high), draw.between(*characters)
    stage = _on_stage(draw, count, cast_size, away)
    actions = [[draw.pick(ACTIONS) for _ in members] for members in stage]
    spinners = {m for members, todo in zip(stage, actions) for m, action in zip(members, todo) if action == "spins"}
    cast: list[Character] = []
    for member in range(cast_size + 1):
        cast.append(_character(draw, tuple(c.colour for c in cast), split, member in spinners))
    told, setting, seen = [], "", set()
    for members, todo, length in zip(stage, actions, _durations(draw, chunks, count)):
        setting = draw.pick([s for s in SETTINGS if s != setting])
        roles = tuple(
            _role(draw, cast[m], action, place, len(members), m in seen, m in seen and recall.chance(memory))
            for place, (m, action) in enumerate(zip(members, todo))
        )
        camera, offset = draw.pick(CAMERAS), draw.unit() * 1280
        text = caption(roles, setting, camera, draw, held_out=split == "held-out", recall=recall)
        told.append(ShotTruth(setting=setting, camera=camera, roles=roles, chunks=length, offset=offset, caption=text))
        seen.update(members)
    return WorldStory(shots=tuple(told), seed=seed, split=split)


def reworded(story: WorldStory, number: int, memory: float = 0.0) -> WorldStory:
    """The same film in other words: wording `number` from 1, each with its own recalled characters (`memory` as for `sample_story`)."""
    draw, recall = Draw("wording", story.split, story.seed, number), Draw("wording-recall", story.split, story.seed, number)
    shots = []
    for shot in story.shots:
        roles = tuple(replace(role, recalled=role.known and recall.chance(memory)) for role in shot.roles)
        text = caption(roles, shot.setting, shot.camera, draw, held_out=story.split == "held-out", recall=recall)
        shots.append(replace(shot, roles=roles, caption=text))
    return replace(story, shots=tuple(shots))


def evaluation_story(seed: int, index: int, *, chunks: int = 6, shots: tuple[int, int] = (3, 3)) -> WorldStory:
    """Film number `index` of the evaluation drawn from `seed`: held-out combinations and wordings, every third film with two characters."""
    count = 2 if index % 3 == 2 else 1
    key = Draw("evaluation", seed, index).below(1 << 48)
    return sample_story(key, chunks=chunks, shots=shots, characters=(count, count), split="held-out")


def memory_story(seed: int, index: int, *, chunks: int = 16, shots: int = 4, split: str = "held-out") -> WorldStory:
    """Film number `index` that can only be right from memory: one character, told in full in the first shot and by its colour alone in the last.

    The shots between show a guest, for at least half of the film. In held-out combinations the colour that is told speaks against the
    shape that is remembered: training never showed the two together. Raises InputError below 3 shots or 2 chunks per shot.
    """
    if shots < 3 or chunks < 2 * shots:
        raise InputError(f"{shots} shots in {chunks} chunks: a character goes and comes back in at least 3 shots, 2 chunks or more per shot")
    draw = Draw("memory", seed, index)
    while True:
        key = draw.below(1 << 48)
        story = sample_story(key, chunks=chunks, shots=(shots, shots), characters=(1, 1), split=split, memory=1.0, away=1.0)
        if 2 * sum(shot.chunks for shot in story.shots[1:-1]) >= chunks:
            return story
