"""The judge reads rendered truth, its scores mean what they say, and its training learns."""

import dataclasses
import json

import pytest
import torch

from longlive.config import load_config
from longlive.core.errors import CheckpointError, InputError
from longlive.evaluation.drift import DriftMeter, curve
from longlive.evaluation.world import evaluation_stories, judge_films, truth_chunks, whole_films
from longlive.world.judge import WEIGHTS, CharacterReading, Judge, Reading, ShotReading, score_cuts, score_film
from longlive.world.judge_net import JudgeNet
from longlive.world.judge_training import save_judge, train_judge
from longlive.world.story import evaluation_story
from longlive.world.vocabulary import COLOURS, PALETTE


def perfect_reading(story):
    shots = []
    for shot, (start, stop) in zip(story.shots, story.shot_frames):
        seen = tuple(
            CharacterReading(
                **dataclasses.asdict(role.character),
                action=role.action,
                track=((role.home_x, role.home_y),),
                area=900.0,
                certainty=(1.0, 1.0),
                rgb=PALETTE[COLOURS.index(role.character.colour)],
            )
            for role in shot.roles
        )
        shots.append(ShotReading(start=start, stop=stop, setting=shot.setting, camera=shot.camera, characters=seen))
    return Reading(shots=tuple(shots), cuts=tuple(story.shot_starts[1:]), steps=())


def change(reading, shot, **values):
    """The reading with the first character of one shot changed; `gone` removes it."""
    shots = list(reading.shots)
    seen = shots[shot].characters
    first = () if values.pop("gone", False) else (dataclasses.replace(seen[0], **values),)
    shots[shot] = dataclasses.replace(shots[shot], characters=first + seen[1:])
    return dataclasses.replace(reading, shots=tuple(shots))


@pytest.fixture(scope="module")
def loner():
    """A film in which one character is alone in every shot."""
    stories = (evaluation_story(2, index) for index in range(0, 90, 3))
    return next(s for s in stories if len({shot.roles[0].character for shot in s.shots}) == 1)


def test_a_perfect_film_scores_one_and_order_of_characters_is_free():
    for index in range(9):
        story = evaluation_story(4, index)
        reading = perfect_reading(story)
        mirrored = tuple(dataclasses.replace(shot, characters=shot.characters[::-1]) for shot in reading.shots)
        for read in (reading, dataclasses.replace(reading, shots=mirrored)):
            assert set(score_film(read, story).values()) == {1.0}


def test_each_mistake_costs_its_own_score(loner):
    reading = perfect_reading(loner)
    role = loner.shots[1].roles[0]
    other = "star" if role.character.shape != "star" else "circle"
    scores = score_film(change(reading, 1, shape=other), loner)
    assert scores["shape"] == pytest.approx(2 / 3) and scores["identity"] == 0 and scores["colour"] == scores["action"] == 1
    gone = score_film(change(reading, 2, gone=True), loner)
    assert gone["colour"] == gone["shape"] == gone["action"] == pytest.approx(2 / 3) and gone["identity"] == 0.5


def test_a_character_too_many_halves_its_shot(loner):
    reading = perfect_reading(loner)
    shots = list(reading.shots)
    shots[0] = dataclasses.replace(shots[0], characters=shots[0].characters * 2)
    assert score_film(dataclasses.replace(reading, shots=tuple(shots)), loner)["colour"] == pytest.approx(5 / 6)


def test_cuts_are_an_f1_within_two_frames():
    assert score_cuts([61, 93], [61, 95]) == 1
    assert score_cuts([61], [61, 93]) == pytest.approx(2 / 3)
    assert score_cuts([61, 62], [61]) == pytest.approx(2 / 3)
    assert score_cuts([], []) == 1 and score_cuts([], [61]) == 0 and score_cuts([64], [61]) == 0


@pytest.fixture(scope="module")
def report():
    judge = Judge.load() if WEIGHTS.is_file() else Judge(JudgeNet())
    stories = [evaluation_story(6, index, chunks=3) for index in range(6)]  # every shot one chunk
    return judge_films(judge, stories, whole_films(stories, truth_chunks(stories)), seed=6, source="truth")


def test_what_is_analytic_is_read_from_truth(report):
    for name in ("colour", "setting", "camera", "cuts"):
        assert report.scores[name] >= 0.95, name
        assert name == "cuts" or report.shuffled[name] <= 0.5, name
    assert json.loads(json.dumps(report.to_json()))["scores"] == report.scores


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="the judge's weights are not here")
def test_what_is_learned_is_read_from_truth(report):
    for name in ("shape", "action", "identity"):
        assert report.scores[name] >= 0.95, name
        assert report.shuffled[name] <= 0.45, name


def test_drift_has_a_row_per_window():
    story = evaluation_story(0, 0, chunks=6)
    meter = DriftMeter(judge=Judge(JudgeNet()), story=story, window=4.0, every=2)
    for _, frames in truth_chunks([story]):
        meter.feed(frames)
    rows = curve([meter])
    assert [(row["from_second"], row["chunks"]) for row in rows] == [(0.0, 2), (4.0, 1)]
    assert all(row["setting"] == row["colour"] == 1 for row in rows)


def test_training_writes_weights_that_load(tmp_path):
    config = load_config("configs/tiny/train_judge.yaml", ["training.max_iters=2", "training.batch_size=2"])
    row = train_judge(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] == row and row["step"] == 2 and row["loss"] > 0
    assert (tmp_path / "judge.safetensors").stat().st_size < 1_500_000
    Judge.load(path=tmp_path / "judge.safetensors")


def test_a_file_that_is_no_judge_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="train"):
        Judge.load(path=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError):
        Judge.load(path=tmp_path / "bad.safetensors")
    net = JudgeNet()
    save_judge(net.eye, tmp_path / "part.safetensors", {})
    with pytest.raises(CheckpointError):
        Judge.load(path=tmp_path / "part.safetensors")


def test_training_seeds_never_meet_the_evaluation():
    from longlive.world.judge_training import draw_shots

    told = {shot.caption for step in range(20) for shot, _ in draw_shots(20, step, 20)}
    assert not told & {shot.caption for index in range(60) for shot in evaluation_story(0, index).shots}


def test_looking_is_the_same_for_one_and_for_many():
    from longlive.world.perception import colour_masks, follow

    frames = torch.rand(4, 3, 96, 160, generator=torch.Generator().manual_seed(0)) * 255
    masks = colour_masks(frames)
    centre, area = follow(masks.flatten(0, 1))
    for k in range(8):
        one, size = follow(masks[:, k])
        assert torch.allclose(one, centre.view(4, 8, 2)[:, k]) and torch.allclose(size, area.view(4, 8)[:, k])


def test_an_evaluation_too_short_is_refused():
    for bad in ({"films": 0}, {"chunks": 5}, {"shots": 2}, {"shots": 7}):
        with pytest.raises(InputError):
            evaluation_stories(**{"films": 1, "seed": 0, **bad})
