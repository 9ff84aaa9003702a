"""What only memory can know is scored as such: truth keeps it, a film that guesses does not, and chance has the colour for free."""

import dataclasses
import json

import pytest
import torch

from longlive.cli.app import app, run
from longlive.config import default_config, load_config
from longlive.core.errors import InputError
from longlive.core.pixels import to_uint8
from longlive.engine.pipeline import rollout_settings
from longlive.evaluation.memory import MEASURES, REMEMBERED, both_ways, compare, memory_stories, read_films, score_memory
from longlive.train.world_latents import StorySource
from longlive.world.judge import WEIGHTS, Judge
from longlive.world.judge_net import SPAN
from longlive.world.render import chunk_parameters, render
from longlive.world.vocabulary import MARKINGS, SHAPES, SIZES

weights = pytest.mark.skipif(not WEIGHTS.is_file(), reason="the judge's weights are not here")


def shown(stories, forget=False):
    """Films as `read_films` takes them, with the frames that nobody looks at left empty; `forget`: whoever comes back looks different."""
    for index, story in enumerate(stories):
        back = story.chunks - story.shots[-1].chunks
        if forget:
            last = story.shots[-1]
            (role,) = last.roles
            look = dataclasses.replace(role.character, **{name: other(getattr(role.character, name)) for name in ("shape", "size", "marking")})
            last = dataclasses.replace(last, roles=(dataclasses.replace(role, character=look),))
            story = dataclasses.replace(story, shots=(*story.shots[:-1], last))
        for chunk in range(story.chunks):
            empty = torch.zeros(32, 1, 1, 3, dtype=torch.uint8)
            yield index, to_uint8(render(chunk_parameters(story, chunk)[:SPAN])) if chunk in (0, back) else empty


def other(name):
    """The next name of the same kind; never "plain", which would hide a spin."""
    names = next(names for names in (SHAPES, SIZES, MARKINGS[1:], MARKINGS) if name in names)
    return names[(names.index(name) + 1) % len(names)]


@weights
def test_truth_remembers_and_a_guess_does_not():
    stories, judge = memory_stories(2, 5), Judge.load()
    runs = {"truth": read_films(judge, stories, shown(stories)), "guess": read_films(judge, stories, shown(stories, forget=True))}
    report = compare(runs, 5)
    assert report.scores["truth"] == dict.fromkeys(MEASURES, 1.0)
    assert {name for name, score in report.scores["guess"].items() if score < 1} == set(REMEMBERED)
    assert all(report.scores["guess"][name] == 0 for name in REMEMBERED)
    assert [row[0] for row in report.rows()] == list(MEASURES) and all(len(row) == 4 for row in report.rows())
    values = json.loads(json.dumps(report.to_json()))
    film = values["per_film"][1]
    assert values["scores"] == report.scores and film["told"]["captions"] == [shot.caption for shot in stories[1].shots]
    assert film["truth"]["last"]["characters"][0]["shape"] == film["told"]["shape"] != film["guess"]["last"]["characters"][0]["shape"]


@weights
def test_chance_knows_the_colour_and_guesses_the_rest():
    stories = memory_stories(2, 5)
    (film,) = read_films(Judge.load(), stories[:1], shown(stories[:1]))
    role = stories[1].shots[0].roles[0]
    alike = dataclasses.replace(film.story.shots[0].roles[0].character, colour=role.character.colour)
    first = dataclasses.replace(stories[1].shots[0], roles=(dataclasses.replace(role, character=alike),))
    told = dataclasses.replace(stories[1], shots=(first, *stories[1].shots[1:]))
    scores = score_memory(film, told)
    assert alike.colour != film.last.characters[0].colour and all(scores[name] == 1 for name in REMEMBERED) and scores["colour"] == 0
    gone = score_memory(dataclasses.replace(film, last=dataclasses.replace(film.last, characters=())), film.story)
    assert gone == {**dict.fromkeys((*REMEMBERED, "colour"), 0.0), "first_shot": 1.0, "setting": 1.0}


def test_both_ways_differ_in_sinks_alone():
    configs = both_ways(default_config("tiny", ["inference.sampling_steps=2"]), 16)
    with_sinks, without = (rollout_settings(config) for config in configs.values())
    assert with_sinks.policy.anchor and with_sinks.policy.pin and not without.policy.anchor and not without.policy.pin
    assert dataclasses.replace(without, sink_frames=with_sinks.sink_frames) == with_sinks and without.steps == 2
    for words, chunks in ((["inference.sink_size=0"], 16), (["inference.local_attn_size=64"], 13)):
        with pytest.raises(InputError):
            both_ways(default_config("tiny", words), chunks)


def test_training_tells_stories_that_need_memory():
    world = load_config("configs/tiny/train_ar.yaml").world
    shape = {"chunks": world.chunks, "shots": (world.min_shots, world.max_shots), "characters": (1, world.max_characters), "split": world.split}
    source = StorySource(seed=world.seed, rank=0, **shape, memory=world.memory, away=world.away)
    roles = [role for number in range(200) for shot in source[number].shots for role in shot.roles if role.known]
    assert abs(sum(role.recalled for role in roles) / len(roles) - world.memory) < 0.06 and world.memory > 0


@weights
def test_the_command_prints_a_table_and_refuses_what_cannot_be_compared(tmp_path, capsys):
    target = tmp_path / "memory.json"
    words = ["eval", "memory", "--films", "1", "--seed", "2", "--chunks", "6", "--shots", "3", "--truth", "--json", str(target)]
    assert run(app, [*words, "inference.device=cpu"]) == 0
    values = json.loads(target.read_text())
    assert values["scores"] == {"truth": dict.fromkeys(MEASURES, 1.0)} and values["shuffled"] == {} and len(values["per_film"]) == 1
    capsys.readouterr()
    for bad in (["--films", "0"], ["--shots", "2"], ["--chunks", "7"], ["inference.sink_size=0"]):
        assert run(app, ["eval", "memory", *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1
