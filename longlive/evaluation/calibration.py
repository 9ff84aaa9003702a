"""Whether the judge is as sure as it is right: certainty against correctness of what its network says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..world.judge import ShotReading, match
from ..world.story import ShotTruth

LEARNED = ("shape", "action")  # in the order of CharacterReading.certainty
BINS = 10


def calibration_error(sure: Sequence[float], right: Sequence[bool]) -> float:
    """Expected calibration error, 0..1: the mean gap between certainty and share of right answers over ten equal bins of certainty."""
    error = 0.0
    for number in range(BINS):
        inside = [(s, r) for s, r in zip(sure, right) if min(BINS - 1, int(s * BINS)) == number]
        error += abs(sum(s - r for s, r in inside)) / len(sure)
    return error


def calibration(shots: Iterable[tuple[ShotTruth, ShotReading]]) -> dict[str, dict[str, float]]:
    """For shape and action: characters (told and seen), certainty and right (means), error (expected calibration error). Empty when none is seen."""
    said: dict[str, list[tuple[float, bool]]] = {name: [] for name in LEARNED}
    for truth, reading in shots:
        for r, c in match(truth, reading):
            role, seen = truth.roles[r], reading.characters[c]
            for name, told, guess, sure in zip(LEARNED, (role.character.shape, role.action), (seen.shape, seen.action), seen.certainty):
                said[name].append((sure, told == guess))
    return {name: _row(*zip(*pairs)) for name, pairs in said.items() if pairs}


def _row(sure: Sequence[float], right: Sequence[bool]) -> dict[str, float]:
    count = len(sure)
    return {"characters": count, "certainty": sum(sure) / count, "right": sum(right) / count, "error": calibration_error(sure, right)}
