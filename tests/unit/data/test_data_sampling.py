"""The documented sampling rules, and the defects of the published sampler (D15, D16, D17)."""

import random
from dataclasses import dataclass

import pytest

from longlive.data.manifest import ManifestClip, ManifestSample
from longlive.data.sampling import (
    SamplingRules,
    Segment,
    draw_segments,
    feasible_starts,
    filled_chunks,
    fits,
    folder_of,
    frame_numbers,
    prompts_and_cuts,
    shuffled,
    start_generator,
    walk,
)
from longlive.data.sources import Planner


@dataclass(frozen=True)
class Clip:
    frames: int
    fps: float = 24.0


def sample(name, *clips):
    return ManifestSample(name, tuple(ManifestClip(f"video/{name}/{k}.mp4", f"{name} {k}", c.frames, c.fps, 64, 32) for k, c in enumerate(clips)))


def test_a_chunk_is_29_frames_and_later_ones_32():
    segments = walk([Clip(93)], SamplingRules(chunks=3))
    assert segments == (Segment(0, 0, 29, False), Segment(0, 29, 32, False), Segment(0, 61, 32, False))
    assert len(walk([Clip(92)], SamplingRules(chunks=3))) == 2
    assert sum(SamplingRules(chunks=12).frames_of(c) for c in range(12)) == 381  # 96 latent frames


@pytest.mark.parametrize("fps", [12.0, 23.976, 25.0, 30.0, 60.0])
def test_frames_are_picked_by_time(fps):
    clip = Clip(int(93 * fps / 24) + 3, fps)
    first, second, _ = walk([clip], SamplingRules(chunks=3))
    assert frame_numbers(first, clip) == [round(i * fps / 24) for i in range(29)]
    assert second.start == round(29 * fps / 24)
    assert frame_numbers(Segment(0, clip.frames - 2, 32, False), clip)[-1] == clip.frames - 1


def test_the_prefix_stands_where_the_file_changes_or_a_virtual_cut_is():
    rules = SamplingRules(chunks=5, max_chunks_per_shot=2, scene_cut_prefix="CUT ")
    segments = walk([Clip(29 + 32 + 24 + 32 + 20, 24.0), Clip(20), Clip(200, 30.0)], rules)
    assert [(s.clip, s.start, s.cut) for s in segments] == [(0, 0, False), (0, 29, False), (0, 61 + 24, True), (2, 0, True), (2, 40, False)]
    prompts, cuts = prompts_and_cuts(segments, ["a", "b", "c"], rules)
    assert prompts == ("a", "a", "CUT a", "CUT c", "c") and cuts == (False, False, True, True, False)


def test_a_virtual_cut_skips_one_second_of_the_source():
    segments = walk([Clip(400, 30.0)], SamplingRules(chunks=3, max_chunks_per_shot=1))
    assert [s.start for s in segments] == [0, round(29 * 30 / 24) + 30, round((round(29 * 30 / 24) + 30) + 40) + 30]


def test_uniform_prompt_stays_in_one_file():
    clips = [Clip(61), Clip(200)]
    assert len(walk(clips, SamplingRules(chunks=4, uniform_prompt=True))) == 2
    starts = feasible_starts(clips, SamplingRules(chunks=4, uniform_prompt=True))
    assert not starts[0] and starts[1][0] == 0
    assert filled_chunks(clips, SamplingRules(chunks=4, uniform_prompt=True)) == 4


def test_padding_repeats_the_last_caption_and_counts_what_is_valid():
    rules = SamplingRules(chunks=4, allow_padding=True, min_latent_frames=16)
    segments = draw_segments([Clip(29), Clip(32)], rules, random.Random(0))
    prompts, cuts = prompts_and_cuts(segments, ["a", "b"], rules)
    assert len(segments) == 2
    assert prompts == ("a", rules.scene_cut_prefix + "b", "b", "b") and cuts == (False, True, False, False)
    assert rules.least_chunks == 2
    planner = Planner([sample("one", Clip(29)), sample("two", Clip(61))], rules, 0)
    assert [s.name for s in planner.samples] == ["two"] and [(s.name, s.chunks) for s in planner.short] == [("one", 1)]


def random_folder(rng):
    return [Clip(rng.randrange(1, 400), rng.choice([12.0, 23.976, 24.0, 25.0, 29.97, 60.0])) for _ in range(rng.randrange(1, 5))]


@pytest.mark.parametrize("seed", range(60))
def test_feasible_starts_are_exactly_those_that_fill_every_chunk(seed):
    """Bisection equals trying every start of the grid; virtual cuts, rates and short clips included (D16)."""
    rng = random.Random(seed)
    clips = random_folder(rng)
    rules = SamplingRules(chunks=rng.randrange(1, 9), max_chunks_per_shot=rng.randrange(0, 4), uniform_prompt=rng.random() < 0.3)
    for number, (clip, found) in enumerate(zip(clips, feasible_starts(clips, rules))):
        last = max((s for s in range(clip.frames) if fits(clip, s, 29)), default=-1)
        grid = range(0, last + 1, max(1, last // 50))
        assert list(found) == [s for s in grid if len(walk(clips, rules, number, s)) == rules.chunks]


def test_virtual_cuts_count_when_starts_are_chosen():
    """8 chunks with one skipped second need 277 frames: 260 can never do, 290 always can (D16: failed 62 % of its draws)."""
    rules = SamplingRules(chunks=8, max_chunks_per_shot=4)
    assert not any(feasible_starts([Clip(260)], rules))
    drawn = [draw_segments([Clip(290)], rules, start_generator(0, n, 0)) for n in range(200)]
    assert all(len(segments) == 8 for segments in drawn)
    starts = {segments[0].start for segments in drawn}
    assert min(starts) == 0 and max(starts) <= 13 and len(starts) > 2
    planner = Planner([sample("long", Clip(290)), sample("short", Clip(260))], rules, 0)
    assert [short.name for short in planner.short] == ["short"] and len(planner) == 1


def test_every_pass_shows_every_folder_once_in_another_order():
    """D15: one order on all hosts, a new one in every pass, whatever came before."""
    passes = [[folder_of(3, turn * 10 + place, 10) for place in range(10)] for turn in range(4)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len(set(map(tuple, passes))) == 4
    assert folder_of(3, 25, 10) == passes[2][5]
    assert [folder_of(3, n, 10, deterministic=True) for n in (0, 9, 10)] == [0, 9, 0]


def test_the_order_is_the_same_in_every_version():
    assert shuffled(0, 0, 8) == (6, 3, 2, 1, 5, 4, 0, 7)
    assert [start_generator(1, n, 0).random() for n in range(2)] == [0.010283692948723777, 0.13760049524711837]


def test_a_sample_is_a_function_of_its_number():
    samples = [sample(f"{k:02d}", Clip(300 + k), Clip(200)) for k in range(7)]
    one, other = (Planner(samples, SamplingRules(chunks=3), 5) for _ in range(2))
    forward = [one.stream(n) for n in range(20)]
    assert [other.stream(n) for n in reversed(range(20))] == forward[::-1]
    assert len({stream.key for stream in forward}) > 15
    assert [Planner(samples, SamplingRules(chunks=3), 6).stream(n) for n in range(20)] != forward


def test_later_attempts_take_other_folders():
    planner = Planner([sample(str(k), Clip(100)) for k in range(4)], SamplingRules(chunks=2), 0)
    assert {planner.sample(6, attempt).name for attempt in range(4)} == {"0", "1", "2", "3"}


def test_deterministic_starts_at_the_first_frame():
    rules = SamplingRules(chunks=2, deterministic=True)
    planner = Planner([sample(str(k), Clip(200)) for k in range(3)], rules, 0)
    assert [(planner.sample(n).name, planner.stream(n).segments[0].start) for n in range(3)] == [("0", 0), ("1", 0), ("2", 0)]


def test_training_takes_the_configured_prefix():
    """D17: the prefix of the configuration, not a default of its own."""
    from longlive.config import default_config
    from longlive.data.open import sampling_rules

    rules = sampling_rules(default_config("tiny", ["data.scene_cut_prefix='Now '", "data.max_chunks_per_shot=1"]))
    planner = Planner([sample("a", Clip(900))], rules, 0)
    prompts, _ = planner.prompts_and_cuts(planner.stream(0))
    assert prompts[0] == "a 0" and prompts[1] == "Now a 0"
