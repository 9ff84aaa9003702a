"""Whether a film remembers: a character is told in full once, goes away, and comes back named by its colour alone.

Its shape, size and marking in the last shot can only come from what the transformer still sees of the first one. The same films, from the same
noise, are made with the sinks (anchor and pin) and without them; by the last shot a window without sinks has lost the first.
Colour and setting are told in the last caption, so they show what forgetting does not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ..core.errors import InputError
from ..engine.pipeline import rollout_settings
from ..world.judge import CharacterReading, Judge, ShotReading, score_shot
from ..world.story import WorldStory, memory_story
from .world import Films

if TYPE_CHECKING:
    from ..config import Config

CHUNKS, SHOTS = 16, 4
REMEMBERED = ("look", "identity", "size", "marking")
MEASURES = (*REMEMBERED, "first_shot", "colour", "setting")
WITHOUT_SINKS = ("inference.sink_size=0",)


@dataclass(frozen=True, kw_only=True)
class MemoryFilm:
    """One film: the judge's reading of the first chunk of its first shot and of its last shot."""

    index: int
    story: WorldStory
    first: ShotReading
    last: ShotReading


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The same films made in several ways. `scores`: per way, means in 0..1; `shuffled`: the first way's films against other films' stories."""

    runs: dict[str, tuple[MemoryFilm, ...]]
    seed: int
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    shuffled: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Plain values: films, seed, scores per run, shuffled, and per film what was told and what each run shows."""
        films = len(next(iter(self.runs.values())))
        rows = [_film_json({name: run[n] for name, run in self.runs.items()}) for n in range(films)]
        return {"films": films, "seed": self.seed, "scores": self.scores, "shuffled": self.shuffled, "per_film": rows}

    def rows(self) -> list[tuple[float | str | None, ...]]:
        """(measure, score of each run, score of chance) in the order of the report."""
        return [(name, *(scores[name] for scores in self.scores.values()), self.shuffled.get(name)) for name in MEASURES]


def _film_json(runs: dict[str, MemoryFilm]) -> dict:
    film = next(iter(runs.values()))
    told = {
        **asdict(film.story.shots[0].roles[0].character),
        "setting": film.story.shots[-1].setting,
        "captions": [shot.caption for shot in film.story.shots],
        "chunks": [shot.chunks for shot in film.story.shots],
    }
    shown = {name: {"scores": score_memory(f, f.story), "first": _shot_json(f.first), "last": _shot_json(f.last)} for name, f in runs.items()}
    return {"index": film.index, "seed": film.story.seed, "told": told, **shown}


def _shot_json(shot: ShotReading) -> dict:
    names = ("colour", "shape", "size", "marking", "action")
    characters = [{name: value for name, value in asdict(seen).items() if name in names} for seen in shot.characters]
    return {"setting": shot.setting, "camera": shot.camera, "characters": characters}


def memory_stories(films: int, seed: int, chunks: int = CHUNKS, shots: int = SHOTS, split: str = "held-out") -> list[WorldStory]:
    """The stories of an evaluation, a function of the seed alone. Raises InputError for no films, or too few shots or chunks."""
    if films < 1:
        raise InputError(f"--films {films}: judge at least one film")
    return [memory_story(seed, index, chunks=chunks, shots=shots, split=split) for index in range(films)]


def both_ways(config: "Config", chunks: int) -> dict[str, "Config"]:
    """The configuration with sinks, as it is, and without. Raises InputError where the two would not differ in what the last shot can see."""
    settings = rollout_settings(config)
    if settings.sink_frames == 0:
        raise InputError("inference.sink_size(0): there are no sinks to compare with; leave it out")
    least = 2 * (settings.pages - 1)
    if chunks < least:
        raise InputError(f"--chunks {chunks}: a window of {settings.pages} chunks may see the first shot in the last one; use {least} or more")
    return {"sinks": config, "without": config.with_overrides(list(WITHOUT_SINKS))}


def read_films(
    judge: Judge, stories: Sequence[WorldStory], chunks: Films, on_chunk: Callable[[], None] | None = None
) -> tuple[MemoryFilm, ...]:
    """Reads the first and the last shot out of a stream of chunks, at constant memory; `on_chunk` is called after each chunk. In story order."""
    place = [0] * len(stories)
    first: dict[int, ShotReading] = {}
    last: dict[int, ShotReading] = {}
    for index, frames_THW3 in chunks:
        story = stories[index]
        if place[index] == 0:
            first[index] = judge.read_shot(frames_THW3)
        elif place[index] == story.chunks - story.shots[-1].chunks:
            last[index] = judge.read_shot(frames_THW3, story.shot_starts[-1])
        place[index] += 1
        if on_chunk is not None:
            on_chunk()
    return tuple(MemoryFilm(index=n, story=story, first=first[n], last=last[n]) for n, story in enumerate(stories))


def score_memory(film: MemoryFilm, told: WorldStory) -> dict[str, float]:
    """The measures of one film, each 0..1. `told`: the film's own story, or another one's, which gives the score of chance.

    look        mean of the three below: how much of the character came back
    identity    the last shot shows the film's character, in its colour, in the shape that the first shot was told
    size, marking  the same for these
    first_shot  the first shot shows that shape in that colour: the most that there is to remember
    colour, setting  of the last shot, against its own caption

    Who is who is said by the colour of the film's own story, always; so chance has the colour for free and guesses the rest.
    """
    own, look = film.story.shots[0].roles[0].character, told.shots[0].roles[0].character
    start, back = _of_colour(film.first, own.colour), _of_colour(film.last, own.colour)
    shot = score_shot(told.shots[-1], film.last)
    kept = {
        "identity": float(back is not None and back.shape == look.shape),
        "size": float(back is not None and back.size == look.size),
        "marking": float(back is not None and back.marking == look.marking),
    }
    return {
        "look": sum(kept.values()) / len(kept),
        **kept,
        "first_shot": float(start is not None and start.shape == look.shape),
        "colour": shot["colour"],
        "setting": shot["setting"],
    }


def _of_colour(shot: ShotReading, colour: str) -> CharacterReading | None:
    return next((seen for seen in shot.characters if seen.colour == colour), None)


def compare(runs: dict[str, tuple[MemoryFilm, ...]], seed: int) -> MemoryReport:
    """The report of the same films made in several ways. Chance is every film of the first way against every other film's story."""
    scores = {name: _mean([score_memory(film, film.story) for film in films]) for name, films in runs.items()}
    films = next(iter(runs.values()))
    crossed = [score_memory(a, b.story) for a in films for b in films if a is not b]
    return MemoryReport(runs=runs, seed=seed, scores=scores, shuffled=_mean(crossed) if crossed else {})


def _mean(scores: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(film[name] for film in scores) / len(scores) for name in MEASURES}
