"""The judge: pixels -> what is shown, shot by shot, and how far that agrees with a story.

Colours, positions, settings, cameras, cuts and the count of characters are read analytically (`perception`); shapes, actions, markings
and sizes by a small network on tracked crops (`judge_net`). The judge sees pixels only. Attributes are read from the first chunk of a
shot at the storyboard's own boundaries; cuts are found without them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.errors import CheckpointError
from . import perception
from .judge_net import HEADS, SPAN, JudgeNet, look, sample_times
from .story import ShotTruth, WorldStory
from .vocabulary import CAMERAS, COLOURS, SETTINGS

WEIGHTS = Path(__file__).resolve().parent.parent / "assets" / "tiny" / "judge.safetensors"
ATTRIBUTES = ("colour", "shape", "setting", "action", "camera", "identity", "cuts")
CUT_TOLERANCE = 2  # frames


@dataclass(frozen=True, kw_only=True)
class CharacterReading:
    """One character seen in a shot. `track`: (x, y) per looked-at frame, pixels at 192x320; `certainty` of shape and action, 0..1.

    `rgb`: the median of the pixels that have its colour, 0..255.
    """

    colour: str
    shape: str
    size: str
    marking: str
    action: str
    track: tuple[tuple[float, float], ...]
    area: float
    certainty: tuple[float, float]
    rgb: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class ShotReading:
    """What pixel frames [start, stop) show. Characters from left to right, at most two."""

    start: int
    stop: int
    setting: str
    camera: str
    characters: tuple[CharacterReading, ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a film shows. `cuts`: frames at which a shot is seen to begin; `steps`: difference of each frame to the one before it, 0..1."""

    shots: tuple[ShotReading, ...]
    cuts: tuple[int, ...]
    steps: tuple[float, ...]


class Judge:
    """Reads films. Holds the small network on one device; everything else is arithmetic on pixels."""

    def __init__(self, net: JudgeNet, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.net = net.to(self.device, torch.float32).eval()

    @classmethod
    def load(cls, device: torch.device | str = "cpu", path: Path | str = WEIGHTS) -> "Judge":
        """The shipped judge, or the one in `path`. Raises CheckpointError when the file is missing or of the wrong kind."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise CheckpointError(f"no judge weights at {path}; train them with `longlive train configs/tiny/train_judge.yaml --logdir DIR`")
        net = JudgeNet()
        try:
            net.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()})
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{path} holds no judge ({str(error).splitlines()[0]}); train one or restore the file") from error
        return cls(net, device)

    @torch.no_grad()
    def read(self, video_THW3: torch.Tensor, starts: Sequence[int] | None = None) -> Reading:
        """What a film of uint8 frames [T, H, W, 3] shows. `starts`: first frames of its shots (None: the cuts that are found)."""
        frames = len(video_THW3)
        steps, before = [], None
        for part in video_THW3.split(256):
            small = perception.half_size(part.to(self.device))
            steps.append(perception.frame_steps(small, before))
            before = small[-1:]
        steps_T = torch.cat(steps)
        cuts = perception.find_cuts(steps_T)
        starts = [0, *cuts] if starts is None else [s for s in starts if s < frames]
        bounds = list(zip(starts, [*starts[1:], frames]))
        shots = tuple(self.read_shot(video_THW3[a:b], a) for a, b in bounds)
        return Reading(shots=shots, cuts=tuple(cuts), steps=tuple(steps_T.tolist()))

    @torch.no_grad()
    def read_shot(self, video_THW3: torch.Tensor, start: int = 0) -> ShotReading:
        """What one shot shows, from its first frames. `start` is only noted down."""
        head = perception.half_size(video_THW3[:SPAN].to(self.device))
        masks = perception.colour_masks(head)
        cover = perception.character_cover(masks)
        setting, _ = perception.read_setting(head, cover)
        camera = CAMERAS.index("still")
        if len(head) > 2:
            camera, _ = perception.read_camera(perception.background_motion(head, cover))
        times = sample_times(len(head))
        found = [
            (k, centre[times], area[times], perception.median_colour(head, masks[:, k])) for k, centre, area in perception.find_characters(masks)
        ]
        return ShotReading(
            start=start,
            stop=start + len(video_THW3),
            setting=SETTINGS[setting],
            camera=CAMERAS[camera],
            characters=self._characters(head[times], masks[times], found),
        )

    def _characters(
        self, frames: torch.Tensor, masks: torch.Tensor, found: list[tuple[int, torch.Tensor, torch.Tensor, tuple[float, float, float]]]
    ) -> tuple[CharacterReading, ...]:
        if not found:
            return ()
        found = sorted(found, key=lambda item: float(item[1][:, 0].mean()))
        crops, track = look(
            frames.expand(len(found), *frames.shape),
            torch.stack([masks[:, k] for k, *_ in found]),
            torch.stack([centre for _, centre, *_ in found]),
            torch.stack([area for _, _, area, _ in found]),
        )
        logits = {name: value.softmax(1).cpu() for name, value in self.net(crops, track).items()}
        readings = []
        for n, (colour, centre, area, rgb) in enumerate(found):
            names = {name: HEADS[name][int(value[n].argmax())] for name, value in logits.items()}
            certainty = (float(logits["shape"][n].max()), float(logits["action"][n].max()))
            places = tuple((float(x), float(y)) for x, y in centre)
            readings.append(
                CharacterReading(colour=COLOURS[colour], track=places, area=float(area.mean()), certainty=certainty, rgb=rgb, **names)
            )
        return tuple(readings)


def match(shot: ShotTruth, reading: ShotReading) -> list[tuple[int, int]]:
    """(role, character) pairs of the assignment in which most of colour, shape and action agree."""

    def agreement(r: int, c: int) -> float:
        look, role, seen = shot.roles[r].character, shot.roles[r], reading.characters[c]
        # colour counts double: it is exact, so it says who is who
        return 2 * (look.colour == seen.colour) + (look.shape == seen.shape) + 0.5 * (role.action == seen.action) + 0.01 * (r == c)

    roles, seen = len(shot.roles), len(reading.characters)
    few = min(roles, seen)
    options = [list(zip(a, b)) for a in itertools.combinations(range(roles), few) for b in itertools.permutations(range(seen), few)]
    return max(options, key=lambda pairs: sum(agreement(r, c) for r, c in pairs))


def score_shot(shot: ShotTruth, reading: ShotReading) -> dict[str, float]:
    """colour, shape, action: right ones over the larger of the told and the seen count of characters; setting, camera: 0 or 1."""
    pairs = match(shot, reading)
    most = max(len(shot.roles), len(reading.characters))
    told = [(shot.roles[r], reading.characters[c]) for r, c in pairs]
    return {
        "colour": sum(role.character.colour == seen.colour for role, seen in told) / most,
        "shape": sum(role.character.shape == seen.shape for role, seen in told) / most,
        "action": sum(role.action == seen.action for role, seen in told) / most,
        "setting": float(shot.setting == reading.setting),
        "camera": float(shot.camera == reading.camera),
    }


def score_identity(story: WorldStory, readings: Sequence[ShotReading]) -> float:
    """Share of reappearances at which a character keeps its look: both times seen in its told colour, both times in the same shape.

    Returns 1 for a story in which nobody reappears.
    """
    last: dict[object, str | None] = {}
    kept = []
    for shot, reading in zip(story.shots, readings):
        pairs = dict(match(shot, reading))
        for r, role in enumerate(shot.roles):
            seen = reading.characters[pairs[r]] if r in pairs else None
            shape = seen.shape if seen is not None and seen.colour == role.character.colour else None
            if role.character in last:
                kept.append(shape is not None and shape == last[role.character])
            last[role.character] = shape
    return sum(kept) / len(kept) if kept else 1.0


def score_cuts(found: Sequence[int], told: Sequence[int]) -> float:
    """F1 of the cut frames that are found, each told cut being met by at most one found within 2 frames."""
    left, hits = list(found), 0
    for cut in told:
        near = [f for f in left if abs(f - cut) <= CUT_TOLERANCE]
        if near:
            left.remove(min(near, key=lambda f: abs(f - cut)))
            hits += 1
    return 2 * hits / (len(found) + len(told)) if found or told else 1.0


def score_film(reading: Reading, story: WorldStory) -> dict[str, float]:
    """The seven scores of one film, each 0..1. Each shot of the story is compared with the shot read at (or nearest to) its place."""
    shots = []
    for start, stop in story.shot_frames:
        shots.append(max(reading.shots, key=lambda shot: min(stop, shot.stop) - max(start, shot.start)))
    per_shot = [score_shot(shot, read) for shot, read in zip(story.shots, shots)]
    scores = {name: sum(row[name] for row in per_shot) / len(per_shot) for name in ATTRIBUTES[:5]}
    scores["identity"] = score_identity(story, shots)
    scores["cuts"] = score_cuts(reading.cuts, story.shot_starts[1:])
    return scores


def mean_scores(films: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over films."""
    return {name: sum(film[name] for film in films) / len(films) for name in ATTRIBUTES}
