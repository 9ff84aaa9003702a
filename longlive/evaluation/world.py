"""How well films show what their storyboards say: stories drawn from a seed, films of them, and the judge's scores.

Where the films come from is a value: a stream of (film index, uint8 frames of its next chunk). The engine's films, renders of the truth and
renders sent through the autoencoder are judged by the same code, so the latter two calibrate the first.

Legend: T pixel frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

from ..core.errors import InputError
from ..core.pixels import to_uint8
from ..world.judge import ATTRIBUTES, Judge, Reading, mean_scores, score_film
from ..world.render import chunk_parameters, render
from ..world.story import WorldStory, evaluation_story
from .calibration import calibration

CHUNKS, SHOTS = 6, 3
Films = Iterator[tuple[int, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class FilmReport:
    """One judged film."""

    index: int
    story: WorldStory
    reading: Reading
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class WorldReport:
    """Judged films and their mean scores. `shuffled`: the same films against each other's storyboards, the scores of chance.

    `calibration`: how sure the judge's network is of shape and action, and how often it is right (`evaluation.calibration`).
    """

    films: tuple[FilmReport, ...]
    seed: int
    source: str
    scores: dict[str, float] = field(default_factory=dict)
    shuffled: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Plain values: scores, films, seed, source, shuffled, calibration, and per film what was told and what was seen."""
        return {
            "scores": self.scores,
            "films": len(self.films),
            "seed": self.seed,
            "source": self.source,
            "shuffled": self.shuffled,
            "calibration": self.calibration,
            "per_film": [_film_json(film) for film in self.films],
        }


def _film_json(film: FilmReport) -> dict:
    told = [
        {
            "caption": shot.caption,
            "chunks": shot.chunks,
            "setting": shot.setting,
            "camera": shot.camera,
            "characters": [{**asdict(role.character), "action": role.action} for role in shot.roles],
        }
        for shot in film.story.shots
    ]
    seen = []
    for shot in film.reading.shots:
        row = asdict(shot)
        row["characters"] = [{k: v for k, v in c.items() if k != "track"} for c in row["characters"]]
        seen.append(row)
    return {"index": film.index, "seed": film.story.seed, "scores": film.scores, "told": told, "seen": seen, "cuts": list(film.reading.cuts)}


def evaluation_stories(films: int, seed: int, chunks: int = CHUNKS, shots: int = SHOTS) -> list[WorldStory]:
    """The storyboards of an evaluation, a function of the seed alone. Raises InputError for lengths below 6 chunks or 3 shots."""
    if films < 1:
        raise InputError(f"--films {films}: judge at least one film")
    if shots < SHOTS or chunks < max(CHUNKS, shots):
        raise InputError(f"{shots} shots in {chunks} chunks: an evaluation has at least {SHOTS} shots and {CHUNKS} chunks, a chunk or more per shot")
    return [evaluation_story(seed, index, chunks=chunks, shots=(shots, shots)) for index in range(films)]


@torch.no_grad()
def reconstructed_chunks(stories: Sequence[WorldStory], codec) -> Films:
    """(film index, uint8 [T, H, W, 3] of its next chunk) of renders sent through the video codec: what a perfect generator would score."""
    for index, story in enumerate(stories):
        coded = shown = None
        for chunk in range(story.chunks):
            pixels = render(chunk_parameters(story, chunk).to(codec.device)).transpose(0, 1)[None]
            coded, z = codec.stream_encode(coded, pixels)
            shown, back = codec.stream_decode(shown, z)
            yield index, codec.to_uint8(back)[0]


def generated_chunks(stories: Sequence[WorldStory], pipeline, batch: int = 1) -> Films:
    """(film index, uint8 [T, H, W, 3] of its next chunk) of the engine's films of the stories' captions, `batch` films at a time.

    Each story's own seed draws its noise. Nothing is kept: films may be of any length.
    """
    from ..engine.session import Request

    for first in range(0, len(stories), batch):
        part = stories[first : first + batch]
        boards = tuple(story.storyboard() for story in part)
        with pipeline.session(Request(storyboards=boards, indices=tuple(range(first, first + len(part))))) as session:
            for chunk in session:
                for offset, frames in enumerate(chunk.frames):
                    yield first + offset, frames.cpu()


def truth_chunks(stories: Sequence[WorldStory], device: torch.device | str = "cpu") -> Films:
    """(film index, uint8 [T, H, W, 3] of its next chunk) of renders."""
    for index, story in enumerate(stories):
        for chunk in range(story.chunks):
            yield index, to_uint8(render(chunk_parameters(story, chunk).to(device)))


def whole_films(stories: Sequence[WorldStory], chunks: Films) -> Films:
    """Puts the chunks of each film together; gives (film index, uint8 [T, H, W, 3]) as soon as a film is complete."""
    pieces: dict[int, list[torch.Tensor]] = {}
    for index, frames in chunks:
        pieces.setdefault(index, []).append(frames.cpu())
        if len(pieces[index]) == stories[index].chunks:
            yield index, torch.cat(pieces.pop(index))


def judge_films(
    judge: Judge,
    stories: Sequence[WorldStory],
    films: Iterable[tuple[int, torch.Tensor]],
    *,
    seed: int,
    source: str,
    on_film: Callable[[FilmReport], None] | None = None,
) -> WorldReport:
    """Reads each film at its story's shot boundaries and scores it; `on_film` is called after each."""
    reports = []
    for index, video in films:
        story = stories[index]
        reading = judge.read(video, story.shot_starts)
        reports.append(FilmReport(index=index, story=story, reading=reading, scores=score_film(reading, story)))
        if on_film is not None:
            on_film(reports[-1])
    return WorldReport(
        films=tuple(reports),
        seed=seed,
        source=source,
        scores=mean_scores([r.scores for r in reports]),
        shuffled=shuffled_scores(reports),
        calibration=calibration(pair for r in reports for pair in zip(r.story.shots, r.reading.shots)),
    )


def shuffled_scores(reports: Sequence[FilmReport]) -> dict[str, float]:
    """Mean scores when every film is held against another one's storyboard; empty for a single film. What chance alone would score.

    Shots are compared in order, whatever their lengths: only the meaning is shuffled.
    """
    if len(reports) < 2:
        return {}
    return mean_scores([score_film(a.reading, b.story) for a, b in zip(reports, [*reports[1:], reports[0]])])


def report_rows(report: WorldReport) -> list[tuple[str, float, float | None]]:
    """(attribute, score, score of chance) in the order of the report."""
    return [(name, report.scores[name], report.shuffled.get(name)) for name in ATTRIBUTES]
